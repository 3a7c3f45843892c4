"""The house: which files there are, and that imports go down only."""
import ast

from conftest import ROOT

LOW = {"support", "tasks"}
MAY_IMPORT = {  # who may import whom, of what is ours; nobody imports experiments
    "support": {"support"}, "tasks": LOW, "jepa_loss": set(), "model": {"support"},
    "data": LOW | {"jepa_loss"},
    "eval": LOW | {"jepa_loss", "model", "data"}, "train": LOW | {"jepa_loss", "model", "data", "eval"},
    "experiments": LOW | {"jepa_loss", "model", "data", "eval", "train", "experiments"}}


def imported(path) -> set[str]:
    """The first names of all that a file imports, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(path.parent.name if node.level else node.module.partition(".")[0])
    return names


def wrong_arrows(root) -> list[str]:
    arrows = []
    for path in sorted([*root.glob("*.py"), *root.glob("support/**/*.py"), *root.glob("tasks/**/*.py"),
                        *root.glob("experiments/**/*.py")]):
        who = path.relative_to(root).parts[0].removesuffix(".py")
        arrows += [f"{path.relative_to(root)} -> {name}"
                   for name in sorted(imported(path) & MAY_IMPORT.keys() - MAY_IMPORT[who])]
    return arrows


def test_imports_go_down_only():
    assert wrong_arrows(ROOT) == []


def test_five_files_are_the_method():
    files = {path.name for path in ROOT.glob("*.py")}
    assert files == {"model.py", "jepa_loss.py", "data.py", "eval.py", "train.py"}


def test_an_arrow_that_goes_up_is_named(tmp_path):
    (tmp_path / "support").mkdir()
    for file, content in (("support/files.py", "from tasks import nlrx"), ("train.py", "import torch, eval"),
                          ("data.py", "def f():\n    import json, model as m")):
        (tmp_path / file).write_text(content)
    assert wrong_arrows(tmp_path) == ["data.py -> model", "support/files.py -> tasks"]
