"""embeddings.py: numbers whose answer is known, and the pictures of small runs."""
import json
import sys

import pytest
import torch
from test_train import argv  # noqa: F401 (a fixture)

import eval
import train
from experiments.plots import analyse, curves, linear_map_error
from support.files import BadInput


def test_error_of_a_linear_map():
    """Nothing for an affine function, little more than the noise's share with noise, 1 and more for
    strangers."""
    g = torch.Generator().manual_seed(0)
    x, matrix = torch.randn(2000, 16, generator=g), torch.randn(16, 16, generator=g)
    y = x @ matrix + 5
    assert linear_map_error(x, y) < 1e-9
    noise = torch.randn(2000, 16, generator=g) * y.std(0)
    assert linear_map_error(x, y + noise) == pytest.approx(0.5, abs=0.03)
    assert 1 < linear_map_error(x, y.roll(-1, 0)) < 1.1
    collapsed = x[:1] + 1e-3 * x[:, :2] @ torch.randn(2, 16, generator=g)  # two directions are left
    assert linear_map_error(collapsed, y) == pytest.approx(14 / 16, abs=0.15)


def test_analysis_of_a_constant_shift():
    """Enc(Code) = Enc(Text) + c: one singular value, rank 1, a perfect linear map."""
    g = torch.Generator().manual_seed(0)
    text = torch.randn(100, 8, generator=g)
    found = analyse(text, text, text + 2, [str(i) for i in range(100)])
    assert found["singular_values"][0] == pytest.approx(2 * (100 * 8) ** 0.5, rel=1e-5)
    assert found["singular_values"][1] < 1e-4 and found["rank_difference"] == pytest.approx(1, abs=1e-3)
    assert found["linear_error"] < 1e-9 and found["linear_error_shuffled"] > 0.9
    assert found["spread_text"] == pytest.approx(found["spread_enc"]) == pytest.approx(8**0.5, rel=0.1)
    few = analyse(text[:18], text[:18], text[:18] + 2, ["x"] * 18)  # to fit a map of width 8
    assert few["linear_error"] is few["linear_error_shuffled"] is None and few["rank_difference"] < 1.01


def test_centred_columns_see_through_a_constant():
    """A large vector that all share hides rank, cosine and neighbours from the plain columns alone."""
    g = torch.Generator().manual_seed(0)
    x, shared = torch.randn(100, 8, generator=g), torch.full((8,), 1e4)
    found = analyse(x, x + shared, x + shared, [str(i) for i in range(100)])
    assert found["rank_enc"] < 1.01 and found["rank_enc_centred"] > 7.5 and found["rank_text"] > 7.5
    assert found["cos_shuffled"] > 0.999 and abs(found["cos_shuffled_centred"]) < 0.2
    assert found["cos_paired_centred"] == pytest.approx(1, abs=1e-3) and found["retrieval_at_1_centred"] == 1


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
