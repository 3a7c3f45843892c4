"""One process or many (torchrun): who writes, who waits, what is summed.

A step's examples are fixed by (seed, step); rank r takes every W-th of them. Losses are sums over all ranks
divided by counts over all ranks, so W ranks do what one process does (but for --lora_dropout, which each
draws for itself). Rank 0 alone writes, prints and scores.
"""
import contextlib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from support.files import BadInput

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")


def read_environment(environ: Mapping[str, str]) -> tuple[int, int, str]:
    """(rank, world, what is wrong with them) by the variables that torchrun sets; an empty one is not set."""
    given = {name: environ[name] for name in (*NUMBERS, "MASTER_ADDR") if environ.get(name)}
    for name in NUMBERS:
        if name in given and not re.fullmatch("[0-9]{1,9}", given[name]):
            return 0, 1, f"{name}={given[name]}: not a number; torchrun sets it, or unset it for one process"
    if not {"RANK", "WORLD_SIZE"} & given.keys() or int(given.get("WORLD_SIZE", 0)) == 1:
        return 0, 1, ""
    missing = [name for name in (*NUMBERS, "MASTER_ADDR") if name not in given]
    if missing:
        return 0, 1, (f"{', '.join(given)} set, but not {', '.join(missing)}: start the program with "
                      "torchrun, which sets them all, or unset RANK and WORLD_SIZE for one process")
    rank, world = int(given["RANK"]), int(given["WORLD_SIZE"])
    return rank, world, "" if rank < world else f"RANK={rank}: must be below WORLD_SIZE={world}"


rank, world, problem = read_environment(os.environ)


def join(device: torch.device) -> torch.device:
    """Meet the others, if any: gloo on a CPU, nccl beside it on CUDA. Returns this rank's device. BadInput if
    the environment does not say who they are."""
    if problem:
        raise BadInput(problem)
    if world == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if rank:
        sys.stdout = open(os.devnull, "w")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    from torch.distributed.nn import functional  # noqa: F401  imported later, it keeps the group past leave()
    dist.init_process_group(backend, timeout=timedelta(hours=8))  # the others wait while rank 0 scores
    return device


def leave() -> None:
    if world > 1:
        dist.destroy_process_group()


@contextlib.contextmanager
def zero_first():
    """Rank 0 goes through this block, then the others: it may have files to write that they will find."""
    if rank:
        dist.barrier()
    yield
    if world > 1 and not rank:
        dist.barrier()


def total(numbers: list) -> list:
    """The sums of these numbers over all ranks; floats, or all integers."""
    if world == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=None if type(numbers[0]) is int else torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def sum_gradients(weights: Iterable[nn.Parameter]) -> None:
    """Every gradient becomes the sum of all ranks' gradients; a rank without examples adds nothing. (A
    DistributedDataParallel does it while the backward runs, but wants the same backwards of every rank.)"""
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        if world > 1:
            dist.all_reduce(weight.grad)


DEVICES = ("auto", "cpu", "cuda", "mps")


def device_available(name: str) -> bool:
    asked = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    return name in DEVICES and asked.get(name, lambda: True)()


def pick_device(name: str) -> torch.device:
    """One of DEVICES; auto is the first that is there of cuda, mps, cpu. BadInput if it is not available."""
    if not device_available(name):
        raise BadInput(f"--device {name}: not available here")
    best = next(device for device in ("cuda", "mps", "cpu") if device_available(device))
    return torch.device(best if name == "auto" else name)
