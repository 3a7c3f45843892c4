"""README.md and docs/ tell the truth where a test can check it."""
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT

import data
import eval
import train
from experiments import bench, compare, plots

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8")
         for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
OPTIONS = [train.Config, eval.EvalOptions, data.ShowOptions] + [
    cls for module in (bench, compare, plots) for cls in vars(module).values()
    if isinstance(cls, type) and cls.__module__ == module.__name__ and hasattr(cls, "__dataclass_fields__")]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_worked_example_prints_what_stands_below_it():
    example = blocks("python")[0]
    reply = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=ROOT)
    assert reply.returncode == 0, reply.stderr
    assert reply.stdout == blocks("text")[0]


def test_the_two_commands_stand_there():
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert commands[:2] == ["pip install -r requirements.txt && python train.py --dataset nlrx_synth",
                            "pip install -r requirements-dev.txt && python -m pytest -q"]
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(part in ci for part in commands[1].split(" && "))
    assert len(README.splitlines()) <= 180


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_file_and_function_named_exists(page):
    """Flags of any program, files, links, functions of modules, tests."""
    text = PAGES[page]
    known = {f.name for cls in OPTIONS for f in fields(cls)} | {"help", "nproc_per_node"}
    if page == "exercises.md":
        known.add("margin")  # which the reader adds
    flags = {*re.findall(r"--(?:no-)?([a-z_]+)", text)}
    assert flags <= known, flags - known
    for name in re.findall(r"`((?:[a-z]+/)?[a-z_]+\.py)`", text):
        assert (ROOT / name).exists(), name
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for link in re.findall(r"\]\(((?!http)[^)#]+)", text):
        assert (folder / link).exists(), link
    paths = [path.relative_to(ROOT) for pattern in ("*.py", "[!t]*/*.py", "tasks/*.py")
             for path in ROOT.glob(pattern)]
    modules = {path.stem: ".".join(path.with_suffix("").parts) for path in paths}
    for module, name in re.findall(rf"`({'|'.join(modules)})\.([A-Za-z_]+)", text):
        if name not in ("py", "model"):  # files
            loaded = __import__(modules[module], fromlist=[name])
            assert hasattr(loaded, name), f"{module}.{name}"
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_[a-z_0-9]+)`", text):
        assert f"def {name}(" in tests, name
