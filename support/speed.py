"""What keeps a processor busy, and is no part of the method.

A batch is a dataclass of tensors: (B, T) with B rows of T tokens, or flat positions, row * T + column, whose
names end in _at.
"""
import timeit
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def product_seconds(dtype: torch.dtype) -> float:
    """A matrix product on one thread of the CPU: the fastest of fifty short ones, which other work seldom
    interrupts."""
    x, n = torch.ones(256, 256, dtype=dtype), torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = min(timeit.repeat(lambda: x @ x, number=1, repeat=50))
    torch.set_num_threads(n)
    return seconds


def forward_dtype(name: str, device: torch.device) -> str:
    """The number type of the forward; auto: bfloat16 where it is native and, on a CPU, clearly faster: some
    Xeons have the instruction, at half the speed of float32."""
    if name != "auto":
        return name
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        native = any(torch.cpu.get_capabilities().get(kind) for kind in ("avx512_bf16", "amx_bf16"))
        native = native and product_seconds(torch.bfloat16) < 0.75 * product_seconds(torch.float32)
    return "bfloat16" if native else "float32"


class Sampler:
    """The examples of every step, fixed by (seed, step): each epoch is shuffled anew, cut into pools of 16
    batches, each pool sorted by length so that a batch pads little, and the batches of the epoch shuffled."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed = np.array(lengths), batch_size, seed
        self.steps_per_epoch = -(-len(lengths) // batch_size)
        self.epoch_batches = lru_cache(maxsize=1)(self._epoch_batches)

    def _epoch_batches(self, epoch: int) -> list[np.ndarray]:
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.lengths))
        batches = []
        for start in range(0, len(order), 16 * self.batch_size):
            pool = order[start:start + 16 * self.batch_size]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            batches += [pool[i:i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
        return [batches[i] for i in generator.permutation(len(batches))]

    def indices(self, step: int) -> np.ndarray:
        """Example numbers of step 0, 1, ..., sorted by length; an epoch's last pool may end in a smaller
        batch."""
        epoch, i = divmod(step, self.steps_per_epoch)
        return self.epoch_batches(epoch)[i]


def pack(lengths: list[int], row_len: int) -> list[list[int]]:
    """Rows of example numbers, each of at most row_len tokens (or one longer example): longest first, each
    into the first row with room."""
    rows, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max(row_len, lengths[i]))
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def prefetch(make: Callable[[int], list], steps: range) -> Iterator[list]:
    """make(step) for every step; a thread makes the next two while one is used."""
    with ThreadPoolExecutor(1) as pool:
        made = deque(pool.submit(make, step) for step in steps[:2])
        for step in steps:
            ready = made.popleft().result()
            if step + 2 in steps:
                made.append(pool.submit(make, step + 2))
            yield ready


class Shape(NamedTuple):
    rows: int
    tokens: int
    labels: int
    pairs: int


def shape_of(batch) -> Shape:
    return Shape(*batch.ids.shape, len(batch.label_at), 0 if batch.pred_at is None else len(batch.pred_at))


def largest_shape(make: Callable[[int], list], steps: int) -> Shape:
    """What the largest batch of these steps needs."""
    shapes = [shape_of(batch) for step in range(steps) for batch in make(step)]
    return Shape(*map(max, zip(*shapes, strict=True)))


def pad_to(batch, shape: Shape):
    """The same data.FusedBatch, filled up with pads, labels of none, and pairs of a position with itself,
    whose distance and gradient are 0."""
    (B, T), (rows, tokens, labels, pairs) = batch.ids.shape, map(max, shape, shape_of(batch))

    def grow(x: Tensor, value: int | Tensor) -> Tensor:  # (B, T) -> (rows, tokens)
        grown = torch.empty(rows, tokens, dtype=torch.long).copy_(torch.as_tensor(value))
        grown[:B, :T] = x
        return grown

    def move(at: Tensor | None, n: int, value: int) -> Tensor | None:  # n flat positions in the new shape
        if at is None and not n:
            return None
        at = torch.zeros(0, dtype=torch.long) if at is None else at // T * tokens + at % T
        return torch.cat([at, torch.full((n - len(at),), value)])

    own = torch.arange(tokens)
    return replace(
        batch, ids=grow(batch.ids, 0), labels=grow(batch.labels, -100), positions=grow(batch.positions, 0),
        segment=grow(batch.segment, own), parent=grow(batch.parent, own),
        label_at=move(batch.label_at, labels, tokens - 1),  # the last token of a row has no label
        main_at=move(batch.main_at, len(batch.main_at), 0),
        pred_at=move(batch.pred_at, pairs, 0), enc_at=move(batch.enc_at, pairs, 0))
