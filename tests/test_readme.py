"""README.md and docs/ tell the truth where a test can check it."""
import contextlib
import importlib
import io
import re
import shlex
from dataclasses import fields, is_dataclass

import pytest
from conftest import ROOT

from train import FORMER

FOLDERS = {path.name: path.parent
           for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "experiments/RESULTS.md")}
PAGES = {name: (folder / name).read_text(encoding="utf-8") for name, folder in FOLDERS.items()}
README = PAGES["README.md"]
OURS = {path.stem: path.relative_to(ROOT).with_suffix("")
        for folder in (".", "support", "tasks", "experiments") for path in ROOT.glob(f"{folder}/*.py")}
ADDED = {"exercises.md": {"margin"}, "RESULTS.md": FORMER.keys()}  # that the reader adds; that there were
OTHERS = {"nproc_per_node", "standalone", "logdir", "always", "dirty", "abbrev"}  # of other programs
PROGRAMS = ("train", "eval", "data", "bench", "compare", "plots")
page = pytest.mark.parametrize("page", PAGES)


def module(name: str):
    return importlib.import_module(".".join(OURS[name].parts))


def flags_of(program: str) -> set[str]:
    """What its dataclasses of settings have."""
    kinds = [kind for kind in vars(module(program)).values() if isinstance(kind, type) and is_dataclass(kind)]
    return {"help", *(f.name for kind in kinds for f in fields(kind) if "help" in f.metadata)}


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--(?:no-)?([a-z]\w*)", text))


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_worked_example_prints_what_stands_below_it():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(blocks("python")[0], {})
    assert out.getvalue() == blocks("text")[0]


def test_the_two_commands_stand_there():
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert commands[:2] == ["pip install -r requirements.txt && python train.py --dataset nlrx_synth",
                            "pip install -r requirements-dev.txt && python -m pytest -q"]
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(part in ci for part in commands[1].split(" && "))
    assert len(README.splitlines()) <= 180


@page
def test_commands_have_the_flags_that_they_are_given(page):
    """Each line that starts a program of ours names flags of this very program."""
    for line in re.sub(r" \\\n *", " ", PAGES[page]).splitlines():
        if found := re.search(rf"(?:python|torchrun).*?[ .]({'|'.join(PROGRAMS)})(?:\.py)? ([^`]*)", line):
            given = flags_in(" ".join(shlex.split(found[2], comments=True)))
            known = flags_of(found[1]) | ADDED.get(page, set())
            assert given <= known, (line, given - known)


def test_every_flag_named_exists():
    """In the pages, and in docstrings and comments."""
    known = set().union(*map(flags_of, PROGRAMS)) | OTHERS
    sources = {f"{path}.py": (ROOT / f"{path}.py").read_text(encoding="utf-8") for path in OURS.values()}
    for name, text in (PAGES | sources).items():
        assert flags_in(text) <= known | ADDED.get(name, set()), (name, flags_in(text) - known)


@page
def test_every_file_and_function_named_exists(page):
    text, folder = PAGES[page], FOLDERS[page]
    for name in re.findall(r"`([\w/]+\.(?:py|md|sh|c))`", text):
        assert any((place / name).exists() for place in (ROOT, ROOT / "tests", folder)), name
    for name in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (folder / name).exists(), name
    for name, attribute in re.findall(rf"`(?:\w+\.)*({'|'.join(OURS)})\.([A-Za-z_]+)[`(.\[]", text):
        if attribute not in ("py", "json", "jsonl", "model"):  # names of files
            assert hasattr(module(name), attribute), f"{name}.{attribute}"
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for name in re.findall(r"`(test_[a-z_0-9]+)`", text):
        assert f"def {name}(" in tests, name
