"""The pictures of small runs."""
import json
import sys

import pytest
from test_train import argv  # noqa: F401 (a fixture)

import eval
import train
from experiments.plots import curves
from support.files import BadInput


@pytest.fixture
def three_runs(argv, tmp_path):  # noqa: F811
    """Two seeds with JEPA and one run without, of width 32, with 70 test pairs."""
    test = tmp_path / "test.jsonl"
    rows = ({"text": f"number {i}", "code": f"{i}[a-z]"} for i in range(70))
    test.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [*argv[:2], "--test_file", str(test), *argv[4:], "--epochs", "3", "--log_every", "2"]
    folders = [str(tmp_path / name) for name in "abc"]
    for folder, flags in zip(folders, ([], ["--seed", "1"], ["--lam", "0"]), strict=True):
        train.train(train.parse_config([*argv, *flags, "--out", folder]))
    return folders


def test_embeddings_and_pictures_of_runs(three_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", *three_runs, "--embeddings", "--plot", str(tmp_path / "p")])
    capsys.readouterr()
    eval.main()
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]) == 5
    for folder in three_runs:
        found = json.loads(open(f"{folder}/embeddings.json").read())
        assert found["n"] == 70 and len(found["singular_values"]) == 32
    for name in ("learning_curves", "tsne", "singular_values"):
        content = (tmp_path / "p" / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000
    assert set(curves(three_runs[0])) == {"ntp", "jepa", "exact", "cos_paired", "cos_shuffled"}
    assert curves(three_runs[0])["exact"][:, 0].tolist() == [1, 2, 3]  # two looks and the score


def test_pictures_want_their_packages(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(BadInput, match="--plot needs .*: pip install -r requirements-plot.txt"):
        eval.show_embeddings([str(tmp_path / "run")], plot_to=str(tmp_path))  # before it looks at any run
