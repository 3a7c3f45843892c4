"""docs/lesson.ipynb: it runs from top to bottom, docs/lesson.md is its page, and its numbers are what it
prints. To make it anew, then its page:

    jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False \\
        docs/lesson.ipynb
    jupyter nbconvert --to markdown --NbConvertApp.output_files_dir=lesson docs/lesson.ipynb
"""
import re
import shutil

import pytest
from conftest import ROOT

nbformat, nbclient, nbconvert = map(pytest.importorskip, ("nbformat", "nbclient", "nbconvert"))
DOCS = ROOT / "docs"
FIVE = ("model", "jepa_loss", "data", "eval", "train")


@pytest.fixture
def lesson():
    return nbformat.read(DOCS / "lesson.ipynb", as_version=4)


def cells(notebook, kind: str) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def outputs(notebook) -> list:
    return [output for cell in cells(notebook, "code") for output in cell.outputs]


def pictures(notebook) -> int:
    return sum("image/png" in output.get("data", ()) for output in outputs(notebook))


def test_it_runs_from_top_to_bottom(lesson, tmp_path, monkeypatch):
    """Every cell, with 4 steps of training instead of 400, and 20 test items."""
    for folder in ("support", "tasks", "experiments"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("results"))
    for name in FIVE:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    (tmp_path / "docs").mkdir()
    monkeypatch.setenv("LESSON", "4 20")
    wanted = pictures(lesson)
    resources = {"metadata": {"path": str(tmp_path / "docs")}}
    nbclient.NotebookClient(lesson, timeout=300, resources=resources).execute()  # raises what a cell raises
    assert pictures(lesson) == wanted > 5
    assert len(list((tmp_path / "runs").glob("*/eval.json"))) == 3


def test_it_was_run_from_top_to_bottom(lesson):
    code = cells(lesson, "code")
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert not any(output.output_type == "error" for output in outputs(lesson))


def test_the_page_is_the_notebook(lesson):
    """Text and pictures; spaces may be another version's of nbconvert."""
    page, resources = nbconvert.MarkdownExporter().from_notebook_node(
        lesson, {"unique_key": "lesson", "output_files_dir": "lesson"})
    assert page.split() == (DOCS / "lesson.md").read_text(encoding="utf-8").split()
    made = {path.replace("\\", "/"): content for path, content in resources["outputs"].items()}
    assert made == {f"lesson/{path.name}": path.read_bytes() for path in (DOCS / "lesson").iterdir()}


def test_it_is_small():
    files = [DOCS / "lesson.ipynb", DOCS / "lesson.md", *(DOCS / "lesson").iterdir()]
    assert sum(path.stat().st_size for path in files) < 1_000_000


def test_it_copies_no_code(lesson):
    """It imports all five files, and no longer line of it is one of theirs."""
    code = "\n".join(cell.source for cell in cells(lesson, "code"))
    theirs = {line.strip() for name in FIVE for line in (ROOT / f"{name}.py").read_text().splitlines()}
    copied = {line.strip() for line in code.splitlines() if len(line.strip()) > 30} & theirs
    assert not {line for line in copied if not line.startswith(("import ", "from "))}
    assert all(re.search(rf"^from {name} import", code, re.M) for name in FIVE)


def test_its_numbers_are_what_it_prints(lesson):
    """Each number with a decimal point or a percent sign in the text stands in an output."""
    printed = "".join(output.get("text", "") for output in outputs(lesson))
    text = " ".join(re.sub(r"arXiv \S+|\(http\S+", "", cell.source) for cell in cells(lesson, "markdown"))
    numbers = re.findall(r"(?<![\w.])[+-]?\d+\.\d+|\d+(?= %)", text)
    missing = [x for x in numbers if not re.search(rf"(?<![\d.]){re.escape(x)}(?!\d)", printed)]
    assert len(numbers) >= 5 and not missing
    assert text.count("<details>") == text.count("</details>") == 5
