"""README.md tells the truth where a test can check it."""
import re
import subprocess
import sys

from conftest import ROOT

import train

README = (ROOT / "README.md").read_text(encoding="utf-8")


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


def test_every_flag_and_file_named_exists():
    flags = {*re.findall(r"--(?:no-)?([a-z_]+)", README)}
    known = {*train.asdict(train.Config()), "help", "prompt", "other_data", "base_url", "nproc_per_node",
             "blocks", "steps", "embeddings", "plot", "profile"}
    assert flags <= known, flags - known
    for name in re.findall(r"`((?:tests/)?[a-z_]+\.py)`", README):
        assert (ROOT / name).exists(), name


def test_every_function_named_exists():
    modules = "|".join(path.stem for path in ROOT.glob("*.py"))
    for module, name in re.findall(rf"`({modules})\.([A-Za-z_]+)`", README):
        if f"{module}.{name}" not in (f"{module}.py", "tokenizer.model"):  # which are files
            assert hasattr(__import__(module), name), f"{module}.{name}"
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_[a-z_0-9]+)`", README):
        assert f"def {name}(" in tests, name
