"""From examples to steps: rows of ids, segment trees, packing, and which examples a step takes.

    fitting         do the examples fit into the context, and how long are they?
    collate_three   the three batches of jepa_loss.three_pass
    collate_fused   rows of segments for jepa_loss.fused; `python data.py show NAME` prints one
    Sampler         the examples of every step, fixed by (seed, step)
    ahead           a thread that makes batches before they are needed
"""
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from queue import Full, Queue
from threading import Event, Thread
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import Dataset, Example, Examples, Views, render_views
from support.files import BadInput
from jepa_loss import dense_mask
from support.tokenizer import Tokenizer

# ---- what fits ---------------------------------------------------------------------------------------------

def fitting(examples: Examples, tokenizer: Tokenizer, max_seq_len: int, on_long: str = "error",
            **view_options) -> tuple[Examples, np.ndarray]:
    """The examples whose sequences fit into max_seq_len tokens, and counts (N, 3), of each: tokens of main,
    tokens of its fused row with both views, labels. A longer one is BadInput, or dropped (on_long="drop")."""
    kept, counts = array("q"), array("q")
    for i, example in enumerate(examples):
        try:
            views = render_views(example, tokenizer, **view_options)
        except BadInput as error:
            raise BadInput(f"{example.where}: {error}") from None
        longest = max(len(views.main), len(views.stem) + len(views.preds), len(views.enc))
        if longest <= max_seq_len:
            kept.append(i)
            labels = sum(label != -100 for label in views.labels)
            counts.extend((len(views.main), len(lay_out(views).ids), labels))
        elif on_long == "error":
            raise BadInput(f"{example.where}: {longest} tokens, but the model's context is {max_seq_len}; "
                           "shorten it or pass --on_long drop")
    if not kept:
        raise BadInput(f"{examples[0].where}: this and all other examples of its split are longer than the "
                       f"model's context of {max_seq_len} tokens")
    if len(kept) < len(examples):
        print(f"dropped {len(examples) - len(kept)} of {len(examples)} examples: over {max_seq_len} tokens")
    return examples[np.array(kept)], np.array(counts).reshape(-1, 3)


def fit_splits(data: Dataset, *arguments, **options) -> np.ndarray:
    """`fitting` for train and test, in place: training and every later scoring see the same examples. Returns
    the counts of train."""
    data.train, counts = fitting(data.train, *arguments, **options)
    data.test, _ = fitting(data.test, *arguments, **options)
    return counts


class Rendered:
    """Views of the examples, by number, rendered when they are asked for; the last few thousand are kept."""

    def __init__(self, examples: Sequence[Example], tokenizer: Tokenizer, **view_options):
        def render(i: int) -> Views:
            return render_views(examples[i], tokenizer, **view_options)
        self.n, self.render = len(examples), lru_cache(maxsize=10_000)(render)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Views:
        return self.render(int(i))


# ---- many examples: batches --------------------------------------------------------------------------------

class Batch:
    def to(self, device: torch.device, wait: bool = False):
        """The same batch with its tensors on a device; to CUDA from pinned memory, without waiting for it."""
        def move(x):
            if not isinstance(x, Tensor):
                return x
            if device.type != "cuda" or wait:
                return x.to(device)
            return x.pin_memory().to(device, non_blocking=True)
        return type(self)(**{f.name: move(getattr(self, f.name)) for f in fields(self)})


@dataclass
class ThreePassBatch(Batch):
    """Three plain batches; the *_at are flat: row * T + column of the last token of each view."""
    ids: Tensor  # (B, T)
    labels: Tensor  # (B, T)
    label_at: Tensor  # (M,) where labels is not -100, flat
    pred_ids: Tensor | None  # (N, T'); None: no views
    pred_at: Tensor | None  # (N,)
    enc_ids: Tensor | None  # (N, T'')
    enc_at: Tensor | None  # (N,)
    n_tokens: int  # labels other than -100
    n_pairs: int  # examples, those without views included
    n_real: int  # tokens that are no pads
    n_visible: int  # (query, key) pairs among them that attention needs


@dataclass
class FusedBatch(Batch):
    """Rows of segments, see jepa_loss.py; the *_at are flat: row * T + column."""
    ids: Tensor  # (B, T)
    labels: Tensor  # (B, T)
    label_at: Tensor  # (M,) where labels is not -100, flat
    positions: Tensor  # (B, T)
    segment: Tensor | None  # (B, T), unique numbers in a row; None: each row is one segment and pads
    parent: Tensor | None  # (B, T)
    pred_at: Tensor | None  # (N,); None: no views
    enc_at: Tensor | None  # (N,)
    pair_weight: Tensor | None  # (N,) 1, or 0 where a pair only fills up a fixed shape; None: all are real
    n_tokens: int
    n_pairs: int
    n_real: int
    n_visible: int
    tube_at: Tensor | None = None  # (3, N), see jepa_loss.tube


def pad(rows: list[list[int]], value: int) -> Tensor:
    """(B, longest), filled up on the right."""
    out = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for row, ids in zip(out, rows, strict=True):
        row[:len(ids)] = ids
    return torch.from_numpy(out)


def labelled(labels: Tensor) -> Tensor:
    """(B, T) -> (M,): the flat positions that have a label."""
    return (labels.flatten() != -100).nonzero().squeeze(1)


def collate_three(examples: list[Views], keep: list[bool]) -> ThreePassBatch:
    """keep[i]: whether example i has views; loss dropout and lam = 0 take them away. Pads are 0: causal
    attention and labels keep them out, whatever their id."""
    def padded(rows: list[list[int]]) -> tuple[Tensor | None, Tensor | None]:
        """ids (N, T), and the flat position of each row's last token."""
        if not rows:
            return None, None
        ids = pad(rows, 0)
        return ids, torch.tensor([b * ids.shape[1] + len(row) - 1 for b, row in enumerate(rows)])

    main, labels = [v.main for v in examples], pad([v.labels for v in examples], -100)
    with_views = [v for v, has in zip(examples, keep, strict=True) if has]
    preds, encs = [v.stem + v.preds for v in with_views], [v.enc for v in with_views]
    label_at, lengths = labelled(labels), [len(row) for row in main + preds + encs]
    return ThreePassBatch(
        pad(main, 0), labels, label_at, *padded(preds), *padded(encs), n_tokens=len(label_at),
        n_pairs=len(examples), n_real=sum(lengths), n_visible=sum(n * (n + 1) // 2 for n in lengths))


@dataclass
class Tree:
    """One example as a row of segments, numbered from 0."""
    ids: list[int]
    labels: list[int]
    positions: list[int]
    segment: list[int]
    parent: list[int]
    pred_at: int | None = None
    enc_at: int | None = None

    def n_visible(self) -> int:
        """How many (query, key) pairs jepa_loss.visible shows."""
        parents, n = dict(zip(self.segment, self.parent, strict=True)), Counter(self.segment)
        return sum(n[s] * (n[s] + 1) // 2 + (n[s] * n[p] if p != s else 0) for s, p in parents.items())


def lay_out(views: Views, keep: bool = True) -> Tree:
    """Main first, then what the two views add to it. A view that is a prefix of main costs nothing: main is
    cut behind it, and [PRED] becomes a second branch there; any other view is a root segment of its own."""
    tree = Tree([], list(views.labels), [], [], [])

    def add(ids: list[int], parent: int | None = None, position: int = 0) -> int:
        """Append a segment, a root if it has no parent; return its number."""
        number = tree.segment[-1] + 1 if tree.segment else 0
        tree.ids += ids
        tree.positions += range(position, position + len(ids))
        tree.segment += [number] * len(ids)
        tree.parent += [number if parent is None else parent] * len(ids)
        return number

    if not keep:
        add(views.main)
        return tree
    n = len(views.stem)
    if views.stem == views.main[:n]:
        stem = add(views.stem)
        add(views.main[n:], stem, n)
        tree.pred_at = n - 1
    else:
        add(views.main)
        stem = add(views.stem)
        tree.pred_at = len(tree.ids) - 1
    if views.preds:
        add(views.preds, stem, n)
        tree.pred_at = len(tree.ids) - 1
    if views.enc == views.main[:len(views.enc)]:
        tree.enc_at = len(views.enc) - 1
    else:
        add(views.enc)
        tree.enc_at = len(tree.ids) - 1
    tree.labels += [-100] * (len(tree.ids) - len(tree.labels))
    return tree


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


class Shape(NamedTuple):
    """What every batch is filled up to, so that a compiled step meets one shape only."""
    rows: int
    tokens: int
    labels: int
    pairs: int


def filled(at: list[int] | Tensor, n: int, value: int) -> Tensor:
    """at, and then value, up to n numbers."""
    return torch.cat([torch.as_tensor(at, dtype=torch.long), torch.full((max(0, n - len(at)),), value)])


def collate_fused(examples: list[Views], keep: list[bool], row_len: int = 0,
                  shape: Shape | None = None) -> FusedBatch:
    """Rows of one example each, or of as many as fit into row_len tokens. keep[i]: has example i views?
    shape (with row_len): fill up to it with pads, labels of none and pairs of weight 0."""
    trees = [lay_out(views, kept) for views, kept in zip(examples, keep, strict=True)]
    lengths = [len(tree.ids) for tree in trees]
    rows = pack(lengths, row_len) if row_len else [[i] for i in range(len(trees))]
    B, T = len(rows), max(sum(lengths[i] for i in row) for row in rows)
    if shape is not None:
        B, T = max(B, shape.rows), max(T, shape.tokens)
    ids, positions = np.zeros((2, B, T), dtype=np.int64)
    labels = np.full((B, T), -100)
    segment = np.tile(np.arange(T), (B, 1))  # a pad's is its column: n tokens have no segment above n - 1
    parent = segment.copy()
    pred_at, enc_at = [], []
    for b, row in enumerate(rows):
        start = first = 0  # token, segment
        for i in row:
            tree, end = trees[i], start + lengths[i]
            ids[b, start:end], labels[b, start:end] = tree.ids, tree.labels
            positions[b, start:end] = tree.positions
            segment[b, start:end] = np.add(tree.segment, first)
            parent[b, start:end] = np.add(tree.parent, first)
            if tree.pred_at is not None:
                pred_at.append(b * T + start + tree.pred_at)
                enc_at.append(b * T + start + tree.enc_at)
            start, first = end, first + tree.segment[-1] + 1
    tensors = [torch.from_numpy(x) for x in (ids, labels, positions, segment, parent)]
    if not row_len and not any(keep):
        tensors[3:] = None, None
    label_at = labelled(tensors[1])
    n_tokens, weight = len(label_at), None
    if shape is not None:
        nothing = int((tensors[1].flatten() == -100).nonzero()[0])  # a position without a label
        label_at = filled(label_at, shape.labels, nothing)
        weight = filled([1] * len(pred_at), shape.pairs, 0).float()
        pred_at, enc_at = filled(pred_at, shape.pairs, 0), filled(enc_at, shape.pairs, 0)
    pred_at, enc_at = (torch.as_tensor(x) if len(x) else None for x in (pred_at, enc_at))
    return FusedBatch(
        *tensors[:2], label_at, *tensors[2:], pred_at=pred_at, enc_at=enc_at, pair_weight=weight,
        n_tokens=n_tokens, n_pairs=len(examples), n_real=sum(lengths),
        n_visible=sum(tree.n_visible() for tree in trees))


def tube_positions(lengths: list[int], row_len: int, draws: np.ndarray) -> Tensor:
    """(3, N), flat: positions s < r < t of row i's first lengths[i] tokens (3 or more), from draws (N, 3),
    each uniform in [0, 1)."""
    places = (np.sort(draws, axis=1) * (np.array(lengths)[:, None] - 2)).astype(np.int64) + [0, 1, 2]
    return torch.from_numpy((places + row_len * np.arange(len(lengths))[:, None]).T.copy())


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


def loss_dropout(n: int, alpha: float, seed: int, step: int) -> list[bool]:
    """Which of the n examples of a step keep their views: each with probability 1 - alpha, whatever the
    others do (the paper's LD, but per example and not per batch). The generator belongs to (seed, step)
    alone."""
    return (np.random.default_rng([seed, step, 1]).random(n) >= alpha).tolist()


def ahead(items: Iterator, n: int = 2) -> Iterator:
    """The same items, made by a thread of their own up to n of them ahead of the one that is taken."""
    made, stop, end = Queue(n), Event(), object()

    def offer(item) -> None:
        while not stop.is_set():
            try:
                return made.put(item, timeout=0.1)
            except Full:
                continue

    def run() -> None:
        try:
            for item in items:
                offer((item, None))
                if stop.is_set():
                    return
            offer((end, None))
        except BaseException as error:  # goes up where the item would have been taken
            offer((end, error))

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        thread.join()


# ---- a look at it ------------------------------------------------------------------------------------------

def picture(batch: FusedBatch, tokenizer: Tokenizer, row: int = 0, colour: bool = False) -> str:
    """One row of a fused batch as text: token, segment, parent, position, label, and the keys that it sees
    (#)."""
    names = [tokenizer.name(token) for token in batch.ids[row].tolist()]
    T, width = len(names), max(map(len, names))
    segment = torch.zeros(1, T, dtype=torch.long) if batch.segment is None else batch.segment[row, None]
    parent = segment if batch.segment is None else batch.parent[row, None]
    mask = dense_mask(segment, parent)[0, 0]
    flat = {"pred": batch.pred_at, "enc": batch.enc_at}
    picked = {name: set() if at is None else set(at.tolist()) for name, at in flat.items()}
    lines = [f"{'token':{width}} seg par pos {'label':{width}} sees"]
    for i, name in enumerate(names):
        label = batch.labels[row, i].item()
        line = (f"{name:{width}} {segment[0, i]:3} {parent[0, i]:3} {batch.positions[row, i]:3} "
                f"{'' if label == -100 else tokenizer.name(label):{width}} "
                + "".join("#" if mask[i, j] else "." for j in range(T)))
        line += "".join(f" <- {kind}" for kind, at in picked.items() if row * T + i in at)
        lines.append(f"\033[3{1 + segment[0, i].item() % 6}m{line}\033[0m" if colour else line)
    return "\n".join(lines)
