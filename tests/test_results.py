"""RESULTS.md: every table is what the command above it prints from the committed eval.json files."""
import re
import shlex
from glob import glob

import pytest
from conftest import ROOT

from report import compare, comparison, read_result

RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
TABLES = re.findall(r"```bash\npython eval\.py ([^\n]*)\n```\n\n((?:\|[^\n]*\n)+)", RESULTS)


def cells(markdown: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.strip().splitlines()]
    return [row for row in rows if set("".join(row)) != {"-"}]


@pytest.mark.parametrize("arguments,table", TABLES, ids=[arguments for arguments, _ in TABLES])
def test_table(arguments, table, monkeypatch):
    """Cell by cell."""
    monkeypatch.chdir(ROOT)
    patterns, _, against = arguments.partition(" --against ")
    folders = sorted(folder for pattern in shlex.split(patterns) for folder in glob(pattern))
    assert folders
    rows = compare({folder: read_result(folder) for folder in folders}, against)
    assert cells(table) == cells(comparison(rows, "baseline" if against else "plain"))


def test_there_are_tables_and_every_result_is_in_one():
    assert TABLES
    shown = {folder for arguments, _ in TABLES for pattern in shlex.split(arguments.partition(" --")[0])
             for folder in glob(str(ROOT / pattern))}
    kept = {str(path.parent) for path in (ROOT / "results").rglob("eval.json")}
    assert kept <= shown, kept - shown
    assert not any("/" in path.read_text(encoding="utf-8").replace("https://", "") for path in
                   (ROOT / "results").rglob("eval.json"))  # no place of a machine
