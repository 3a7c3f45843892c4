"""train.py: the loop against a plain one, stop and go, and everything that a user can get wrong."""
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from functools import partial

import forks
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import eval
import train
from data import Sampler, collate_fused, render_views
from jepa_loss import fused, total_loss
from model import ModelConfig, Transformer
from support import runs, speed
from support.files import BadInput
from support.settings import in_group
from support.tokenizer import Tokenizer, train_bpe
from tasks.datasets import load_dataset


def tiny_run(pairs, out) -> list[str]:
    """The command of a run of 20 steps, two epochs."""
    return ["--dataset", str(pairs / "train.jsonl"), "--test_file", str(pairs / "test.jsonl"),
            "--out", str(out), "--device", "cpu", "--dim", "32", "--n_layers", "2", "--n_heads", "2",
            "--ffn_dim", "48", "--vocab_size", "300", "--batch_size", "8", "--epochs", "2",
            "--log_every", "1", "--max_new_tokens", "8"]


@pytest.fixture
def argv(pairs, tmp_path):
    return tiny_run(pairs, tmp_path / "run")


def go(argv, *more) -> dict:
    """A run in this process."""
    return train.train(train.parse_config([*argv, *map(str, more)]))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder):
    return [row for row in rows_of(folder) if "loss" in row]


def metrics(folder):
    """Without timings."""
    rows = [row | row.pop("look", {}) for row in rows_of(folder)]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in rows]


def weights(folder):
    return runs.load_state(folder, torch.device("cpu"))["model"]


def assert_equal_runs(a, b, tolerance=0.0):
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        difference = (weight - theirs[name]).abs().max().item()
        assert difference <= tolerance, (name, difference)


def untimed(result):
    """An eval.json without its timings."""
    return {**result, "seconds": 0, "trained": {**result["trained"], "seconds": 0}}


def die_at_step(at, argv):
    """Start a run that is interrupted before its step number `at` (from 0)."""
    step_seed = train.step_seed

    def dies(seed, step):
        if step == at:
            raise KeyboardInterrupt
        return step_seed(seed, step)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "step_seed", dies)
        go(argv)


def parts(c, tokenizer=None):
    """What `fit` makes batches of: tokenizer, sampler, and step -> batches."""
    data = load_dataset(c.dataset, c.data_dir, c.test_file)
    tokenizer = tokenizer or train.own_tokenizer(data.train, c.vocab_size)
    sampler = Sampler(train.fit_splits(data, tokenizer, 512, c.on_long, c), c.batch_size, c.seed)
    views = [render_views(e, tokenizer, c) for e in data.train]
    return tokenizer, sampler, partial(train.micro_batches, c, views.__getitem__, sampler)


# ---- whole runs --------------------------------------------------------------------------------------------

def test_a_whole_run(argv, tmp_path):
    """Train, score, start again, answer a prompt: as a user does."""
    reply = subprocess.run([sys.executable, ROOT / "train.py", *argv], capture_output=True, text=True)
    assert reply.returncode == 0, reply.stderr
    assert "\ndata: file\n" in reply.stdout and reply.stdout.count("\ntarget ") == 5
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        "run.json", "metrics.jsonl", "state.pt", "config.json", "model.safetensors",
        "pred_embedding.safetensors", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json", "eval.json"}
    rows = steps_of(run)
    assert [row["step"] for row in rows] == list(range(1, 21)) and rows[-1]["examples"] == 160
    assert rows[-1]["ntp"] < rows[0]["ntp"] and rows[0]["jepa"] > 0.05
    assert all(row["loss"] == pytest.approx(row["ntp"] + row["jepa"]) for row in rows)
    looks = [row for row in rows_of(run) if "look" in row]
    assert [row["epoch"] for row in looks] == [1] and looks[0]["look"]["n"] == 12
    result = json.loads((run / "eval.json").read_text())
    assert result["n"] == 12 and result["source"] == "file" and result["trained"]["step"] == 20

    before = (run / "state.pt").stat().st_mtime_ns
    again = forks.run("train", argv)
    assert again.returncode == 0 and "finished before" in again.stdout and "exact" in again.stdout
    assert (run / "state.pt").stat().st_mtime_ns == before
    (run / "eval.json").write_text(json.dumps({**result, "exact": -1}))
    scored = forks.run("eval", [run])
    assert scored.returncode == 0, scored.stderr
    assert untimed(json.loads((run / "eval.json").read_text())) == untimed(result)
    answer = subprocess.run([sys.executable, ROOT / "eval.py", run, "--prompt", "the number 3",
                             "--max_new_tokens", "4"], capture_output=True, text=True)
    assert answer.returncode == 0 and answer.stdout.strip()
    other = forks.run("train", [*argv, "--lr", "1e-4"])
    assert other.returncode == 2
    assert other.stderr.startswith(f"error: {run} holds a run with --lr {train.Config.lr} (now 0.0001)")


def test_every_variant_sees_the_same_examples(argv, tmp_path):
    """lam, passes, alpha, packing and micro-batches leave the examples of a step alone. Three passes, one,
    and packed rows end with the same weights (float64), with loss dropout."""
    variants = {"plain": ["--lam", "0"], "three": ["--passes", "three"], "fused": [],
                "packed": ["--row_len", "150"], "micro": ["--micro_batch", "3"]}
    counts = []
    for name, flags in variants.items():
        flags = flags if name == "plain" else [*flags, "--alpha", "0.3"]
        result = go(argv, *flags, "--dtype", "float64", "--out", tmp_path / name)
        assert 0 <= result["exact"] <= 1
        counts.append([(row["step"], row["examples"], row["tokens"]) for row in steps_of(tmp_path / name)])
        if name not in ("plain", "three"):
            assert_equal_runs(tmp_path / "three", tmp_path / name, 1e-9)
    assert len(counts[0]) == 20 and all(count == counts[0] for count in counts)


@pytest.mark.parametrize("flags", ["--lam 0", "--alpha 0.5 --k 2 --stp 0.5",
                                   "--target ema --predictor mlp --pool mean --lam_warmup 0.5"])
def test_micro_batches_equal_the_big_batch(argv, tmp_path, flags):
    """Float64: terms and gradient of every step and the weights at the end, to 1e-9; also where a run goes on
    with another --micro_batch. The official code divides one variant's gradient by the number of
    micro-batches and not the other's."""
    argv = [*argv, *flags.split(), "--dtype", "float64", "--batch_size", "20", "--epochs", "4",
            "--checkpoint_every", "6"]
    go(argv, "--out", tmp_path / "whole")
    go(argv, "--micro_batch", 6, "--out", tmp_path / "small")
    die_at_step(8, argv)
    go(argv, "--micro_batch", 7)
    rows, terms = steps_of(tmp_path / "whole"), ("ntp", "jepa", "stp", "loss", "grad_norm")
    assert len(rows) == 16
    for name in ("small", "run"):
        assert_equal_runs(tmp_path / "whole", tmp_path / name, 1e-9)
        for ours, theirs in zip(rows, steps_of(tmp_path / name), strict=True):
            for term in set(terms) & ours.keys():
                assert ours[term] == pytest.approx(theirs[term], abs=1e-9), term


def test_lam_0_is_plain_training_bit_for_bit(argv, tmp_path):
    """Against the loop that anyone would write: pad, causal forward, cross-entropy, AdamW."""
    c = train.parse_config([*argv, "--lam", "0", "--dtype", "float32"])
    train.train(c)
    data = load_dataset(c.dataset, c.data_dir, c.test_file)
    tokenizer = Tokenizer(train_bpe([text for e in data.train for text in (e.text, e.code)], 300))
    begin, sep, end = range(len(tokenizer.ranks), len(tokenizer.ranks) + 3)
    rows = [[begin, *tokenizer.encode(e.text), sep, *tokenizer.encode(e.code), end] for e in data.train]
    model = Transformer(train.model_config(c, tokenizer.vocab_size), seed=c.seed)
    optimizer = torch.optim.AdamW([{"params": [w for w in model.parameters() if w.dim() > 1],
                                    "weight_decay": 0.1},
                                   {"params": [w for w in model.parameters() if w.dim() == 1],
                                    "weight_decay": 0.0}],
                                  betas=(0.9, 0.95), fused=True)
    sampler = Sampler([len(row) for row in rows], 8, c.seed)
    for step in range(20):
        batch = [rows[i] for i in sampler.indices(step)]
        width = max(map(len, batch))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch])
        targets = torch.cat([torch.tensor(row[1:]) for row in batch])
        real = torch.tensor([[j + 1 < len(row) for j in range(width)] for row in batch])
        loss = F.cross_entropy(model.head(model(ids)[real]), targets, reduction="sum") / len(targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:  # warm-up of one step of 20, then half a cosine
            group["lr"] = 1e-3 * (1 if step == 0 else 0.5 * (1 + math.cos(math.pi * ((step - 1) / 19))))
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in weights(tmp_path / "run").items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_gamma_weighs_the_next_token_loss(argv, tmp_path):
    """In the loss that is logged and in the gradient that is taken."""
    rows = []
    for gamma in (0, 1, 2):
        go(argv, "--gamma", gamma, "--max_steps", 1, "--out", tmp_path / str(gamma))
        rows += rows_of(tmp_path / str(gamma))[:1]
    assert [row["loss"] for row in rows] == pytest.approx(
        [rows[1]["jepa"] + gamma * rows[1]["ntp"] for gamma in (0, 1, 2)], rel=1e-5)
    assert rows[0]["grad_norm"] < rows[1]["grad_norm"] < rows[2]["grad_norm"]


@pytest.mark.parametrize("faster,native,expected", [
    (torch.bfloat16, True, "bfloat16"), (torch.float32, True, "float32"), (torch.bfloat16, False, "float32")])
def test_the_number_type_is_the_faster_one(monkeypatch, faster, native, expected):
    """Some Xeons have bfloat16 products, at half the speed of float32: auto took them, and twice the time."""
    assert 0 < speed.product_seconds(torch.float32) < 1
    monkeypatch.setattr(speed, "product_seconds", lambda dtype: 1 + (dtype != faster))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    assert speed.forward_dtype("auto", torch.device("cpu")) == expected
    assert speed.forward_dtype("bfloat16", torch.device("cpu")) == "bfloat16"


def test_two_threads_give_the_same_bits_twice(tokenizer, examples):
    """Resume is exact because steps are: the backward of an indexed read `w[i]` with repeated i is not, on
    several threads."""
    model = Transformer(ModelConfig(tokenizer.vocab_size, dim=64, n_layers=1, n_heads=2, n_kv_heads=2,
                                    head_dim=32, ffn_dim=64), k=1)
    batch = collate_fused([render_views(e, tokenizer) for e in examples] * 20, [True] * 100)
    threads, gradients = torch.get_num_threads(), []
    torch.set_num_threads(2)
    for _ in range(6):
        model.zero_grad()
        sum(sum_ for sum_, _ in fused(model, batch).values()).backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))


# ---- compiled ----------------------------------------------------------------------------------------------

no_double_attention = pytest.mark.skipif(
    torch.__version__.startswith("2.11."), reason="it cannot compile float64 attention's backward on a CPU")


@pytest.mark.parametrize("row_len", [20, 150])
@pytest.mark.parametrize("lam", ["0", "1"])
def test_a_fixed_shape_holds_every_batch(argv, tokenizer, row_len, lam):
    """Those with an example that is longer than a row, too."""
    c = train.parse_config([*argv, "--row_len", str(row_len), "--lam", lam, "--fixed_shapes"])
    _, sampler, make = parts(c, tokenizer)
    n = 2 * sampler.steps_per_epoch
    assert max(batch.ids.shape[1] for step in range(n) for batch in make(step)) > 20
    shape = train.largest_shape(make, n)
    batches = [batch for step in range(n) for batch in make(step, shape=shape)]
    assert {batch.ids.shape for batch in batches} == {(shape.rows, shape.tokens)}
    assert {len(batch.label_at) for batch in batches} == {shape.labels}


@no_double_attention
@pytest.mark.xdist_group("compile")  # the first one imports the compiler
def test_nothing_recompiles_with_fixed_shapes(argv, tmp_path, monkeypatch):
    """Every batch of a run has one shape, the last of an epoch and those without a view, too; after the fifth
    step nothing is compiled again. The losses are those of free shapes."""
    flags = [*argv, "--batch_size", "11", "--row_len", "150", "--alpha", "0.9", "--dtype", "float64",
             "--n_layers", "1"]
    go(flags, "--out", tmp_path / "free")
    torch._dynamo.reset()
    step_seed = train.step_seed

    def strict_after_five(seed, step):
        torch._dynamo.config.error_on_recompile = step >= 5
        return step_seed(seed, step)
    monkeypatch.setattr(train, "step_seed", strict_after_five)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # the guards are alike
    try:
        go(flags, "--fixed_shapes", "--compile")
    finally:
        torch._dynamo.config.error_on_recompile = False
    ours, theirs = steps_of(tmp_path / "run"), steps_of(tmp_path / "free")
    assert len(ours) == 16
    for a, b in zip(ours, theirs, strict=True):
        assert all(a[name] == pytest.approx(b[name], abs=1e-7) for name in ("ntp", "jepa"))


@no_double_attention
@pytest.mark.xdist_group("compile")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(argv, backend):
    """Losses and gradients of batches of two shapes, to the rounding of the float32 cosines of the rotary
    table."""
    c = train.parse_config([*argv, "--n_layers", "1", "--alpha", "0.5"])
    tokenizer, sampler, make = parts(c)
    model = Transformer(train.model_config(c, tokenizer.vocab_size), 1, 0).double()
    eager, term_weights = train.Step(model, c, "float64"), train.weights_of_terms(c)
    compiled = torch.compile(eager, dynamic=True, backend=backend)
    batches = [*make(0), make(1)[0]]  # with views, without, with
    assert len({batch.ids.shape for batch in batches}) > 1
    assert {batch.segment is None for batch in batches} == {True, False}
    for batch in batches:
        results = []
        for step in (eager, compiled):
            model.zero_grad()
            terms = step(batch)
            total_loss(terms, {name: count for name, (_, count) in terms.items()}, term_weights).backward()
            results.append([*(sum_ for sum_, _ in terms.values()),
                            *(w.grad.clone() for w in model.parameters() if w.grad is not None)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-7)


# ---- stop and go -------------------------------------------------------------------------------------------

SIX = ["--max_steps", "6", "--checkpoint_every", "3", "--alpha", "0.3", "--dtype", "float32"]


@pytest.fixture(scope="session")
def whole(pairs, tmp_path_factory):
    """Six steps that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    go([*tiny_run(pairs, folder), *SIX])
    return folder


@pytest.mark.parametrize("flags", [
    "", "--no-prefetch", "--grad_checkpointing", "--log_every 2", "--checkpoint_every 2", "--eval_every 4",
    pytest.param("--device auto", marks=pytest.mark.skipif(
        torch.cuda.is_available() or torch.backends.mps.is_available(), reason="it would not be the CPU")),
    "--dataset OTHER", "--test_file OTHER"])
def test_a_run_that_dies_goes_on(whole, pairs, argv, tmp_path, flags):
    """After its checkpoint at step 3, it repeats nothing and skips nothing: the same weights, bit for bit,
    and no line of metrics.jsonl twice; also with other settings of those that change no result, and the data
    under another path."""
    name = "train.jsonl" if "--dataset" in flags else "test.jsonl"
    die_at_step(5, [*argv, *SIX])
    torch.manual_seed(12345)  # whatever happened to the generator in between
    go([*argv, *SIX], *flags.replace("OTHER", f"{pairs}/../{pairs.name}/{name}").split())
    assert_equal_runs(whole, tmp_path / "run")
    ours, theirs = metrics(tmp_path / "run"), metrics(whole)
    assert len(theirs) == 6
    if "eval_every" in flags:
        (look,) = (row for row in rows_of(tmp_path / "run") if "look" in row)
        assert look["step"] == 4
        ours = [row for row in ours if "p_end" not in row]
    assert ours == [row for row in theirs if row["step"] != 5 or "log_every" not in flags]


def test_other_checkpoints_before_the_first_one(whole, argv, tmp_path):
    """A run that died before its first checkpoint was taken for damaged where --checkpoint_every was now less
    than the steps that it had logged."""
    die_at_step(5, [*argv, *SIX, "--checkpoint_every", "6"])
    go([*argv, *SIX], "--checkpoint_every", 2)
    assert_equal_runs(whole, tmp_path / "run")


def test_a_budget_of_flops(whole, argv, tmp_path):
    """Training ends with the first step that reaches it, whatever --epochs says; the learning rate follows
    the share of it that is spent. It resumes to the bit, also where all steps are done."""
    budget = 30 * steps_of(whole)[-1]["flops"] // 6 + 1  # about 30 steps: three epochs
    at = argv.index("--epochs")  # it has no effect then
    argv = [*argv[:at], *argv[at + 2:], "--max_flops", str(budget)]
    go(argv, "--out", tmp_path / "once")
    rows = steps_of(tmp_path / "once")
    assert rows[-1]["flops"] >= budget > rows[-2]["flops"] and 25 < len(rows) < 35
    rates, peak = [row["lr"] for row in rows], train.Config.lr
    assert rates[0] < rates[1] <= peak and max(rates) > 0.99 * peak
    assert sorted(rates[2:], reverse=True) == rates[2:] and rates[-1] < 0.01 * peak
    spent = rows[14]["flops"] / budget
    assert rates[15] == pytest.approx(peak * 0.5 * (1 + math.cos(math.pi * (spent - 0.05) / 0.95)))
    die_at_step(15, argv)
    go(argv)
    (tmp_path / "run" / "eval.json").unlink()
    result = go(argv)
    assert_equal_runs(tmp_path / "once", tmp_path / "run")
    assert metrics(tmp_path / "once") == metrics(tmp_path / "run")
    assert result["trained"]["flops"] == rows[-1]["flops"]


def test_a_budget_that_one_step_spends(argv, tmp_path):
    """One below 1 was divided by as 0."""
    go(argv[:argv.index("--epochs")], "--max_flops", 0.5, "--max_new_tokens", 4)
    assert [row["step"] for row in steps_of(tmp_path / "run")] == [1]


def test_no_prefetch_starts_no_thread(argv, monkeypatch):
    monkeypatch.setattr(train, "prefetch", lambda *_: pytest.fail("a thread"))
    go(argv, "--max_steps", 2, "--no-prefetch")


# ---- the seams of the objective ---------------------------------------------------------------------------

def test_a_moving_average_resumes_bit_for_bit(small_run, tmp_path, monkeypatch):
    """Its weights are those of a loop by hand; a run that dies goes on with the same ones."""
    argv = [*small_run, "--target", "ema", "--ema_decay", "0.9", "--dtype", "float32"]
    updates, update = [], train.update_average

    def recorded(ema, model, decay):
        updates.append([weight.detach().clone() for weight in model.parameters()])
        update(ema, model, decay)
    monkeypatch.setattr(train, "update_average", recorded)
    c = train.parse_config([*argv, "--out", str(tmp_path / "whole")])
    train.train(c)
    state = torch.load(tmp_path / "whole" / "state.pt", weights_only=True)
    data = train.load(c)
    average = [weight.detach().clone() for weight in train.make_model(c, data)[0].parameters()]
    for weights in updates:
        average = [0.9 * old + 0.1 * new for old, new in zip(average, weights, strict=True)]
    for by_hand, ours in zip(average, state["ema"].values(), strict=True):
        torch.testing.assert_close(ours, by_hand, atol=1e-6, rtol=0)

    monkeypatch.undo()
    argv += ["--out", str(tmp_path / "run")]
    die_at_step(3, argv)
    go(argv)
    again = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["ema"]
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")
    assert all(torch.equal(again[name], weight) for name, weight in state["ema"].items())


@pytest.mark.parametrize("flags", [
    "--predictor linear", "--predictor mlp --k 0", "--reg_weight 1 --reg vicreg --lam 0",
    "--reg_weight 0.1 --reg sigreg", "--pool mean --layer 0", "--stp 0.1 --stp_form released --passes three",
    "--target stopgrad --lam_warmup 0.5"])
def test_runs_of_every_seam(small_run, tmp_path, flags):
    """They train, and score as they were trained: eval.py finds predictor, pooling and layer again."""
    result = go(small_run, *flags.split(), "--out", tmp_path / "run")
    again = eval.score_run(tmp_path / "run", eval.EvalOptions(models=[], device="cpu"))
    for name in ("cos_paired", "rank_pred", "alignment", "uniformity_enc", "p_end"):
        assert again[name] == pytest.approx(result[name], abs=1e-12)
    assert 0 < result["p_end"] < 1
    tensors = (tmp_path / "run" / "predictor.safetensors").exists()
    assert tensors == ("--predictor" in flags)
    assert "predictor" not in str((tmp_path / "run" / "model.safetensors").read_bytes()[:4000])


CHANGED = {  # another value of each setting of a step, and what both runs have
    "k": "--k 2", "pred_first": "--pred_first", "reverse": "--reverse", "pool": "--pool mean",
    "view_end": "--view_end", "predictor": "--predictor linear", "layer": "--layer 0", "alpha": "--alpha 0.5",
    "lam": "--lam 2", "distance": "--distance l2", "temperature": "--temperature 1 | --distance infonce",
    "target": "--target stopgrad", "ema_decay": "--ema_decay 0.5 | --target ema",
    "lam_warmup": "--lam_warmup 0.9", "reg_weight": "--reg_weight 1", "reg": "--reg sigreg | --reg_weight 1",
    "stp": "--stp 1", "stp_form": "--stp_form released | --stp 1", "ntp_on": "--ntp_on code",
    "train_eos": "--no-train_eos", "gamma": "--gamma 2", "epochs": "--epochs 1 | --max_steps 0",
    "max_steps": "--max_steps 3", "batch_size": "--batch_size 4", "lr": "--lr 2e-3", "warmup": "--warmup 0.5",
    "weight_decay": "--weight_decay 1", "beta1": "--beta1 0.5", "beta2": "--beta2 0.5", "clip": "--clip 0.1"}
ELSEWHERE = {"passes", "micro_batch", "max_flops"}  # two change no loss, the third excludes --max_steps


@pytest.mark.parametrize("name", [
    name for group in ("objective", "labels", "optimization") for name in in_group(train.Config, group)
    if name not in ELSEWHERE])
def test_every_setting_of_a_step_has_an_effect(small_run, tmp_path, name):
    """On the weights, beyond rounding; a new setting fails until it stands here."""
    changed, _, both = CHANGED[name].partition(" | ")
    go(small_run, *both.split(), "--out", tmp_path / "one")
    go(small_run, *both.split(), *changed.split(), "--out", tmp_path / "other")
    one, other = (weights(tmp_path / run)["embed_tokens.weight"] for run in ("one", "other"))
    assert (one - other).abs().max() > 1e-5


def test_lam_rises():
    c = train.Config(lam=2.0, lam_warmup=0.5)
    assert [train.weights_of_terms(c, share)["jepa"] for share in (0, 0.25, 0.5, 0.9)] == [0, 1, 2, 2]
    assert train.weights_of_terms(train.Config())["jepa"] == 1


def test_shapes_are_not_fixed_where_pads_would_be_pairs():
    """On CUDA, compiled, packed rows were filled up whatever compared their pairs."""
    for flags in "--pool mean", "--predictor linear", "--target ema", "--distance infonce", "--reg_weight 1":
        assert not train.may_fill(train.parse_config(["--row_len", "64", *flags.split()]))
    assert train.may_fill(train.parse_config(["--row_len", "64", "--distance", "l2"]))


def test_a_layer_that_is_not_there(small_run, finished_run, tmp_path):
    with pytest.raises(BadInput, match="--layer 1: the model's blocks are 0 to 0"):
        go(small_run, "--layer", 1, "--out", tmp_path / "run")
    record = json.loads((finished_run / "run.json").read_text())
    record["config"]["layer"] = 1
    (finished_run / "run.json").write_text(json.dumps(record))
    with pytest.raises(BadInput, match="run.json: layer is 1, which the model does not have"):
        eval.score_run(finished_run, eval.EvalOptions())


# ---- watching a run ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags,words", [
    ("", "LLM-JEPA on nlrx_synth, from scratch: 1 x next-token loss + 1 x cosine of Pred(Enc(Text)) and "
         "Enc(Code)"),
    ("--lam 0", "training on nlrx_synth, from scratch: 1 x next-token loss"),
    ("--init_from runs/a --lam 0.5 --distance l2 --reverse --gamma 0 --reg_weight 2",
     "LLM-JEPA on nlrx_synth, from runs/a: 0.5 x l2 of Pred(Enc(Code)) and Enc(Text) + 2 x vicreg")])
def test_a_run_says_what_it_is_going_to_do(flags, words):
    assert train.in_words(train.parse_config(flags.split())) == words


def test_the_words_are_the_first_line(argv, capsys):
    go(argv, "--max_steps", 1)
    assert capsys.readouterr().out.startswith(f"LLM-JEPA on {argv[1]}, from scratch: 1 x ")


@pytest.mark.parametrize("budget", ["--max_steps 6", "--max_flops 3e8"])
def test_the_progress_bar_says_when_it_will_end(argv, tmp_path, monkeypatch, budget):
    """Its total is the whole run's, in steps or FLOPs; one that goes on begins where it was."""
    bars, made = [], train.tqdm
    argv = [*argv[:argv.index("--epochs")], "--log_every", "1", "--checkpoint_every", "2", *budget.split()]
    monkeypatch.setattr(train, "tqdm", lambda **k: bars.append(made(**k | {"disable": False})) or bars[-1])
    die_at_step(3, argv)
    go(argv)
    end = steps_of(tmp_path / "run")[-1]
    ends = [bar.n for bar in bars]
    if "flops" in budget:
        assert bars[0].total == 3e8 <= ends[1] == end["flops"] and end["step"] > 3
        assert bars[1].initial == steps_of(tmp_path / "run")[1]["flops"]
    else:
        assert [(bar.total, bar.initial) for bar in bars] == [(6, 0), (6, 2)] and ends == [3, 6]


def test_tensorboard_shows_what_metrics_hold(argv, tmp_path):
    """Every number of every line, at its step, once: also where a run has died and gone on."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    argv = [*argv, "--log", "tensorboard", "--checkpoint_every", "3", "--eval_every", "4"]
    die_at_step(5, argv)
    go(argv)
    shown = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    shown.Reload()
    found = {(name, event.step): event.value for name in shown.Tags()["scalars"]
             for event in shown.Scalars(name)}
    wanted = {}
    for row in rows_of(tmp_path / "run"):
        values = {f"look/{name}": value for name, value in row["look"].items()} if "look" in row else row
        wanted |= {(name, row["step"]): value for name, value in values.items()
                   if type(value) in (int, float) and name != "step"}
    assert found == pytest.approx(wanted, rel=1e-6)
    assert {("ntp", 20), ("jepa", 20), ("look/exact", 16), ("look/cos_shuffled", 4)} <= found.keys()


def test_without_tensorboard_nothing_is_begun(argv, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(BadInput, match="--log tensorboard needs tensorboard: pip install -r requirem"):
        go(argv, "--log", "tensorboard")
    assert not (tmp_path / "run").exists()


# ---- settings ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags,message", [
    ("--lam 0 --k 2", "--k has no effect with --lam 0"),
    ("--dataset nowhere.jsonl --eval_split valid", "nowhere.jsonl: no such file")])
def test_the_program_says_it_in_one_line(flags, message, tmp_path):
    """What the settings contradict (tests/test_settings.py has all of it), and what only the data tell."""
    reply = forks.run("train", flags.split(), cwd=str(tmp_path))
    assert reply.returncode == 2 and reply.stderr == f"error: {message}\n"
    assert not (tmp_path / "runs").exists()


def test_a_file_where_the_folder_should_be(argv, tmp_path):
    (tmp_path / "run").write_text("mine")
    reply = forks.run("train", argv)
    assert reply.returncode == 2 and reply.stderr.count("\n") == 1 and str(tmp_path / "run") in reply.stderr


def test_defaults_are_the_paper_s_objective():
    c = train.parse_config([])
    assert (c.lam, c.k, c.distance, c.passes, c.alpha, c.train_eos, c.ntp_on) == (1.0, 1, "cosine", "fused",
                                                                                  0.0, True, "all")
    assert (c.lr, c.epochs) == (1e-3, 3) and c.out == os.path.join("runs", "nlrx_synth")
    c = train.parse_config(["--lam", "0", "--seed", "23"])
    assert c.out == os.path.join("runs", "nlrx_synth-lam0-seed23")
    c = train.parse_config(["--init_from", "models/Llama"])  # the paper's protocol; what the user gives wins
    assert (c.lr, c.epochs, c.batch_size) == (2e-5, 4, 16) and c.out == "runs/nlrx_synth-from-Llama"
    c = train.parse_config(["--init_from", "x", "--epochs", "2", "--lora_rank", "8"])
    assert c.epochs == 2 and c.lora_dropout == 0.1 and c.out == "runs/nlrx_synth-from-x-lora_rank8-epochs2"


def test_help_names_every_setting():
    reply = forks.run("train", ["--help"])
    assert reply.returncode == 0 and all(f"--{name} " in reply.stdout or f"--{name}," in reply.stdout
                                         for name in asdict(train.Config()))


def test_learning_rate():
    c = train.parse_config(["--lr", "1", "--warmup", "0.1"])
    rates = [train.lr_at(step, step + 1, 100, c) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)]) and max(rates) == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True) and 0 <= rates[-1] < 0.001
    assert rates[55] == pytest.approx(0.5, abs=1e-12)
