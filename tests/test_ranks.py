"""Two processes do what one does: losses to 1e-9 in float64, in every arm, with an idle rank, killed and
resumed with another number of them."""
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_train import TINY, rows_of, weights

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]


def two(arguments, port):
    return [*TORCHRUN, str(port), str(ROOT / "train.py"), *arguments]


def run(command, **env):
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    reply = subprocess.run(command, capture_output=True, text=True, env=env)
    assert reply.returncode == 0, reply.stderr[-4000:]
    return reply


LEAVE = """
import os, torch, ranks
ranks.join(torch.device("cpu"))
weight = torch.nn.Parameter(torch.ones(3))
(weight * (ranks.rank + 1)).sum().backward()
ranks.sum_gradients([weight])
assert weight.grad.tolist() == [3, 3, 3], weight.grad
torch.optim.AdamW([weight], fused=True).step()
ranks.leave()
left = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
assert not any("gloo" in name for name in left), left
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="names of threads")
def test_no_thread_outlives_leave(tmp_path):
    """One that does takes the interpreter down at its end, in one run of some twenty."""
    (tmp_path / "leave.py").write_text(LEAVE)
    run([*TORCHRUN, "29618", str(tmp_path / "leave.py")], PYTHONPATH=str(ROOT))


@pytest.fixture
def argv(pairs, tmp_path):
    """50 steps of 11 of 80 examples: shares of 6 and 5, the last step of an epoch has 3."""
    return ["--dataset", str(pairs / "train.jsonl"), "--test_file", str(pairs / "test.jsonl"),
            "--device", "cpu", *TINY, "--batch_size", "11", "--epochs", "10", "--max_steps", "50",
            "--dtype", "float64"]


def assert_same_run(a, b):
    ours, theirs = ([row for row in rows_of(folder) if "loss" in row] for folder in (a, b))
    assert len(ours) == len(theirs) == 50
    for x, y in zip(ours, theirs, strict=True):
        assert all(x[name] == y[name] for name in ("step", "examples", "tokens", "flops", "lr"))
        for name in ("ntp", "jepa", "grad_norm"):
            assert abs(x[name] - y[name]) < 1e-9, (x["step"], name, x[name], y[name])
    for name, weight in weights(a).items():
        torch.testing.assert_close(weight, weights(b)[name], atol=1e-8, rtol=0)


@pytest.mark.parametrize("port,flags", [
    (29611, ["--lam", "0"]), (29612, ["--micro_batch", "2"]), (29613, ["--alpha", "0.9", "--row_len", "200"]),
    (29617, ["--objective", "stp"]),
    (29614, ["--passes", "three", "--batch_size", "1", "--epochs", "1"])], ids=str)
def test_two_ranks_equal_one_process(argv, tmp_path, port, flags):
    """The last case leaves a rank without an example in every step; alpha 0.9 often without a pair."""
    one, both = (["--out", str(tmp_path / name)] for name in ("one", "two"))
    run([sys.executable, str(ROOT / "train.py"), *argv, *flags, *one])
    reply = run(two([*argv, *flags, *both], port))
    assert reply.stdout.count("data: file") == 1  # rank 0 alone speaks
    assert_same_run(tmp_path / "one", tmp_path / "two")
    a, b = ((tmp_path / name / "eval.json").read_text().split('"seconds"')[0] for name in ("one", "two"))
    assert a.split('"cos_')[0] == b.split('"cos_')[0]  # exact, prefix, stopped


def test_killed_with_two_ranks_and_resumed_with_one(argv, tmp_path):
    argv = [*argv, "--checkpoint_every", "10", "--alpha", "0.5"]
    run([sys.executable, str(ROOT / "train.py"), *argv, "--out", str(tmp_path / "one")])
    meeting = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": "29615"}  # what torchrun would say; its own children outlive it
    both = [subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv, "--out", str(tmp_path / "two")],
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             env=meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]
    state, end = tmp_path / "two" / "state.pt", time.monotonic() + 120
    while not state.exists() and time.monotonic() < end:
        time.sleep(0.02)
    for process in both:
        process.kill()
        process.wait()
    assert state.exists() and not (tmp_path / "two" / "eval.json").exists()
    reply = run([sys.executable, str(ROOT / "train.py"), *argv, "--out", str(tmp_path / "two")])
    assert ", from step " in reply.stdout
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_negatives_need_one_process(argv, tmp_path):
    command = two([*argv, "--distance", "infonce", "--out", str(tmp_path / "run")], 29616)
    reply = subprocess.run(command, capture_output=True, text=True)
    assert reply.returncode != 0 and "and one process" in reply.stderr and not (tmp_path / "run").exists()
