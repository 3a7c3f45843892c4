"""experiments/RESULTS.md: every table is what the command above it prints from the committed files."""
import json
import re
import shlex
from glob import glob

import pytest
from conftest import ROOT

from experiments.compare import caption, compare, comparison, read_result, table

RESULTS = (ROOT / "experiments/RESULTS.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND, TABLE = r"```bash\npython eval\.py ", r"((?:\|[^\n]*\n)+)"
TABLES = re.findall(COMMAND + r"(results[^\n]*)\n```\n\n([^|\n]*)\n\n" + TABLE, RESULTS)


def cells(markdown: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.strip().splitlines()]
    return [row for row in rows if set("".join(row)) != {"-"}]


@pytest.mark.parametrize("arguments,line,shown", TABLES, ids=[arguments for arguments, *_ in TABLES])
def test_table(arguments, line, shown, monkeypatch):
    """Cell by cell."""
    monkeypatch.chdir(ROOT / "experiments")
    patterns, _, against = arguments.partition(" --against ")
    folders = sorted(folder for pattern in shlex.split(patterns) for folder in glob(pattern))
    assert folders
    results = {folder: read_result(folder) for folder in folders}
    rows = compare(results, against)
    assert line == caption(results, rows, against)
    assert cells(shown) == cells(comparison(rows, "baseline" if against else "plain"))


def test_table_of_embeddings():
    """From what the command wrote: without the weights, it cannot be run again."""
    (patterns, shown), = re.findall(COMMAND + r"(runs[^\n]*) --embeddings[^\n]*\n```\n\n" + TABLE, RESULTS)
    kept = [path for pattern in patterns.split()
            for path in sorted((ROOT / "experiments").glob(pattern.removeprefix("runs/")))]
    found = {f"runs/results/{path.parent.name}/{path.name}":
             json.loads((path / "embeddings.json").read_text(encoding="utf-8")) for path in kept}
    assert cells(shown) == cells(table(found))


def test_readme_has_the_same_numbers():
    """Every mean with its deviation, and every difference with its interval, under "Does it help?"."""
    section = README[README.index("## Does it help?"):README.index("## Real checkpoints")]
    numbers = re.findall(r"[\d.]+ ± [\d.]+|[+-][\d.]+ \[[^]]*\]", section)
    assert len(numbers) >= 6 and all(number in RESULTS for number in numbers)


def test_there_are_tables_and_every_result_is_in_one():
    assert TABLES
    shown = {folder for arguments, *_ in TABLES for pattern in shlex.split(arguments.partition(" --")[0])
             for folder in glob(str(ROOT / "experiments" / pattern))}
    kept = {str(path.parent) for path in (ROOT / "experiments" / "results").rglob("eval.json")}
    assert kept <= shown, kept - shown
    assert not any("/" in path.read_text(encoding="utf-8").replace("https://", "") for path in
                   (ROOT / "experiments" / "results").rglob("eval.json"))  # no place of a machine
