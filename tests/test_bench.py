"""experiments/bench.py: the FLOPs that it counts, against torch's counter and the mask; and a small run."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

import model as model_module
import train
from data import ViewOptions, collate_fused, collate_three, render_views
from experiments import bench
from jepa_loss import dense_mask, fused, total_loss
from support.files import BadInput
from support.lora import add_lora
from tasks import datasets


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_flops_equal_torch_s_count(tiny, tokenizer, examples, monkeypatch, lora_rank):
    """One causal row: torch counts all T * T pairs of query and key, so we are told the same. (Norms, which
    we count as parameters, are no products: 1 %; and with adapters the first block's input needs no
    gradient.)"""
    monkeypatch.setattr(model_module, "attend", model_module.attend_by_hand)
    model, views = tiny(0, n_layers=8), render_views(examples[1], tokenizer, ViewOptions(k=0))
    if lora_rank:
        add_lora(model, lora_rank, 0.0, 0)
        model.double()
    T = len(views.main)
    with FlopCounterMode(display=False) as counter:
        loss = total_loss(fused(model, collate_fused([views], [False])), {"ntp": T - 1}, {"ntp": 1.0})
        forward = counter.get_total_flops()
        loss.backward()
    ours = [model.flops(T, T * T, T - 1, backward=backward) for backward in (False, True)]
    assert ours == pytest.approx([forward, counter.get_total_flops()], rel=0.03 if lora_rank else 0.01)


@pytest.mark.parametrize("row_len", [0, 90])
def test_what_a_batch_counts(tokenizer, examples, row_len):
    """Real tokens and visible pairs are those of ids and mask without the pads, some views dropped."""
    views = [render_views(e, tokenizer, ViewOptions(k=2)) for e in examples]
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
    codes = [len(v.enc) for v, kept in zip(views, keep, strict=True) if kept]
    assert three.for_ema == (sum(codes), sum(n * (n + 1) // 2 for n in codes))
    assert batch.for_ema == (batch.n_real, batch.n_visible)
    assert collate_three(views, [False] * 5).for_ema == (0, 0)
    assert collate_fused(views, [False] * 5, row_len).for_ema == (0, 0)


def test_a_small_bench(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.generated_files, "__defaults__", (60, 10))
    pairs = [(f"lines with {i}", f"[0-9]{i}") for i in range(70)]
    monkeypatch.setattr(datasets.nlrx, "generate", lambda n, seed: pairs)
    monkeypatch.setattr(bench, "peak", lambda device, dtype: 1e12)
    monkeypatch.setattr("sys.argv", [
        "bench", "--data_dir", str(tmp_path), "--device", "cpu", "--blocks", "2", "--batch_size", "4",
         "--steps", "1", "--row_len", "64", "--json", str(tmp_path / "b.json")])
    bench.main()
    out = capsys.readouterr().out
    assert "| fused, alpha 0.75 |" in out
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["variants"].keys() == bench.VARIANTS.keys() and result["peak"]["float32"] == 1e12
    for variant in result["variants"].values():
        assert 0 < variant["slowest"] <= variant["examples_per_s"] <= variant["fastest"]
        assert 0 < variant["share_of_peak"] < 1 and 0 < variant["loader"] < 1
        assert variant["share_of_peak"] == variant["useful_flops"] / 1e12
    assert result["variants"]["plain"]["time_to_plain"] == 1
    assert 1.2 < result["variants"]["fused"]["tokens_to_plain"] < 2
    assert result["generation"]["cached"] > result["generation"]["uncached"] > 0


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shape", [dict(dim=128, n_layers=8, ffn_dim=384),
                                   dict(dim=256, n_layers=4, ffn_dim=704)])
def test_the_memory_formula(tokenizer, examples, shape, recompute):
    """One process, causal rows in float32: within 10 % of what PyTorch's tracker counts."""
    c = train.Config(lam=0.0, device="cpu")
    config = model_module.ModelConfig(tokenizer.vocab_size, n_heads=4, n_kv_heads=2, head_dim=32, **shape)
    model = model_module.Transformer(config)
    model.grad_checkpointing = recompute
    batch = collate_fused([render_views(e, tokenizer) for e in examples] * 5, [False] * 25)
    step, optimizer = train.Step(model, c, "float32"), train.make_optimizer(model, c)

    def run():
        total_loss(step(batch), {"ntp": 9}, {"ntp": 1.0}).backward()
        optimizer.step()
        optimizer.zero_grad()
    run()  # then the optimizer has its state
    wanted = bench.memory(config, 1, batch.ids.numel(), len(batch.label_at), 4, recompute)
    assert wanted["weights"] == model.n_params() and wanted["held"] == 16 * model.n_params()
    assert bench.peak_memory(step, optimizer, run) == pytest.approx(wanted["step"], rel=0.1)


@pytest.mark.slow
def test_ranks_against_one_process(tmp_path):
    """Each of two holds half; measured and by formula within 10 %."""
    flags = "--ranks 2 --dtype float32 --blocks 1 --steps 2 --device cpu".split()
    subprocess.run([sys.executable, "-m", "experiments.bench", *flags, "--data_dir", tmp_path, "--json",
                    tmp_path / "b.json"], cwd=ROOT, check=True)
    one, two = json.loads((tmp_path / "b.json").read_text()).values()
    assert two["held"] < 0.51 * one["held"] and two["peak"] < 0.6 * one["peak"]
    for x in (one, two):
        assert x["peak"] == pytest.approx(x["peak_by_formula"], rel=0.1) and x["examples_per_s"] > 0
        assert x["held"] == pytest.approx(x["held_by_formula"], rel=0.01)


def test_what_larger_models_need(capsys, monkeypatch):
    """By the formula; the numbers of parameters are those of the published models."""
    monkeypatch.setattr("sys.argv", ["bench", "--paper"])
    bench.main()
    out = capsys.readouterr().out
    assert "| 1,236 M " in out and "| 3,213 M " in out and "| 8,030 M " in out


def test_the_peak_is_a_rate():
    assert 1e8 < bench.peak(torch.device("cpu"), torch.float32, seconds=0.01) < 1e14


def test_wrong_options_are_named(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench", "--blocks", "0", "--row_len", "-1"])
    with pytest.raises(BadInput, match="--row_len -1: must be 0 or more; --blocks 0: must be 1 or more"):
        bench.main()
    monkeypatch.setattr("sys.argv", ["bench", "--paper", "--json", "x"])
    with pytest.raises(BadInput, match="--json has no effect with --paper"):
        bench.main()
