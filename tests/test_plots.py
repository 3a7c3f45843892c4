"""experiments/plots.py: the pictures of small runs, one of them of an older version."""
import json
import re
import shutil
import sys

import pytest
from conftest import ROOT

import train
from experiments import plots
from support.files import BadInput


@pytest.fixture(scope="module")
def runs(pairs, tmp_path_factory):
    """Two seeds with JEPA and one plain run, which looks as versions before max_flops and stp wrote them."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in (("a", []), ("b", ["--seed", "1"]), ("c", ["--lam", "0"])):
        train.train(train.parse_config([
            "--dataset", str(pairs / "train.jsonl"), "--test_file", str(pairs / "test.jsonl"), "--dim", "16",
            "--n_layers", "1", "--n_heads", "2", "--ffn_dim", "16", "--vocab_size", "260", "--epochs", "3",
            "--log_every", "2", "--max_new_tokens", "4", "--device", "cpu", "--out", str(folder / name),
            *flags]))
    for path in (folder / "c" / "run.json", folder / "c" / "eval.json"):
        stored = json.loads(path.read_text())
        stored["config"] |= {"view2": "", "match_flops": "", "objective": "jepa"}
        del stored["config"]["max_flops"], stored["config"]["stp"]
        path.write_text(json.dumps(stored | {"version": 1, "budget": None}))
    metrics = folder / "c" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows = [row | ({"jepa": 0.0} if "ntp" in row else {}) for row in rows]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(folder / name) for name in "abc"]


def test_pictures_of_runs(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plots", *runs, "--out", str(tmp_path / "p")])
    plots.main()
    for name in ("learning_curves", "tsne", "singular_values"):
        content = (tmp_path / "p" / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000


def test_pictures_of_the_committed_results(tmp_path, monkeypatch, capsys):
    """Also of a section of runs without weights, which keeps their scores on the way."""
    here = tmp_path / "experiments"
    shutil.copytree(ROOT / "experiments" / "results", here / "results", ignore=lambda *_: ["pictures"])
    shutil.copy(ROOT / "experiments" / "RESULTS.md", here)
    monkeypatch.setattr(plots, "HERE", here)
    monkeypatch.setattr(sys, "argv", ["plots"])
    plots.main()
    made = sorted((here / "results" / "pictures").iterdir())
    assert [path.name for path in made] == ["differences.png", "five_questions.png", "habit.png",
                                            "overfit_turk.png", "singular_values.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
    assert {path.name for path in made} <= {
        path.name for path in (ROOT / "experiments" / "results" / "pictures").iterdir()}
    looks = plots.curves(here / "results" / "habit" / "jepa-train_eos-82")  # the last one is eval.json's
    assert looks["exact"][[0, -1], 0].tolist() == [0.2, 2] and len(looks["p_end"]) == 10


def test_the_forest_has_every_row_with_an_interval():
    rows = plots.answers()
    assert ("SYNTH: does JEPA help?", "lam 1, k 1 - plain", 0.45, -0.5, 1.4) in rows
    results = (ROOT / "experiments" / "RESULTS.md").read_text().split("\n## ")[0]
    assert len(rows) == len(re.findall(r"\d \[[+-]", results)) and all(row[0] for row in rows)


def test_curves(runs):
    """The terms of every second step and of each epoch's last; the scores of two epochs, and of the end."""
    jepa, plain = plots.curves(runs[0]), plots.curves(runs[2])
    assert set(jepa) == {"ntp", "jepa", "exact", "prefix", "p_end", "cos_paired", "cos_shuffled"}
    assert set(jepa) - set(plain) == {"jepa"}  # a term that it went without
    assert jepa["exact"][:, 0].tolist() == [1, 2, 3] and jepa["ntp"][-1, 0] == 3
    assert jepa["ntp"].shape == jepa["jepa"].shape == (6, 2)
    end = json.loads(open(f"{runs[0]}/eval.json").read())
    assert jepa["cos_paired"][-1, 1] == end["cos_paired"]


@pytest.mark.parametrize("content", ["", '{"step": 1, "ntp": 2.0}\n'])
def test_curves_of_a_damaged_run(runs, tmp_path, content):
    shutil.copytree(runs[0], tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text(content)
    with pytest.raises(BadInput, match="metrics.jsonl: damaged; no line, or one without its epoch"):
        plots.curves(tmp_path / "run")


def test_pictures_want_their_packages(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr(sys, "argv", ["plots", str(tmp_path / "run")])
    with pytest.raises(BadInput, match="a picture needs .*: pip install -r requirements-lesson.txt"):
        plots.main()  # before it looks at any run
