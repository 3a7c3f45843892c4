"""bench.py: the count of useful operations against torch's counter and the mask, and a whole small run."""
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments import bench
import data
import model as model_module
from batches import collate_fused, collate_three
from data import render_views
from jepa_loss import dense_mask, fused, total_loss
from support.lora import add_lora


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_flops_equal_torch_s_count(tiny, tokenizer, examples, monkeypatch, lora_rank):
    """One causal row: torch counts all T * T pairs of query and key, so we are told the same. (Norms, which
    we count as parameters, are no products: 1 %; and with adapters the first block's input needs no
    gradient.)"""
    monkeypatch.setattr(model_module, "attend", model_module.attend_by_hand)
    model, views = tiny(0, n_layers=8), render_views(examples[1], tokenizer, 0)
    if lora_rank:
        add_lora(model, lora_rank, 0.0, seed=0)
        model.double()
    T = len(views.main)
    with FlopCounterMode(display=False) as counter:
        losses = fused(model, collate_fused([views], [False]))
        total_loss(losses, losses.n_tokens, 1, 0.0).backward()
    ours = model.flops(T, T * T, T - 1)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.03 if lora_rank else 0.01)


@pytest.mark.parametrize("row_len", [0, 90])
def test_what_a_batch_counts(tokenizer, examples, row_len):
    """Real tokens and visible pairs are those of ids and mask without the pads, some views dropped."""
    views = [render_views(e, tokenizer, 2) for e in examples]
    keep = [True, False, True, True, False]
    batch, one_each = collate_fused(views, keep, row_len), [
        collate_fused([v], [kept], row_len=1) for v, kept in zip(views, keep, strict=True)]  # no pads
    assert batch.n_real == sum(b.ids.numel() for b in one_each) < batch.ids.numel()
    assert batch.n_visible == sum(int(dense_mask(b.segment, b.parent).sum()) for b in one_each)
    three = collate_three(views, keep)
    rows = [len(v.main) for v in views] + [n for v, kept in zip(views, keep, strict=True) if kept
                                           for n in (len(v.stem) + 2, len(v.enc))]
    assert three.n_real == sum(rows)
    assert three.n_visible == sum(int(torch.ones(n, n).tril().sum()) for n in rows)


def test_a_small_bench(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data.generated_files, "__defaults__", (60, 10))
    pairs = [(f"lines with {i}", f"[0-9]{i}") for i in range(70)]
    monkeypatch.setattr(data.nlrx, "generate", lambda n, seed: pairs)
    monkeypatch.setattr("sys.argv", ["bench.py", "--data_dir", str(tmp_path), "--device", "cpu",
                                     "--blocks", "2", "--profile", "--batch_size", "4", "--steps", "1",
                                     "--json", str(tmp_path / "b.json")])
    bench.main()
    out = capsys.readouterr().out
    assert "| fused, alpha 0.75 |" in out and "\ntime of the fused arm: " in out
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["arms"].keys() == bench.ARMS.keys() and result["peak"]["float32"] > 1e9
    for arm in result["arms"].values():
        assert 0 < arm["slowest"] <= arm["examples_per_s"] <= arm["fastest"]
        assert 0 < arm["share_of_peak"] < 1.2 and 0 < arm["loader"] < 1
    shares = list(result["profile"].values())
    assert len(shares) == 12 and 0.3 < sum(shares) <= 1 and shares == sorted(shares, reverse=True)
    assert "aten::mm" in result["profile"]
    fused_arm, plain = result["arms"]["fused"], result["arms"]["plain"]
    assert plain["time_to_plain"] == 1 and 1.2 < fused_arm["tokens_to_plain"] < 2
    assert result["generation"]["cached"] > result["generation"]["uncached"] > 0
