"""One process or many (torchrun): who writes, who waits, what is summed, who holds which weights.

A step's examples are fixed by (seed, step); rank r takes every W-th of them. Losses are sums over all ranks
divided by counts over all ranks, so W ranks do what one process does (but for --lora_dropout, which each
draws for itself). Weights, gradients and optimizer state are cut into W parts by PyTorch's fully_shard
(FSDP2, arXiv 2304.11277); a block is whole only while it runs. Rank 0 alone writes, prints and scores.
"""
import contextlib
import copy
import gc
import os
import re
import sys
from collections.abc import Iterable, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

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
meshes = []  # of fully_shard


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
    from torch.distributed import fsdp  # noqa: F401  imported later, it keeps the group past leave()
    dist.init_process_group(backend, timeout=timedelta(hours=8))  # the others wait while rank 0 scores
    return device


def leave() -> None:
    if world > 1:
        gc.collect()
        for mesh in meshes:  # PyTorch's caches keep it: with its groups, gloo's threads would outlive them
            getattr(mesh, "_pg_registry", {}).clear()
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


# ---- who holds which weights -------------------------------------------------------------------------------

def shard(step: nn.Module, models: list[nn.Module], device: torch.device, dtype: str, how: str) -> None:
    """Move `step`, the module that is called, to a device, and cut the weights of the models in it into one
    part per rank, block by block: a rank holds its part, the embedding and the head, and a block or two.
    Gradients become sums over all ranks. dtype: of the forward, in which blocks are gathered; the parts are
    float32 (float64: both are). how "none": every rank keeps a whole copy."""
    full = how != "none"
    if world > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        names = ("shard",) if full else ("replicate", "shard")
        mesh = init_device_mesh(device.type, (world, 1)[:len(names)], mesh_dim_names=names)
        meshes.append(mesh)
        low = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for module in (*(block for model in models for block in model.layers), step):
        module.to(device, torch.float64 if dtype == "float64" else torch.float32)
        if world > 1:
            is_block = module is not step
            policy = low if dtype == "bfloat16" and is_block else MixedPrecisionPolicy()
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=full and is_block)
            module.set_force_sum_reduction_for_comms(True)  # not the mean over ranks
            module.set_gradient_divide_factor(1.0)


def whole(x):
    """A tensor of which each rank has a part, in one piece, on every rank; all of them must call this."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def part_of(x: Tensor, like: Tensor) -> Tensor:
    """This rank's part of x, where it has only a part of `like`."""
    if not hasattr(like, "full_tensor"):
        return x
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None).clone()


@torch.no_grad()
def gathered(tree):
    """Dicts and lists with whole tensors, on rank 0's CPU; without any elsewhere. All ranks must call it."""
    def gather(x):
        x = whole(x)
        return x if not isinstance(x, Tensor) else None if rank else x.cpu()
    return tree if world == 1 else tree_map(gather, tree)


def with_weights(model: nn.Module, weights: Iterable[Tensor]) -> nn.Module:
    """A copy of the model with these weights, in the order of model.parameters()."""
    pairs = zip(model.parameters(), weights, strict=True)
    return copy.deepcopy(model, {id(old): nn.Parameter(new, old.requires_grad) for old, new in pairs})


def without_weights(model: nn.Module) -> nn.Module | None:
    """What `whole_model` needs: a copy from before the model was cut into parts, which holds no weights."""
    return None if world == 1 else with_weights(model, [w.detach().to("meta") for w in model.parameters()])


def whole_model(model: nn.Module, blank: nn.Module | None) -> nn.Module | None:
    """The model, or of one in parts a whole copy on rank 0 and None elsewhere. All ranks must call this."""
    weights = gathered(list(model.parameters()))
    return model if world == 1 else None if rank else with_weights(blank, weights).to(model.device)


# ---- devices -----------------------------------------------------------------------------------------------

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
