"""train.py: the loop against a plain one, resume, and everything that a user can get wrong; whole runs by
subprocess."""
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from support import runs
import train
from batches import Rendered, Sampler, collate_fused, fit_splits
from data import render_views
from support.files import BadInput
from jepa_loss import fused
from model import ModelConfig, Transformer
from support.tokenizer import Tokenizer, train_bpe
from tasks.datasets import load_dataset

TINY = ["--dim", "32", "--n_layers", "2", "--n_heads", "2", "--ffn_dim", "48", "--vocab_size", "300",
        "--batch_size", "8",
        "--epochs", "2", "--log_every", "1", "--max_new_tokens", "8"]


@pytest.fixture
def argv(pairs, tmp_path):
    return ["--dataset", str(pairs / "train.jsonl"), "--test_file", str(pairs / "test.jsonl"),
            "--out", str(tmp_path / "run"), "--device", "cpu", *TINY]


no_double_attention = pytest.mark.skipif(
    torch.__version__.startswith("2.11."), reason="it cannot compile float64 attention's backward on a CPU")


def command(arguments, **options):
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments], capture_output=True,
                          text=True, **options)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return runs.load_state(folder, torch.device("cpu"))["model"]


def assert_equal_runs(a, b, tolerance=0.0):
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        difference = (weight - theirs[name]).abs().max().item()
        assert difference <= tolerance, (name, difference)


def untimed(result):
    """An eval.json without its timings and places."""
    sums = {name: x for name, x in result["sha256"].items() if name not in ("run.json", "metrics.jsonl")}
    return {**result, "seconds": 0, "trained": {**result["trained"], "seconds": 0}, "sha256": sums}


def die_at_step(at, argv):
    """Start a run that is interrupted before its step number `at` (from 0)."""
    lr_at = train.lr_at

    def dies(step, total, c):
        if step == at:
            raise KeyboardInterrupt
        return lr_at(step, total, c)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "lr_at", dies)
        train.train(train.parse_config(argv))


# ---- whole runs --------------------------------------------------------------------------------------------

def test_a_whole_run(argv, tmp_path):
    """Train, score, start again, answer a prompt: as a user does."""
    reply = command(argv)
    assert reply.returncode == 0, reply.stderr
    assert reply.stdout.startswith("data: file\n") and reply.stdout.count("\ntarget ") == 5
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        "run.json", "metrics.jsonl", "state.pt", "config.json", "model.safetensors",
        "pred_embedding.safetensors",
        "tokenizer.model", "tokenizer_config.json", "eval.json"}
    rows = [row for row in rows_of(run) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 21)) and rows[-1]["examples"] == 160
    assert rows[-1]["ntp"] < rows[0]["ntp"] and rows[0]["jepa"] > 0.05
    assert all(row["loss"] == pytest.approx(row["ntp"] + row["jepa"]) for row in rows)
    looks = [row for row in rows_of(run) if "look" in row]
    assert [row["epoch"] for row in looks] == [1] and looks[0]["look"]["n"] == 12
    result = json.loads((run / "eval.json").read_text())
    assert result["n"] == 12 and result["source"] == "file"

    before = (run / "state.pt").stat().st_mtime_ns
    again = command(argv)
    assert again.returncode == 0 and "finished before" in again.stdout and "exact" in again.stdout
    assert (run / "state.pt").stat().st_mtime_ns == before

    def evaluate(*arguments):
        return subprocess.run([sys.executable, ROOT / "eval.py", run, *arguments], capture_output=True,
                              text=True)
    (run / "eval.json").write_text(json.dumps({**result, "exact": -1}))
    scored = evaluate()
    assert scored.returncode == 0, scored.stderr
    new = json.loads((run / "eval.json").read_text())
    assert {**new, "seconds": 0} == {**result, "seconds": 0}
    assert evaluate("--prompt", "the number 3", "--max_new_tokens", "4").stdout.strip()
    other = command([*argv, "--lr", "1e-4"])
    assert other.returncode == 2
    assert other.stderr.startswith(f"error: {run} holds a run with --lr {train.Config.lr} (now 0.0001)")


@pytest.mark.parametrize("flags",
                         [["--lam", "0"], ["--passes", "three"], ["--row_len", "128", "--alpha", "0.5"]])
def test_other_arms_run(argv, tmp_path, flags):
    c = train.parse_config([*argv, *flags, "--max_steps", "3"])
    result = train.train(c)
    assert 0 <= result["exact"] <= 1 and len([row for row in rows_of(tmp_path / "run") if "loss" in row]) == 3


def test_fused_equals_three_passes_over_a_run(argv, tmp_path):
    """Float64: the weights after 20 steps, packed or not, with loss dropout."""
    arms = {"three": ["--passes", "three"], "fused": [], "packed": ["--row_len", "150"]}
    for name, flags in arms.items():
        train.train(train.parse_config([*argv, *flags, "--dtype", "float64", "--alpha", "0.3", "--out",
                                        str(tmp_path / name)]))
    assert_equal_runs(tmp_path / "three", tmp_path / "fused", 1e-9)
    assert_equal_runs(tmp_path / "three", tmp_path / "packed", 1e-9)


def test_micro_batches_equal_the_big_batch(argv, tmp_path):
    """Float64: 1 x 32 and 4 x 8, gradients of a step and weights after 50 steps, to 1e-9, in both arms. The
    official code divides one arm's gradient by the number of micro-batches and not the other's."""
    flags = ["--dtype", "float64", "--batch_size", "32", "--epochs", "50", "--max_steps", "50"]
    for name, more in (("plain", ["--lam", "0"]), ("jepa", ["--alpha", "0.5", "--k", "2"]),
                       ("stp", ["--objective", "stp"])):
        runs = [tmp_path / f"{name}{size}" for size in (0, 8)]
        for run, size in zip(runs, ("0", "8"), strict=True):
            train.train(train.parse_config([*argv, *flags, *more, "--micro_batch", size, "--out", str(run)]))
        assert_equal_runs(*runs, 1e-9)
        norms = [[row["grad_norm"] for row in rows_of(run) if "loss" in row] for run in runs]
        assert len(norms[0]) == 50 and norms[0] == pytest.approx(norms[1], abs=1e-9)


def test_micro_batch_gradients_of_one_step(argv):
    gradients = []
    for size in ("0", "8"):
        c = train.parse_config([*argv, "--batch_size", "32", "--micro_batch", size, "--alpha", "0.5"])
        data = load_dataset(c.dataset, c.data_dir, c.test_file)
        tokenizer = Tokenizer(train_bpe([e.text for e in data.train], c.vocab_size))
        model = Transformer(train.model_config(c, tokenizer.vocab_size), 1, 0).double()
        views = [render_views(e, tokenizer) for e in data.train]
        batches = train.micro_batches(c, views, list(range(32)), 0)
        assert len(batches) == (1 if size == "0" else 4)
        assert sum(b.n_pairs for b in batches) == 32
        for batch in batches:
            losses = train.Step(model, c, "float64")(batch)
            train.total_loss(losses, sum(b.n_tokens for b in batches), 32, 1.0).backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_lam_0_is_plain_training_bit_for_bit(argv, tmp_path):
    """Against the loop that anyone would write: pad, causal forward, cross-entropy, AdamW."""
    c = train.parse_config([*argv, "--lam", "0", "--dtype", "float32"])
    train.train(c)
    data = load_dataset(c.dataset, c.data_dir, c.test_file)
    tokenizer = Tokenizer(train_bpe([text for e in data.train for text in (e.text, e.code)], 300))
    begin, sep, end = range(len(tokenizer.ranks), len(tokenizer.ranks) + 3)
    rows = [[begin, *tokenizer.encode(e.text), sep, *tokenizer.encode(e.code),
             end]
            for e in data.train]
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
        for group in optimizer.param_groups:
            group["lr"] = train.lr_at(step, 20, c)
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in weights(tmp_path / "run").items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_the_arms_see_the_same_examples(argv, tmp_path):
    """lam, passes, alpha, packing and micro-batches leave the examples of a step alone: same counts, step by
    step."""
    counts = []
    for i, flags in enumerate((["--lam", "0"], ["--alpha", "0.5"], ["--row_len", "100"],
                               ["--micro_batch", "3"])):
        train.train(train.parse_config([*argv, *flags, "--out", str(tmp_path / str(i))]))
        counts.append([(row["examples"], row["tokens"]) for row in rows_of(tmp_path / str(i))
                       if "loss" in row])
    assert counts[0] == counts[1] == counts[2] == counts[3]


@pytest.mark.parametrize("row_len", [20, 150])
@pytest.mark.parametrize("lam", ["0", "1"])
def test_a_fixed_shape_holds_every_batch(argv, tokenizer, row_len, lam):
    """Those with an example that is longer than a row, too."""
    c = train.parse_config([*argv, "--row_len", str(row_len), "--lam", lam, "--fixed_shapes"])
    data = load_dataset(c.dataset, test_file=c.test_file)
    counts = fit_splits(data, tokenizer, 512, k=c.k)
    assert 20 < counts[:, 1].max() < 150
    sampler = Sampler(counts[:, 0], c.batch_size, c.seed)
    shape = train.largest_shape(c, sampler, counts, 2 * sampler.steps_per_epoch)
    rendered = Rendered(data.train, tokenizer, k=c.k)
    batches = [batch for step in range(2 * sampler.steps_per_epoch)
               for batch in train.micro_batches(c, rendered, sampler.indices(step), step, shape)]
    assert {batch.ids.shape for batch in batches} == {(shape.rows, shape.tokens)}
    assert {len(batch.label_at) for batch in batches} == {shape.labels}


@no_double_attention
def test_nothing_recompiles_with_fixed_shapes(argv, tmp_path):
    """Every batch of a run has one shape, the last of an epoch and those without a view, too; after the fifth
    step nothing is compiled again. The losses are those of free shapes."""
    flags = [*argv, "--batch_size", "11", "--row_len", "150", "--alpha", "0.9", "--dtype", "float64",
             "--n_layers", "1"]
    train.train(train.parse_config([*flags, "--out", str(tmp_path / "free")]))
    torch._dynamo.reset()
    step_seed = train.step_seed

    def strict_after_five(seed, step):
        torch._dynamo.config.error_on_recompile = step >= 5
        return step_seed(seed, step)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "step_seed", strict_after_five)
            train.train(train.parse_config([*flags, "--fixed_shapes", "--compile"]))
    finally:
        torch._dynamo.config.error_on_recompile = False
    ours, theirs = ([row for row in rows_of(tmp_path / name) if "loss" in row] for name in ("run", "free"))
    assert len(ours) == 16
    for a, b in zip(ours, theirs, strict=True):
        assert all(a[name] == pytest.approx(b[name], abs=1e-7) for name in ("ntp", "jepa"))


def test_prefetch_and_grad_checkpointing_change_no_bit(argv, tmp_path):
    argv = [*argv, "--max_steps", "6", "--alpha", "0.5"]
    train.train(train.parse_config(argv))
    train.train(train.parse_config([*argv, "--no-prefetch", "--out", str(tmp_path / "plain")]))
    train.train(train.parse_config([*argv, "--grad_checkpointing", "--out", str(tmp_path / "again")]))
    assert_equal_runs(tmp_path / "run", tmp_path / "plain")
    assert_equal_runs(tmp_path / "run", tmp_path / "again")


def test_tf32_is_for_training_alone(argv, monkeypatch):
    """A CPU knows no TF32, but the switch is the same: rounded products in the loop, exact ones for the
    scores that eval.json holds."""
    c, seen, score = replace(train.parse_config(argv), dtype="tf32"), [], train.evaluate

    def evaluate(*args, **options):
        seen.append(torch.get_float32_matmul_precision())
        return score(*args, **options)
    monkeypatch.setattr(train, "evaluate", evaluate)
    train.train(c)
    assert seen == ["high", "highest"]


def test_no_prefetch_starts_no_thread(argv, monkeypatch):
    monkeypatch.setattr(train, "ahead", lambda items: pytest.fail("a thread"))
    train.train(train.parse_config([*argv, "--max_steps", "2", "--no-prefetch"]))


@no_double_attention
def test_compiled_equals_eager(argv):
    """Losses and gradients of batches of two shapes, to the rounding of the float32 cosines of the rotary
    table."""
    c = train.parse_config([*argv, "--n_layers", "1", "--alpha", "0.5"])
    data = load_dataset(c.dataset, c.data_dir, c.test_file)
    tokenizer = Tokenizer(train_bpe([e.text for e in data.train], c.vocab_size))
    model = Transformer(train.model_config(c, tokenizer.vocab_size), 1, 0).double()
    views = [render_views(e, tokenizer) for e in data.train]
    eager = train.Step(model, c, "float64")
    compiled = torch.compile(eager, dynamic=True)
    for indices in (list(range(5)), list(range(20, 28))):
        batch, = train.micro_batches(c, views, indices, 0)  # with views and without
        results = []
        for step in (eager, compiled):
            model.zero_grad()
            losses = step(batch)
            train.total_loss(losses, losses.n_tokens, losses.n_pairs, 1.0).backward()
            results.append([losses.ntp_sum, losses.jepa_sum,
                            *(weight.grad.clone() for weight in model.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-7)


# ---- stop and go -------------------------------------------------------------------------------------------

def test_three_steps_and_three_equal_six(argv, tmp_path):
    """A run that dies behind its checkpoint at step 3 repeats nothing and skips nothing; metrics lines are
    not doubled."""
    argv = [*argv, "--max_steps", "6", "--checkpoint_every", "3", "--alpha", "0.3"]
    train.train(train.parse_config([*argv, "--out", str(tmp_path / "whole")]))
    die_at_step(5, argv)
    train.train(train.parse_config(argv))
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")
    keep = ("step", "epoch", "examples", "tokens", "ntp", "jepa", "loss", "lr", "grad_norm")
    a, b = ([{k: row[k] for k in keep} for row in rows_of(tmp_path / name)] for name in ("whole", "run"))
    assert a == b and len(a) == 6


def test_killed_between_a_file_and_its_name(argv, tmp_path):
    """What a kill leaves of run.json, a temporary file, does not make the folder a stranger's."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json.tmp").write_text("{")
    train.train(train.parse_config([*argv, "--max_steps", "1"]))
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_run_that_diverges(argv, tmp_path):
    """One line, no checkpoint of non-numbers; metrics.jsonl stays JSON."""
    reply = command([*argv, "--lr", "1e30", "--clip", "1e30", "--checkpoint_every", "1"])
    assert reply.returncode == 2 and reply.stderr.count("\n") == 1, reply.stderr
    assert "the loss is" in reply.stderr and "try a lower --lr" in reply.stderr
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_gamma_weighs_the_next_token_loss(argv, tmp_path):
    """In the loss that is logged and in the gradient that is taken."""
    rows = {}
    for gamma in ("0", "1", "2"):
        out = tmp_path / gamma
        train.train(train.parse_config([*argv, "--gamma", gamma, "--max_steps", "1", "--out", str(out)]))
        rows[gamma] = rows_of(out)[0]
    assert [rows[g]["loss"] for g in "012"] == pytest.approx(
        [rows["1"]["jepa"] + i * rows["1"]["ntp"] for i in range(3)], rel=1e-5)
    norms = [rows[g]["grad_norm"] for g in "012"]
    assert norms[0] < norms[1] < norms[2]


def test_two_threads_give_the_same_bits_twice(tokenizer, examples):
    """Resume is exact because steps are: the backward of an indexed read `w[i]` with repeated i is not, on
    several threads."""
    model = Transformer(ModelConfig(tokenizer.vocab_size), k=1)
    views = [render_views(e, tokenizer) for e in examples] * 10
    threads, gradients = torch.get_num_threads(), []
    torch.set_num_threads(2)
    for _ in range(3):
        model.zero_grad()
        losses = fused(model, collate_fused(views, [True] * len(views)))
        (losses.ntp_sum + losses.jepa_sum).backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))


def test_full_disk(argv, tmp_path):
    """No room for a checkpoint: one line, status 2, no half file; with room again, the run goes on. The limit
    on a file's size stands for a full disk: the write call fails."""
    argv = [*argv, "--max_steps", "4", "--checkpoint_every", "2"]
    assert command([*argv, "--out", str(tmp_path / "whole")]).returncode == 0
    size = (tmp_path / "whole" / "state.pt").stat().st_size

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
    reply = command(argv, preexec_fn=small_files)
    assert reply.returncode == 2 and reply.stderr.count("\n") == 1
    assert reply.stderr.startswith(f"error: {tmp_path / 'run' / 'state.pt'}: cannot be written")
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert command(argv).returncode == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_disk_full_at_the_second_checkpoint(argv, tmp_path, monkeypatch):
    """The first checkpoint is untouched and the run goes on from it."""
    c = train.parse_config([*argv, "--max_steps", "4", "--checkpoint_every", "2"])
    save, calls = torch.save, []

    def fails(state, path):
        calls.append(state["step"])
        save(state, path)
        if len(calls) == 2:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="No space left"):
        train.train(c)
    assert runs.load_state(tmp_path / "run", torch.device("cpu"))["step"] == 2
    assert not list((tmp_path / "run").glob("*.tmp"))
    train.train(c)
    assert calls == [2, 4, 4]


def test_a_read_only_folder(argv, tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    reply = command(argv)
    assert reply.returncode == 2 and reply.stderr.count("\n") == 1 and str(tmp_path / "run") in reply.stderr


def test_corrupt_and_foreign_run_folders(argv, tmp_path):
    run = tmp_path / "run"
    c = train.parse_config([*argv, "--max_steps", "2"])
    train.train(c)
    (run / "eval.json").unlink()

    def refused(match):
        with pytest.raises(BadInput, match=match) as error:
            train.train(c)
        assert "\n" not in str(error.value)
    state = (run / "state.pt").read_bytes()
    (run / "state.pt").write_bytes(state[:len(state) // 2])
    refused("state.pt: damaged")
    torch.save({"model": {}}, run / "state.pt")
    refused("state.pt: of another run")
    (run / "state.pt").write_bytes(state)
    record = (run / "run.json").read_text()
    (run / "run.json").write_text(record[:50])
    refused("run.json: not valid JSON")
    (run / "run.json").write_text("{}")
    refused("run.json: not written by this program")
    files = json.loads(record)
    files["files"] = {path: "0" * 64 for path in files["files"]}
    (run / "run.json").write_text(json.dumps(files))
    refused("holds a run on other data")
    (run / "run.json").unlink()
    refused("not empty and not a run folder")
    (run / "run.json").write_text(record)
    lines = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(lines[:-5])
    refused("metrics.jsonl: not as at the last checkpoint")
    (run / "metrics.jsonl").write_bytes(lines)
    assert (run / "state.pt").read_bytes() == state  # nothing was lost on the way
    (run / "run.json").write_text(record)
    assert train.train(c)["n"] == 12


# ---- settings ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags,message", [
    ("--nonsense 1", "unrecognized arguments: --nonsense 1"),
    ("--batch 4", "unrecognized arguments: --batch 4"),  # no guessing at abbreviations
    ("--lr fast", "argument --lr: invalid float value: 'fast'"),
    ("--passes two", "argument --passes: invalid choice: 'two'"),
    ("--lam 0 --k 3 --alpha 0.5", "--k has no effect with --lam 0; --alpha has no effect with --lam 0"),
    ("--lam 0 --gamma 0", "nothing to train on"),
    ("--lam -1", "--lam -1.0: must be a number, 0 or more"),
    ("--lam nan", "--lam nan: must be a number"),
    ("--lr inf", "--lr inf: must be a number above 0"),
    ("--epochs 0", "--epochs 0: must be at least 1"),
    ("--alpha 1", "--alpha 1.0: must be at least 0 and below 1"),
    ("--vocab_size 100", "--vocab_size 100: must be at least 256"),
    ("--temperature 0.1", "--temperature has no effect without --distance infonce"),
    ("--distance infonce --micro_batch 4", "negatives from the whole batch"),
    ("--distance infonce --alpha 0.5", "no --micro_batch, no --alpha and one process"),
    ("--distance infonce --batch_size 1", "needs --batch_size 2 or more"),
    ("--gamma 0 --ntp_on code", "--ntp_on has no effect with --gamma 0"),
    (f"--seed {2**64}", "must be at least 0 and below 2**63"),
    ("--k 0 --pred_first", "--pred_first has no effect with --k 0"),
    ("--passes three --row_len 100", "--row_len has no effect with --passes three"),
    ("--fixed_shapes", "--fixed_shapes has no effect without --row_len"),
    ("--lam 0 --attention dense", "--attention has no effect without --row_len"),
    ("--fixed_shapes --row_len 500 --distance infonce", "which --distance infonce would contrast with"),
    ("--device cpu --attention flex", "--attention flex needs CUDA and --compile"),
    ("--match_flops nowhere", "--match_flops nowhere: no finished run"),
    ("--objective stp --k 2 --row_len 64", "--k has no effect with --objective stp"),
    ("--device cpu --dtype tf32", "--dtype tf32 needs CUDA"),
    ("--test_file x.jsonl", "--test_file has no effect with a published dataset"),
    ("--dataset x.jsonl", "needs --test_file or --eval_split valid"),
    ("--dataset x.jsonl --eval_split valid --test_file y",
     "--test_file has no effect with --eval_split valid"),
    ("--dataset x.jsonl --eval_split valid --data_dir y",
     "--data_dir has no effect with a dataset of your own"),
    ("--batch_size 4 --micro_batch 8", "--micro_batch 8 is more than --batch_size 4"),
])
def test_wrong_settings(flags, message):
    with pytest.raises(BadInput) as error:
        train.parse_config(flags.split())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_wrong_device():
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="--device cuda: not available here"):
            train.parse_config(["--device", "cuda"])


@pytest.mark.parametrize("flags", ["--dim 30 --n_heads 4", "--dim 20 --n_heads 4", "--n_kv_heads 3"])
def test_wrong_shapes(flags):
    with pytest.raises(BadInput, match="--dim|--n_kv_heads"):
        train.parse_config(flags.split())


@pytest.mark.parametrize("arguments,message", [
    (["--dataset", "nlrx_sinth"], "--dataset nlrx_sinth: not a known dataset"),
    (["--lam", "0", "--k", "2"], "--k has no effect with --lam 0"),
    (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    (["--dataset", "nowhere.jsonl", "--eval_split", "valid"], "nowhere.jsonl: no such file"),
    (["--n_train", "9000"], "--n_train 9000: ")])
def test_the_program_says_it_in_one_line(arguments, message, tmp_path):
    reply = command([*arguments, "--data_dir", str(tmp_path)] if "nowhere.jsonl" not in arguments
                    else arguments, cwd=tmp_path)
    assert reply.returncode == 2 and reply.stderr.startswith("error: ") and message in reply.stderr
    assert reply.stderr.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_defaults_are_the_paper_s_objective():
    c = train.parse_config([])
    assert (c.lam, c.k, c.distance, c.passes, c.alpha, c.train_eos, c.ntp_on) == (1.0, 1, "cosine", "fused",
                                                                                  0.0, True, "all")
    assert c.out == os.path.join("runs", "nlrx_synth")
    assert train.parse_config(["--lam", "0", "--seed", "23"]).out == os.path.join("runs",
                                                                                  "nlrx_synth-lam0-seed23")


def test_help_names_every_setting():
    reply = command(["--help"])
    assert reply.returncode == 0 and all(f"--{name} " in reply.stdout or f"--{name}," in reply.stdout
                                         for name in train.asdict(train.Config()))


def test_learning_rate():
    c = train.parse_config(["--lr", "1", "--warmup", "0.1"])
    rates = [train.lr_at(step, 100, c) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)]) and max(rates) == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True) and 0 <= rates[-1] < 0.001
    assert rates[55] == pytest.approx(0.5, abs=1e-12)
