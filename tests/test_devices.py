"""What CUDA would do, without a GPU: steps on the `meta` device, which holds no values, and FlexAttention
with its backward, traced as by torch.compile and run in its written-out form."""
import contextlib
import copy

import pytest
import torch
import torch.nn.attention.flex_attention as flex_attention
from torch import nn

import train
from data import ViewOptions, collate_fused, micro_batches, render_views
from jepa_loss import DISTANCES, dense_mask, flex_mask, fused, total_loss
from support.lora import add_lora
from support.speed import Sampler, largest_shape


def step_on_meta(flags: str, tokenizer, examples) -> dict:
    """Forward, backward, clipping, optimizer and moving average of one step; returns the terms."""
    c = train.parse_config([*flags.split(), "--device", "cpu", "--n_layers", "2", "--dtype", "float32"])
    views = [render_views(e, tokenizer, c) for e in examples]
    sampler = Sampler([len(v.main) for v in views], len(views), c.seed)
    model = train.Transformer(train.model_config(c, tokenizer.vocab_size), c.k, c.seed)
    model.add_predictor(c.predictor, 0) if c.predictor != "tokens" else None
    add_lora(model, 4, 0.1, 0) if "ema" in flags else None
    model.embed_layer, model.grad_checkpointing = c.layer, c.grad_checkpointing
    model.to("meta")
    ema = copy.deepcopy(model).requires_grad_(False) if c.target == "ema" else None
    optimizer, step = train.make_optimizer(model, c), train.Step(model, c, "float32", ema)
    for group in optimizer.param_groups:
        group.update(fused=False, foreach=True)  # meta lacks the fused kernel
    shape = largest_shape(lambda step: micro_batches(c, views.__getitem__, sampler, step), 1)
    batches = micro_batches(c, views.__getitem__, sampler, 0, shape if c.fixed_shapes else None)
    counts, _, _ = train.count_step(c, model, batches)
    means = train.backward(step, batches, counts, train.weights_of_terms(c), torch.device("meta"))
    nn.utils.clip_grad_norm_(train.trainable(model).values(), c.clip)
    optimizer.step()
    train.update_average(ema, model, c.ema_decay)
    assert all(weight.grad.is_meta for weight in train.trainable(model).values())
    return means


@pytest.fixture
def no_autocast(monkeypatch):
    """It refuses meta."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.mark.parametrize("flags,terms", [
    ("", "ntp jepa"), ("--passes three", "ntp jepa"), ("--lam 0", "ntp"),
    ("--lam 0 --row_len 90 --stp 1", "ntp stp"), ("--row_len 90 --alpha 0.5 --fixed_shapes", "ntp jepa"),
    ("--pool mean --target ema --predictor mlp", "ntp jepa"),
    ("--reg_weight 1 --reg sigreg --stp 1 --stp_form released", "ntp stp jepa reg"),
    ("--reg_weight 1 --distance infonce --passes three", "ntp jepa reg"),
    ("--layer 0 --target stopgrad --distance l2 --micro_batch 2 --alpha 0.5", "ntp jepa"),
    ("--grad_checkpointing --distance mse --predictor linear", "ntp jepa")])
def test_a_step_on_meta(no_autocast, tokenizer, examples, flags, terms):
    """Every kind of batch, with every term: no tensor is made on another device, and none is read back."""
    means = step_on_meta(flags, tokenizer, examples)
    assert means.keys() == set(terms.split()) and all(mean.is_meta for mean in means.values())


@pytest.mark.parametrize("wrong", [lambda pred, enc: (pred - enc).sum(-1) * float(pred.sum()),
                                   lambda pred, enc: (pred - enc).sum(-1) * torch.ones(len(pred))])
def test_meta_finds_what_would_stop_or_break_cuda(no_autocast, tokenizer, examples, monkeypatch, wrong):
    """A distance that reads a value back, and one with a tensor on the CPU."""
    monkeypatch.setitem(DISTANCES, "mse", wrong)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        step_on_meta("--distance mse", tokenizer, examples)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.xdist_group("compile"))])
@pytest.mark.parametrize("row_len", [0, 90])
def test_flex_attention_equals_the_dense_mask(tiny, tokenizer, examples, monkeypatch, row_len, compiled):
    """Losses and gradients, packed or not. PyTorch 2.13 refuses FlexAttention's backward on a CPU, where it
    has the written-out form but no fast kernel; so the refusal is taken away. compiled: torch.compile traces
    the forward and the backward into one graph each, without a break. For CUDA it would then write Triton
    kernels, which needs CUDA."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    model, results = tiny(2), []
    views = [render_views(e, tokenizer, ViewOptions(2)) for e in examples]
    batch = collate_fused(views, [True, False, True, False, True], row_len)
    for masking in (dense_mask, flex_mask):
        def step(batch, masking=masking):
            return fused(model, batch, masking=masking)
        if compiled and masking is flex_mask:
            step = torch.compile(step, backend="aot_eager", fullgraph=True)
        model.zero_grad()
        terms = step(batch)
        total_loss(terms, {"ntp": 9, "jepa": 3}, {"ntp": 1.0, "jepa": 1.0}).backward()
        results.append([*(sum_ for sum_, _ in terms.values()), *(w.grad.clone() for w in model.parameters())])
    for dense, flex in zip(*results, strict=True):
        torch.testing.assert_close(flex, dense, atol=1e-10, rtol=1e-10)
