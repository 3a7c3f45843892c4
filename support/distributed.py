"""One process or many (torchrun): who writes, who waits, what is summed.

A step's examples are fixed by (seed, step); rank r takes every W-th of them. Losses are sums over all ranks
divided by counts over all ranks, so W ranks do what one process does (but for --lora_dropout, which each
draws for itself). Rank 0 alone writes, prints and scores.
"""
import contextlib
import os
import sys
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from support.files import BadInput

DEVICES = ("auto", "cpu", "cuda", "mps")
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join(device: torch.device) -> torch.device:
    """Meet the others, if any: gloo on a CPU, nccl beside it on CUDA. Returns this rank's device."""
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


def device_available(name: str) -> bool:
    return {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(name, lambda: True)()


def pick_device(name: str) -> torch.device:
    """The device of this name, one of DEVICES; auto: the first available of cuda, mps, cpu. BadInput if it is
    not available."""
    if not device_available(name):
        raise BadInput(f"--device {name}: not available here")
    best = next(device for device in ("cuda", "mps", "cpu") if device_available(device))
    return torch.device(best if name == "auto" else name)
