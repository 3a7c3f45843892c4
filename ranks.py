"""One process or many (torchrun): who writes, who waits, what is summed.

A step's examples are fixed by (seed, step); rank r takes every W-th of them. Losses are sums over all ranks
divided by counts over all ranks, so W ranks do what one process does. Rank 0 alone writes, prints and scores.
"""
import contextlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

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


def total(x: Tensor) -> Tensor:
    """The sum of x over all ranks."""
    if world > 1:
        dist.all_reduce(x)
    return x


def counts(*numbers: int) -> list[int]:
    """Sums over all ranks, without waiting for an accelerator."""
    return total(torch.tensor(numbers)).tolist() if world > 1 else list(numbers)


def shared(module: nn.Module, device: torch.device) -> nn.Module:
    """The module; its gradients are averaged over the ranks in the backward."""
    if world == 1:
        return module
    return nn.parallel.DistributedDataParallel(module, [device] if device.type == "cuda" else None)


def unshared(module: nn.Module, last: bool):
    """A context in which a backward leaves the gradients to the last one of its step."""
    return contextlib.nullcontext() if world == 1 or last else module.no_sync()
