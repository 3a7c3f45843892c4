"""Two processes do what one does: losses to 1e-9 in float64, for every variant, with an idle rank, stopped,
killed and resumed with another number of them."""
import json
import os
import signal
import socket
import subprocess
import sys
import time

import forks
import pytest
import torch
from conftest import ROOT
from test_train import argv, go, steps_of, weights  # noqa: F401 (argv: a fixture)

from support import runs


def ranks(command) -> list[forks.Job]:
    """Two that meet at a port that was free, as torchrun would tell them to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [forks.start("train", command, env=env | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]


def finished(jobs: list[forks.Job]) -> list[forks.Job]:
    assert [job.wait().returncode for job in jobs] == [0, 0], [job.stderr[-2000:] for job in jobs]
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
    for name, weight in weights(a).items():
        torch.testing.assert_close(weight, weights(b)[name], atol=1e-8, rtol=0)


@pytest.mark.parametrize("flags", [
    "--lam 0 --stp 1", "--micro_batch 2 --target ema --predictor mlp --pool mean",
    "--alpha 0.9 --row_len 200", "--passes three --batch_size 1 --epochs 1 --max_steps 16"])
def test_two_ranks_equal_one_process(uneven, tmp_path, flags):
    """The last case leaves a rank without an example in every step; alpha 0.9 often without a pair."""
    go([*uneven, *flags.split()], "--out", tmp_path / "one")
    speaker, silent = finished(ranks([*uneven, *flags.split(), "--out", tmp_path / "two"]))
    assert speaker.stdout.startswith("data: file") and not silent.stdout
    assert_same_run(tmp_path / "one", tmp_path / "two", 16)
    a, b = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("one", "two"))
    assert all(a[name] == b[name] for name in ("exact", "prefix", "stopped", "n"))


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def test_stopped_and_killed_with_two_ranks_and_resumed_with_one(uneven, tmp_path):
    """A signal to one of them stops both at the same step, with a checkpoint."""
    command = [*uneven, "--epochs", "16", "--checkpoint_every", "10", "--alpha", "0.5"]
    go(command, "--out", tmp_path / "one")
    run = tmp_path / "run"
    log, state = run / "metrics.jsonl", run / "state.pt"
    jobs = ranks(command)
    wait_for(lambda: log.exists() and log.stat().st_size)
    jobs[1].signal(signal.SIGTERM)
    assert [job.wait().returncode for job in jobs] == [128 + signal.SIGINT, 128 + signal.SIGTERM]
    step = runs.load_state(run, torch.device("cpu"))["step"]
    assert 0 < step < 128 and all(job.stderr.endswith(f"goes on from step {step}\n") for job in jobs)
    before = state.stat().st_mtime_ns
    jobs = ranks(command)
    wait_for(lambda: state.stat().st_mtime_ns != before)
    for job in jobs:
        job.signal(signal.SIGKILL)
    assert [job.wait().returncode for job in jobs] == [-signal.SIGKILL] * 2
    assert not (run / "eval.json").exists() and runs.load_state(run, torch.device("cpu"))["step"] > step
    go(command)
    assert_same_run(tmp_path / "one", run, 128)


def test_negatives_need_one_process(uneven, tmp_path):
    for flags in (["--distance", "infonce"], ["--reg_weight", "1"]):
        reply = forks.run("train", [*uneven, *flags], env={
            "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"})
        assert reply.returncode == 2 and "one process" in reply.stderr and not (tmp_path / "run").exists()


SCRIPT = """
import os, train
train.main()
left = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
assert not any("gloo" in name for name in left), left
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="names of threads")
def test_torchrun_and_no_thread_that_outlives_leave(uneven, tmp_path):
    """One that does takes the interpreter down at its end, in one run of some twenty."""
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    reply = subprocess.run([*torchrun, tmp_path / "script.py", *uneven, "--max_steps", "2"], env=env,
                           capture_output=True, text=True)
    assert reply.returncode == 0, reply.stderr[-4000:]
    assert reply.stdout.count("data: file") == 1 and "| exact |" in reply.stdout
