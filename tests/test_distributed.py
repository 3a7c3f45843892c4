"""Two or three processes, each with a part of the weights, do what one does: losses to 1e-9 in float64, for
every variant, with an idle rank, stopped, killed and resumed with another number of them."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import forks
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_train import argv, go, rows_of, steps_of, weights  # noqa: F401 (argv: a fixture)

import train
from support import runs
from support.files import BadInput


def ranks(command, n=2) -> list[forks.Job]:
    """n that meet at a port that was free, as torchrun would tell them to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [forks.start("train", command, env=env | {"RANK": rank, "LOCAL_RANK": rank})
            for rank in map(str, range(n))]


def finished(jobs: list[forks.Job]) -> list[forks.Job]:
    assert not any([job.wait().returncode for job in jobs]), [job.stderr[-2000:] for job in jobs]
    return jobs


@pytest.fixture
def uneven(argv):  # noqa: F811
    """Steps of 11 of 80 examples: shares of 6 and 5, the last step of an epoch has 3."""
    return [*argv, "--n_layers", "1", "--batch_size", "11", "--dtype", "float64"]


def assert_same_run(a, b, n_steps):
    ours, theirs = steps_of(a), steps_of(b)
    assert len(ours) == len(theirs) == n_steps
    for x, y in zip(ours, theirs, strict=True):
        assert all(x[name] == y[name] for name in ("step", "examples", "tokens", "flops", "lr"))
        for name in {"ntp", "jepa", "stp", "grad_norm"} & x.keys():
            assert abs(x[name] - y[name]) < 1e-9, (x["step"], name, x[name], y[name])
    looks = [[row["look"] for row in rows_of(folder) if "look" in row] for folder in (a, b)]
    assert len(looks[0]) == len(looks[1]) > 0 or n_steps == 50
    for x, y in zip(*looks, strict=True):
        assert x["p_end"] == pytest.approx(y["p_end"], abs=1e-8) and x["exact"] == y["exact"]
    for name, weight in weights(a).items():
        torch.testing.assert_close(weight, weights(b)[name], atol=1e-8, rtol=0)


@pytest.mark.parametrize("n,flags", [
    (2, "--lam 0 --stp 1"), (2, "--micro_batch 2 --target ema --predictor mlp --pool mean --shard none"),
    (3, "--micro_batch 2 --target ema --predictor mlp --pool mean"), (2, "--alpha 0.9 --row_len 200"),
    (2, "--alpha 0.8 --grad_checkpointing"), (3, "--passes three --alpha 0.8 --predictor linear"),
    (2, "--passes three --batch_size 1 --epochs 1 --max_steps 50")])
def test_ranks_equal_one_process(uneven, tmp_path, n, flags):
    """The last case leaves a rank without an example in every step; alpha often without a pair, where others
    have some."""
    command = [*uneven, "--epochs", "7", *flags.split()]
    finished_ranks = ranks([*command, "--out", tmp_path / "many"], n)
    go([arg for arg in command if arg not in ("--shard", "none")], "--out", tmp_path / "one")
    speaker, *silent = finished(finished_ranks)
    assert "\ndata: file" in speaker.stdout and not any(job.stdout for job in silent)
    assert_same_run(tmp_path / "one", tmp_path / "many", 50 if "50" in flags else 56)
    a, b = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("one", "many"))
    assert all(a[name] == b[name] for name in ("exact", "prefix", "stopped", "n"))


@pytest.mark.parametrize("flags", ["--lora_rank 4 --lora_dropout 0", "--backend transformers",
                                   "--backend transformers --lora_rank 4 --lora_dropout 0 --layer 0"])
def test_ranks_fine_tune_as_one_process(chat_folder, pairs, tmp_path, flags):
    """Our model with adapters, and the library's, whole and with adapters of peft; stored in parts, exported
    whole."""
    epochs = 2 if "transformers" in flags else 7  # of eight steps
    if "transformers" in flags:
        pytest.importorskip("peft")
    data = f"--dataset {pairs}/train.jsonl --test_file {pairs}/test.jsonl --init_from {chat_folder}"
    command = [*data.split(),
               *"--format llama3 --device cpu --dtype float64 --batch_size 11 --lr 1e-3".split(),
               *f"--log_every 1 --max_new_tokens 4 --epochs {epochs} {flags}".split()]
    many = ranks([*command, "--out", tmp_path / "many"])
    go(command, "--out", tmp_path / "one")
    finished(many)
    assert_same_run(tmp_path / "one", tmp_path / "many", 8 * epochs)
    one, many = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "many"))
    assert one.keys() == many.keys()
    for name, weight in one.items():
        torch.testing.assert_close(weight, many[name], atol=1e-7, rtol=0)


@pytest.mark.parametrize("flags,tolerance", [
    ("--dtype bfloat16", 2e-2), pytest.param("--dtype float32 --compile", 1e-4, marks=pytest.mark.slow)])
def test_bfloat16_ranks_and_compiled_ones(uneven, tmp_path, flags, tolerance):
    """Blocks that are gathered in bfloat16 give what autocast gives one process, but for the norms' gains,
    which are rounded. One process does not compile here."""
    command = [*uneven, *flags.split(), "--max_steps", "8"]
    many = ranks([*command, "--out", tmp_path / "many"])
    go([arg for arg in command if arg != "--compile"], "--out", tmp_path / "one")
    finished(many)
    one, many = ([row["loss"] for row in steps_of(tmp_path / run)] for run in ("one", "many"))
    assert len(one) == 8 and one == pytest.approx(many, abs=tolerance)


def test_one_process_has_nothing_to_shard(uneven):
    with pytest.raises(BadInput, match="--shard none has no effect with one process"):
        train.parse_config([*uneven, "--shard", "none"])


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def test_stopped_and_killed_with_three_ranks_and_resumed_with_one_and_two(uneven, tmp_path):
    """A signal to one of them stops all at the same step, with a checkpoint."""
    command = [*uneven, "--epochs", "16", "--checkpoint_every", "10", "--alpha", "0.5"]
    run = tmp_path / "run"
    log, state = run / "metrics.jsonl", run / "state.pt"
    jobs = ranks(command, 3)
    wait_for(lambda: log.exists() and log.stat().st_size)
    jobs[1].signal(signal.SIGTERM)
    assert [job.wait().returncode for job in jobs] == [128 + signal.SIGINT, 128 + signal.SIGTERM,
                                                       128 + signal.SIGINT]
    step = runs.load_state(run, torch.device("cpu"))["step"]
    assert 0 < step < 128 and all(job.stderr.endswith(f"goes on from step {step}\n") for job in jobs)
    before = state.stat().st_mtime_ns
    jobs = ranks(command, 3)
    wait_for(lambda: state.stat().st_mtime_ns != before)
    for job in jobs:
        job.signal(signal.SIGKILL)
    assert [job.wait().returncode for job in jobs] == [-signal.SIGKILL] * 3
    assert not (run / "eval.json").exists() and runs.load_state(run, torch.device("cpu"))["step"] > step
    shutil.copytree(run, tmp_path / "copy")
    two = ranks([*command, "--out", tmp_path / "copy"])
    go(command)
    go(command, "--out", tmp_path / "one")
    finished(two)
    assert_same_run(tmp_path / "one", run, 128)
    assert_same_run(tmp_path / "one", tmp_path / "copy", 128)


def test_a_damaged_checkpoint_is_named_by_ranks_too(uneven, tmp_path):
    """They map it into memory, which checks nothing."""
    go([*uneven, "--max_steps", "2"])
    (tmp_path / "run" / "eval.json").unlink()
    state = tmp_path / "run" / "state.pt"
    whole = bytearray(state.read_bytes())
    at = whole.index(weights(tmp_path / "run")["norm.weight"].detach().numpy().tobytes())
    whole[at] ^= 1
    state.write_bytes(whole)
    jobs = ranks([*uneven, "--max_steps", "2"])
    assert [job.wait().returncode for job in jobs] == [2, 2]
    assert all("state.pt: damaged (wrong checksum)" in job.stderr for job in jobs)


def test_negatives_need_one_process(uneven, tmp_path):
    for flags in (["--distance", "infonce"], ["--reg_weight", "1"]):
        reply = forks.run("train", [*uneven, *flags], env={
            "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"})
        assert reply.returncode == 2 and "one process" in reply.stderr and not (tmp_path / "run").exists()


SCRIPT = """
import os, sys
from support import distributed
import train
make = train.make_optimizer
def measured(model, c):
    optimizer = make(model, c)
    def count(*_):
        held = [x for w in model.parameters() for x in (w.data, w.grad, *optimizer.state[w].values())]
        local = [x.to_local() if hasattr(x, "to_local") else x for x in held]
        print(f"rank {distributed.rank} holds {sum(x.nbytes for x in local)} bytes;", file=sys.stderr)
    optimizer.register_step_post_hook(count)
    return optimizer
train.make_optimizer = measured
train.main()
if os.path.exists("/proc/self/task"):
    left = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    assert not any("gloo" in name for name in left), left
"""


def test_torchrun_memory_and_no_thread_that_outlives_leave(uneven, tmp_path):
    """Two ranks hold at most 0.6 of what one process holds of weights, gradients and optimizer state. A
    thread of gloo that outlives `leave` takes the interpreter down at its end, in one run of some twenty."""
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    env, held = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, {}
    for n in 1, 2:
        command = [*torchrun, str(n), tmp_path / "script.py", *uneven, "--max_steps", "2", "--out"]
        reply = subprocess.run([*command, tmp_path / str(n)], env=env, capture_output=True, text=True)
        assert reply.returncode == 0, reply.stderr[-4000:]
        assert reply.stdout.count("data: file") == 1 and "| exact |" in reply.stdout
        held[n] = {int(size) for size in re.findall(r"rank \d holds (\d+) bytes;", reply.stderr)}
    assert max(held[2]) <= 0.6 * min(held[1]) and 0.9 * min(held[1]) < 2 * min(held[2])
