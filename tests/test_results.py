"""experiments/RESULTS.md and results/tables: every table is what the command above it prints from the
committed files; and run.sh makes the runs that are committed."""
import re
import shlex
import subprocess
from dataclasses import asdict
from glob import glob

import numpy as np
import pytest
from conftest import ROOT

import train
from experiments import compare
from experiments.compare import read_result, settings_of
from support.files import read_json
from support.tables import shown, table

HERE = ROOT / "experiments"
TEXTS = {path.stem: path.read_text(encoding="utf-8")
         for path in (HERE / "RESULTS.md", *sorted((HERE / "results" / "tables").glob("*.md")))}
RESULTS = TEXTS["RESULTS"]
TABLE = r"((?:\|[^\n]*\n)+)"
COMMAND = r"```bash\npython -m experiments\.compare ([^\n]*)\n```\n\n([^|\n]*)\n\n" + TABLE
TABLES = [(file, *found) for file, text in TEXTS.items() for found in re.findall(COMMAND, text)]
COMMITTED = sorted((HERE / "results").rglob("eval.json"))


def cells(markdown: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.strip().splitlines()]
    return [row for row in rows if set("".join(row)) != {"-"}]


def expand(arguments: str) -> list[str]:
    """As a shell does."""
    return [name for word in shlex.split(arguments) for name in sorted(glob(word)) or [word]]


@pytest.mark.parametrize("file,arguments,line,written", TABLES, ids=[f"{f} {a}" for f, a, *_ in TABLES])
def test_table(file, arguments, line, written, monkeypatch, capsys):
    """Cell by cell."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["compare", *expand(arguments)])
    compare.main()
    caption, printed = capsys.readouterr().out.split("\n\n")
    assert line == caption and cells(written) == cells(printed)


def test_the_table_for_a_paper(monkeypatch, capsys):
    """docs/CITING.md shows what its last command prints; with one seed, the caption claims no more."""
    command = r"```bash\npython -m experiments\.compare (\S+) --narrow --latex\n```\n\n```latex\n(.*?)\n```"
    (runs, shown), = re.findall(command, (ROOT / "docs" / "CITING.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(ROOT)

    def printed(pattern: str) -> str:
        monkeypatch.setattr("sys.argv", ["compare", *expand(pattern), "--narrow", "--latex"])
        compare.main()
        return capsys.readouterr().out.strip()
    assert printed(runs) == shown and "for other seeds and items" in shown and shown.count(r"\\") == 3
    assert not re.search(r"(?<!\\)[%_]|±", shown)
    assert "for other items." in printed("experiments/results/search_synth/[cm]*")


def test_every_result_is_in_a_table_and_every_table_in_full(monkeypatch):
    monkeypatch.chdir(ROOT)
    narrow = [arguments for file, arguments, *_ in TABLES if file == "RESULTS"]
    assert narrow and all(arguments.endswith(" --narrow") for arguments in narrow)
    assert sorted(a.removesuffix(" --narrow") for a in narrow) == sorted(
        arguments for file, arguments, *_ in TABLES if file != "RESULTS")
    shown = {name for arguments in narrow for name in expand(arguments)}
    assert {str(path.parent.relative_to(ROOT)) for path in COMMITTED} <= shown
    assert not any("/" in path.read_text(encoding="utf-8").replace("https://", "") for path in COMMITTED)


def test_the_table_of_answers():
    """Each difference stands in a table of the section that its question links, of as many seeds and items,
    and is called significant if its interval excludes 0."""
    sections = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-"): text for title, text in
                re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", RESULTS, re.DOTALL | re.MULTILINE)}
    answers = re.search(r"\n\n(\| question.*?)\n\n", RESULTS, re.DOTALL)[1]
    section, judged = "", 0
    for question, _, size, difference, verdict in cells(answers)[1:]:
        section = re.search(r"\(#([^)]*)\)", question)[1] if question else section
        wide = {found[0].removesuffix(" --narrow") for found in re.findall(COMMAND, sections[section])}
        sizes = {f"{row[1]} x {re.search('[0-9,]+(?= items)', line)[0]}"
                 for _, arguments, line, written in TABLES if arguments in wide
                 for row in cells(written) if difference in row}
        if difference != "-":
            low, high = map(float, re.search(r"\[(.*), (.*)\]", difference).groups())
            significant = "significant loss" if high < 0 else "significant gain" if low > 0 else None
            assert sizes == {size} and verdict == (significant or "not significant"), (question, difference)
            judged += 1
    assert judged == 34


def test_tables_of_embeddings():
    """From what the commands wrote, since they need the weights: each run, and means over seeds."""
    each = re.findall(r"python eval\.py ([^\n]*) --embeddings\n```\n\n" + TABLE, TEXTS["embeddings"])
    means = re.findall(r"(\| variant [^\n]*linear_error(?:[^\n]*\n)+?)\n", RESULTS)
    assert len(each) == 2
    for (patterns, written), of_variants in zip(each, means, strict=True):
        variants = []
        for pattern in patterns.split():
            folders = sorted(HERE.glob(pattern.removeprefix("runs/")))
            variants.append({f"runs/{path.relative_to(HERE)}": read_json(path / "embeddings.json")
                             for path in folders})
        assert cells(written) == cells(table({name: run for runs in variants for name, run in runs.items()}))
        head, *rows = cells(of_variants)
        for (_, *row), runs in zip(rows, variants, strict=True):
            values = {column: [run[column] for run in runs.values()] for column in head[1:]}
            assert row == [f"{shown(column, np.mean(x))} ± {shown(column, np.std(x, ddof=1))}"
                           for column, x in values.items()]


def test_readme_has_the_same_numbers():
    """Every difference with its interval, and the means beside it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = "\n".join(line for line in readme.splitlines() if re.search(r"[+-][\d.]+ \[", line))
    numbers = re.findall(r"[\d.]+ ± [\d.]+|[+-][\d.]+ \[[^]]*\]", lines)
    assert len(numbers) >= 9 and all(number in RESULTS for number in numbers)


def test_run_sh_makes_the_committed_runs():
    """Its flags are today's, and mean what older versions stored (in place of --view2 a file of its own)."""
    command = ["bash", str(HERE / "run.sh"), "data", "list"]
    reply = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [re.sub(r"\$\(flops [^)]*\)", "1e13", line).split() for line in reply.stdout.splitlines()]
    assert {str(path.parent.relative_to(HERE / "results")) for path in COMMITTED} <= {
        f"{section}/{name}" for section, name, *_ in lines}
    for section, name, *flags in lines:
        if not (HERE / "results" / section / name / "eval.json").exists():
            continue  # a run that is still to be made
        committed = read_result(HERE / "results" / section / name)
        config = asdict(train.parse_config([*flags, "--out", "x"]))
        ours, theirs = settings_of(committed | {"config": config}), settings_of(committed)
        if section == "equal":
            assert ours.pop("max_flops") == 1e13 and theirs.pop("max_flops") == "matched"
        if name.startswith("view2"):
            assert theirs.pop("view2") == "synth_train.jsonl"
            assert ours.pop("view2") == ours.pop("scorer") == ""  # a file of one's own may have one
        assert ours == theirs, (section, name)
