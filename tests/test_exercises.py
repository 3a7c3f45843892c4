"""docs/exercises.md does what it says: its solutions are pasted where it says into a copy of the project and
run there; what came out is what docs/exercises holds, the eval.json of each run with some of its losses."""
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from test_results import cells

import data
import train
from experiments import compare
from support.tables import shown

EXERCISES = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
PARTS = re.split(r"^## ", EXERCISES, flags=re.M)
KEPT = {path.stem: json.loads(path.read_text()) for path in (ROOT / "docs" / "exercises").glob("*.json")}
SHORT = ["--dim", "16", "--n_layers", "1", "--n_heads", "2", "--ffn_dim", "16", "--n_train", "64",
         "--n_test", "8", "--epochs", "1", "--max_new_tokens", "4", "--log_every", "1", "--device", "cpu"]


def blocks(number: int, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PARTS[number], re.DOTALL)


def commands() -> dict[str, list[str]]:
    """name -> the flags of the command that ends in `# name`, or of the loop of exercise 10."""
    short = dict(re.findall(r'^(\w+)="(.*)"$', EXERCISES, re.M))
    found = {name: line for line, name in re.findall(r"^python train\.py (.*?) +# (\w+)", EXERCISES, re.M)}
    for line in re.findall(r"^    python train\.py (.*)$", EXERCISES, re.M):
        for seed in re.search("for seed in ([0-9 ]+);", EXERCISES)[1].split():
            name = re.search(r"runs/(\w+)-\$seed", line)[1]
            found[name + f"-seed{seed}" * (seed != "82")] = line.replace("$seed", seed)
    return {name: re.sub(r"\$(\w+)", lambda word: short[word[1]], line).split()
            for name, line in found.items()}


def copy_of_the_project(folder) -> None:
    for name in ("support", "tasks"):
        shutil.copytree(ROOT / name, folder / name)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)


def train_there(folder, pairs, flags) -> list[dict]:
    """The lines of metrics.jsonl of a short run of the copy."""
    data = ["--dataset", str(pairs / "train.jsonl"), "--test_file", str(pairs / "test.jsonl")]
    reply = subprocess.run([sys.executable, "train.py", *data, *flags, *SHORT, "--out", "run"], cwd=folder,
                           capture_output=True, text=True)
    assert reply.returncode == 0, reply.stderr
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


# ---- solutions ---------------------------------------------------------------------------------------------

def test_what_a_view_costs(tmp_path, monkeypatch):
    """Exercise 1: the solution prints what stands below it, and the command draws its picture."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(blocks(1, "python")[0], {})
    assert out.getvalue() == blocks(1, "text")[0]
    (tmp_path / "a.jsonl").write_text('{"text": "lines with a number", "code": ".*[0-9].*"}\n' * 2)
    flags = blocks(1, "bash")[0].split()[4:-1]  # without the dataset: generating it takes a while
    monkeypatch.setattr(sys, "argv", ["data.py", "show", str(tmp_path / "a.jsonl"), *flags,
                                      str(tmp_path / "row.png")])
    data.main()
    assert (tmp_path / "row.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("number,name,term", [(2, "DISTANCES", "jepa"), (4, "REGULARISERS", "reg")])
def test_an_objective_takes_a_function_and_a_line(tmp_path, pairs, number, name, term):
    """Exercises 2 and 4."""
    snippet, = blocks(number, "python")
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 12
    copy_of_the_project(tmp_path)
    code = (tmp_path / "jepa_loss.py").read_text()
    below = re.search(rf"^{name} = .*\n", code, re.M).end()
    (tmp_path / "jepa_loss.py").write_text(code[:below] + "\n\n" + snippet + "\n" + code[below:])
    flags = blocks(number, "bash")[0].partition("#")[0].split()[3:]
    rows = train_there(tmp_path, pairs, flags)
    assert len(rows) == 2 and rows[0][term] > 0


def test_a_broken_mask_is_found(tmp_path, pairs):
    """Exercise 3: the run does not notice; the tests that it names fail, and no others."""
    copy_of_the_project(tmp_path)
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    code = (tmp_path / "jepa_loss.py").read_text()
    start, end = code.index("def visible("), code.index("def dense_mask(")
    (tmp_path / "jepa_loss.py").write_text(code[:start] + blocks(3, "python")[0] + "\n\n" + code[end:])
    assert train_there(tmp_path, pairs, [])[0]["jepa"] > 0
    command = blocks(3, "bash")[0].splitlines()[-1].split()[2:]
    reply = subprocess.run([sys.executable, "-m", *command[:1], "--tb=no", *command[1:]], cwd=tmp_path,
                           capture_output=True, text=True)
    failed = set(re.findall(r"^FAILED .*?::(\w+)", reply.stdout, re.M))
    assert failed == set(re.findall(r"`(test_\w+)`", PARTS[3].partition("**Guarded")[0]))


def test_a_dataset_of_one_s_own(tmp_path, monkeypatch):
    """Exercise 5: its script writes files that the command's run reads."""
    monkeypatch.chdir(tmp_path)
    exec(blocks(5, "python")[0], {})
    copy_of_the_project(tmp_path)
    rows = train_there(tmp_path, tmp_path, ["--dataset", "my.jsonl", "--test_file", "my_test.jsonl"])
    assert rows[0]["jepa"] > 0


def test_a_setting_is_a_line(tmp_path, pairs):
    """Exercise 6: the line, and its use; a margin of 2 leaves nothing of a cosine."""
    line, use = blocks(6, "python")
    copy_of_the_project(tmp_path)
    code = (tmp_path / "train.py").read_text()
    for before, snippet in (("    target: Literal", line), ('        if c.target == "stopgrad"', use)):
        assert code.count(before) == 1
        code = code.replace(before, snippet + before)
    (tmp_path / "train.py").write_text(code)
    assert train_there(tmp_path, pairs, ["--margin", "2"])[0]["jepa"] == 0


def test_a_literal_is_an_entry(tmp_path):
    """Exercise 9: how many pairs have it."""
    copy_of_the_project(tmp_path)
    path, at = tmp_path / "tasks" / "nlrx.py", '"a vowel": "[AEIOUaeiou]"'
    code = path.read_text()
    assert code.count(at) == 1
    path.write_text(code.replace(at, f"{blocks(9, 'python')[0].strip()} {at}"))
    count = "from tasks.nlrx import generate as g; print(sum('[02468]' in c for _, c in g(10_000)[:8_000]))"
    reply = subprocess.run([sys.executable, "-c", count], cwd=tmp_path, capture_output=True, text=True)
    assert f"{int(reply.stdout):,} pairs have it" in PARTS[9]


# ---- what came out -----------------------------------------------------------------------------------------

def test_every_run_is_that_of_its_command():
    """The settings that each committed eval.json names are the flags of the command, and no others."""
    found = commands()
    assert found.keys() == KEPT.keys()
    for name, words in found.items():
        config, given = KEPT[name]["config"], {}
        for word, value in zip(words, [*words[1:], "--"], strict=True):
            if word.startswith("--no-"):
                given[word[5:]] = "False"
            elif word.startswith("--"):
                given[word[2:]] = value
        given.pop("out", None)
        for key, value in given.items():
            number = type(config[key]) in (int, float)
            assert (config[key] == float(value) if number else str(config[key]) == value), (name, key)
        others = {key for key, value in config.items() if value != getattr(train.Config, key, 0)}
        assert others - {"k"} <= given.keys(), name  # k is 0 with --lam 0


def value_of(run: dict, column: str) -> str:
    """A score, or a loss as in "jepa, step 10"."""
    if column in run:
        return shown(column, run[column])
    term, step = column.split(", step ")
    return f"{run['losses'][step][term]:.4f}"


@pytest.mark.parametrize("number", range(11))
def test_tables(number):
    """Cell by cell; and each number with a decimal point in the text stands in a table or in a command."""
    tables = re.findall(r"((?:^\|.*\n)+)", PARTS[number], re.M)
    for head, *rows in map(cells, tables):
        if head[0] == "run":
            for name, *values in rows:
                assert values == [value_of(KEPT[name], column) for column in head[1:]], name
    rest = re.sub(r"^\|.*\n|```.*?```", "", PARTS[number], flags=re.M | re.S)
    known = "".join(tables) + "".join(re.findall(r"```.*?```", PARTS[number], re.S))
    for x in re.findall(r"(?<![\w.])[+-]?\d+\.\d+(?![\w.]*\d)", re.sub(r"PyTorch \S+|Python \S+", "", rest)):
        assert x in known, x
    wanted = ("Predict", "What came out here**", "Guarded by**")
    assert not number or all(f"**{words}" in PARTS[number] for words in wanted)


def test_the_comparison_of_seeds(tmp_path, monkeypatch, capsys):
    """Exercise 10: the table is what the command prints of the committed runs."""
    for name in KEPT:
        folder = tmp_path / "runs" / (name.replace("seed", "") if "-seed" in name else f"{name}-82")
        folder.mkdir(parents=True)
        shutil.copy(ROOT / "docs" / "exercises" / f"{name}.json", folder / "eval.json")
    monkeypatch.chdir(tmp_path)
    runs = [str(path.relative_to(tmp_path)) for name in ("plain", "infonce")
            for path in sorted((tmp_path / "runs").glob(f"{name}-*"))]
    assert len(runs) == 4 and "compare runs/plain-* runs/infonce-* --narrow" in PARTS[10]
    monkeypatch.setattr(sys, "argv", ["compare", *runs, "--narrow"])
    compare.main()
    table, = re.findall(r"((?:^\|.*\n)+)", PARTS[10], re.M)
    assert cells(table) == cells(capsys.readouterr().out.split("\n\n")[1])
