"""bench.py: the count of useful operations against torch's counter and the mask, and a whole small run."""
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import data
import model as model_module
from data import collate_fused, lay_out, pack, render_views
from jepa_loss import dense_mask, fused, total_loss


def test_flops_equal_torch_s_count(tiny, tokenizer, examples, monkeypatch):
    """One causal row: torch counts all T * T pairs of query and key, so we are told the same. (Norms, which
    we count as parameters, are no products: 1 %.)"""
    monkeypatch.setattr(model_module, "attend", model_module.attend_by_hand)
    model, views = tiny(0), render_views(examples[1], tokenizer, 0)
    T = len(views.main)
    with FlopCounterMode(display=False) as counter:
        losses = fused(model, collate_fused([views], [False]))
        total_loss(losses, losses.n_tokens, 1, 0.0).backward()
    ours = bench.flops(model, T, T * T, T - 1)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("keep", [True, False])
def test_work_of_an_example(tokenizer, examples, keep):
    """Tokens and visible pairs are those of the batch and of its mask, pads not counted."""
    for e in examples:
        views = render_views(e, tokenizer, 2)
        tree, batch = lay_out(views, keep), collate_fused([views], [keep], row_len=1)
        mask = dense_mask(batch.segment, batch.parent)
        assert bench.work(views, keep, "fused") == (len(tree.ids), int(mask.sum()), batch.n_tokens)
        rows = [len(views.main)] + ([len(views.stem) + 2, len(views.enc)] if keep else [])
        pairs = sum(int(torch.ones(n, n).tril().sum()) for n in rows)
        assert bench.work(views, keep, "three") == (sum(rows), pairs, batch.n_tokens)
    assert pack([3, 4], 1) == [[1], [0]]  # row_len=1: a row of its own for each


def test_a_small_bench(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data.generated_files, "__defaults__", (60, 10))
    pairs = [(f"lines with {i}", f"[0-9]{i}") for i in range(70)]
    monkeypatch.setattr(data.nlrx, "generate", lambda n, seed: pairs)
    monkeypatch.setattr("sys.argv", ["bench.py", "--data_dir", str(tmp_path), "--device", "cpu",
                                     "--blocks", "2", "--batch_size", "4", "--steps", "1",
                                     "--json", str(tmp_path / "b.json")])
    bench.main()
    assert "| fused, alpha 0.75 |" in capsys.readouterr().out
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["arms"].keys() == bench.ARMS.keys() and result["peak"]["float32"] > 1e9
    for arm in result["arms"].values():
        assert 0 < arm["slowest"] <= arm["examples_per_s"] <= arm["fastest"]
        assert 0 < arm["share_of_peak"] < 1.2 and 0 < arm["loader"] < 1
    fused_arm, plain = result["arms"]["fused"], result["arms"]["plain"]
    assert plain["time_to_plain"] == 1 and 1.2 < fused_arm["tokens_to_plain"] < 2
    assert result["generation"]["cached"] > result["generation"]["uncached"] > 0
