"""From a pair (Text, Code) to the batches of a step.

    render_prompt     the tokens that an answer is generated after
    render_views      one pair as token ids: the main sequence with its labels, and the two views
    lay_out           the same as one row of segments, a tree (jepa_loss.py has the picture)
    collate_three     many pairs as the three batches of jepa_loss.three_pass
    collate_fused     many pairs as rows of segments for jepa_loss.fused
    micro_batches     the batches of a step, whose pairs are fixed by (seed, step)

    python data.py show nlrx_synth          one pair: tokens, segments, labels, attention (--png FILE: drawn)
    python data.py download nlrx_synth      fetch the published files at a pinned commit and check them

Pairs are read by tasks/datasets.py, tokenized by support/tokenizer.py.
Letters: B rows, T tokens in a row, N pairs with views, M labels, k predictor tokens.
"""
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jepa_loss import dense_mask
from support import distributed
from support.files import BadInput, main_guard, printable
from support.hf import BACKENDS
from support.hf_tokenizer import load_tokenizer
from support.pictures import draw_row
from support.settings import opt, parse_options
from support.speed import Sampler, Shape, pack, pad_to
from support.tokenizer import FORMATS, Tokenizer, train_bpe
from tasks.datasets import PUBLISHED, Dataset, Example, announce, dataset_paths, download, load_dataset
from tasks.datasets import read_jsonl
from tasks.scorers import SCORERS, check_databases

# ---- one pair: its views -----------------------------------------------------------------------------------

# needs: refused without it ("a|b": one of the two); identity: what makes two runs different, a setting's
# value, the content of the files that it names, or nothing (support/settings.py)
of_data = partial(opt, group="data")
of_views = partial(opt, group="objective", needs="lam|reg_weight")


@dataclass
class ViewOptions:
    """How a pair becomes token ids: what train.Config, eval.py and `data.py show` share."""
    k: int = of_views(1, "predictor tokens; 0: none", low=0)
    pred_first: bool = of_views(False, "[PRED] in front of Text, pred is Text's last token (an ablation)",
                                needs="lam|reg_weight k")
    reverse: bool = of_views(False, "Code predicts Text (an ablation)")
    pool: Literal["last", "mean"] = of_views("last", "which hidden states embed a view: its last token's, or "
                                             "all")
    view_end: bool = of_views(False, "the predicted view ends with the end token (an ablation)")
    ntp_on: Literal["all", "code"] = opt("all", "targets of L_LLM: every token, or only Code", group="labels",
                                         needs="gamma dataset!=paraphrase|init_from")
    train_eos: bool = opt(True, "is the end token a target? (off: the official labels, an ablation)",
                          group="labels", needs="gamma")


DEFAULT_VIEWS = ViewOptions()


@dataclass
class RunOptions(ViewOptions):
    """Which pairs, and how a model reads them: what train.Config and eval.py share."""
    dataset: str = of_data("nlrx_synth", f"{', '.join(PUBLISHED)}, or the path of a .jsonl file",
                           identity="content")
    data_dir: str = of_data("data", "where the published files are", identity="nothing",
                            needs="dataset!=*.jsonl")
    test_file: str = of_data("", "the test split of a dataset of your own", identity="nothing",
                             needs="dataset=*.jsonl eval_split=test")
    scorer: Literal[("", *SCORERS)] = of_data("", "of a dataset of your own, beside exact match",
                                              needs="dataset=*.jsonl")
    databases: str = of_data("", "of --scorer sql: folder of DB_ID/DB_ID.sqlite", identity="nothing",
                             needs="scorer=sql")
    n_train: int = of_data(0, "train on the first N examples; 0: all", low=0)
    n_test: int = of_data(0, "score on the first N examples; 0: all", low=0)
    eval_split: Literal["test", "valid"] = of_data("test", "valid: the last tenth of train, held out")
    on_long: Literal["error", "drop"] = of_data("error", "what an example longer than the context is")
    format: Literal[FORMATS] = of_data("auto", "of conversations; auto: by tokens; template: the folder's",
                                       needs="init_from")
    backend: Literal[BACKENDS] = opt("auto", "whose model code; auto: transformers' where model_type is not "
                                     "llama", group="model", needs="init_from")
    predictor: Literal["tokens", "linear", "mlp"] = of_views("tokens", "[PRED] alone, or a head as well")
    layer: int = of_views(-1, "embed views after this block; -1: after the final norm", low=-1)


def load(o: RunOptions) -> Dataset:
    """The pairs of a run; prints where they come from. BadInput if they are not here, or their databases."""
    data = load_dataset(o.dataset, o.data_dir, o.test_file, o.n_train, o.eval_split, o.n_test, o.scorer,
                        o.databases)
    announce(data)
    check_databases(data)
    return data


class Views(NamedTuple):
    """One pair as token ids."""
    main: list[int]  # <|begin|> TEXT <|sep|> CODE <|end|>, or the conversation of another format
    labels: list[int]  # labels[i]: the id that main[i] must predict, or -100
    stem: list[int]  # the view that predicts, without the [PRED] after it: <|begin|> TEXT
    preds: list[int]  # the [PRED] tokens that continue it; empty with pred_first, which has them in the stem
    enc: list[int]  # the view that is predicted: <|begin|> CODE
    pool: str = "last"  # which of a view's tokens embed it: the last one, or all (mean)


def render_prompt(example: Example, tokenizer: Tokenizer) -> list[int]:
    """Main up to where the answer begins. Text is tokenized apart from the marks around it, so training and
    generation share the prompt's ids."""
    f, text = tokenizer.format, example.text
    if f.system_in_user and example.system:
        text = f"{example.system}\n\n{text}"
    ids = [*f.start, *(() if example.system else f.no_system)]
    for role, said in (("system", example.system), ("user", text)):
        if (said or role == "user") and role in f.opening:  # the plain format has no system turn
            ids += f.opening[role] + tokenizer.encode(said) + f.closing[role]
    return ids + f.opening["assistant"]


def render_views(example: Example, tokenizer: Tokenizer, o: ViewOptions = DEFAULT_VIEWS) -> Views:
    """Main in the tokenizer's format; each view is one turn, without its end and without a system turn."""
    f, encode = tokenizer.format, tokenizer.encode
    code = encode(example.code)
    # [0] predicts, [1] is predicted
    openings = [[*f.start, *f.opening[role]] for role in ("user", "assistant")]
    views = [encode(example.text_view or example.text), encode(example.code_view) or code]
    if example.text_only:
        main, answer_at = [*openings[0], *views[0], f.end], len(openings[0])
        code = views[0]  # what ntp_on="code" trains on, there being nothing else
    else:
        prompt = render_prompt(example, tokenizer)
        main, answer_at = [*prompt, *code, *f.closing["assistant"]], len(prompt)
    labels = [*main[1:], -100]
    if o.ntp_on == "code":  # the token in front of the answer predicts its first, the last one the end token
        end_at = answer_at + len(code)
        labels = [label if answer_at <= i + 1 <= end_at else -100 for i, label in enumerate(labels)]
    if not o.train_eos:
        labels = [-100 if label == f.end else label for label in labels]
    if o.reverse:
        openings, views = openings[::-1], views[::-1]
    preds = [tokenizer.vocab_size + i for i in range(o.k)]
    enc = [*openings[1], *views[1], *([f.end] if o.view_end else [])]
    if o.pred_first:
        return Views(main, labels, openings[0] + preds + views[0], [], enc, o.pool)
    return Views(main, labels, openings[0] + views[0], preds, enc, o.pool)


def own_tokenizer(examples: Iterable[Example], vocab_size: int) -> Tokenizer:
    """Byte-level BPE, trained on their texts and codes."""
    ranks = train_bpe((said for e in examples for said in (e.text, e.code)), vocab_size)
    return Tokenizer(ranks)


def fit(examples: Sequence[Example], tokenizer: Tokenizer, max_seq_len: int, on_long: str = "error",
        o: ViewOptions = DEFAULT_VIEWS) -> tuple[Sequence[Example], np.ndarray]:
    """The examples whose sequences fit into max_seq_len tokens, and the tokens of main of each (N,). A longer
    one is BadInput, or dropped (on_long="drop"): never cut."""
    fitting, lengths = array("q"), array("q")  # a million examples take 16 MB
    for i, example in enumerate(examples):
        try:
            views = render_views(example, tokenizer, o)
        except BadInput as error:
            raise BadInput(f"{example.where}: {error}") from None
        longest = max(len(views.main), len(views.stem) + len(views.preds), len(views.enc))
        if longest <= max_seq_len:
            fitting.append(i)
            lengths.append(len(views.main))
        elif on_long == "error":
            raise BadInput(f"{example.where}: {longest} tokens, but the model's context is {max_seq_len}; "
                           "shorten it or pass --on_long drop")
    if not fitting:
        raise BadInput(f"{examples[0].where}: this and all other examples of its split are longer than the "
                       f"model's context of {max_seq_len} tokens")
    if len(fitting) < len(examples):
        n = len(examples)
        print(f"dropped {n - len(fitting)} of {n} examples: over {max_seq_len} tokens")
    return examples[np.array(fitting)], np.array(lengths)


def fit_splits(data: Dataset, *arguments) -> np.ndarray:
    """`fit` for train and test, in place: training and every later scoring see the same examples. Returns the
    lengths of train."""
    data.train, lengths = fit(data.train, *arguments)
    data.test, _ = fit(data.test, *arguments)
    return lengths


# ---- one pair: its tree of segments ------------------------------------------------------------------------

def causal(lengths: Iterable[int]) -> int:
    """How many (query, key) pairs causal attention shows in rows of these lengths."""
    return sum(n * (n + 1) // 2 for n in lengths)


@dataclass
class Tree:
    """One pair as a row of segments, numbered from 0; pred_at, enc_at: the tokens that embed each view."""
    ids: list[int]
    labels: list[int]
    positions: list[int]
    segment: list[int]
    parent: list[int]
    pred_at: Sequence[int] = ()
    enc_at: Sequence[int] = ()

    def n_visible(self) -> int:
        """How many (query, key) pairs jepa_loss.visible shows."""
        parents, n = dict(zip(self.segment, self.parent, strict=True)), Counter(self.segment)
        return causal(n.values()) + sum(n[s] * n[p] for s, p in parents.items() if p != s)


def embedding_tokens(tokens: Sequence[int], pool: str) -> Sequence[int]:
    """Which of a view's tokens embed it."""
    return tokens if pool == "mean" else tokens[-1:]


def lay_out(views: Views, has_views: bool = True) -> Tree:
    """Main first, then what the two views add to it. A view that is a prefix of main costs nothing (main is
    cut after the one that predicts, and [PRED] becomes a second branch there); any other is a root segment of
    its own."""
    tree = Tree([], list(views.labels), [], [], [])

    def add(ids: list[int], parent: int | None = None, position: int = 0) -> tuple[int, range]:
        """Append a segment, a root if it has no parent; return its number and its tokens."""
        number = tree.segment[-1] + 1 if tree.segment else 0
        tokens = range(len(tree.ids), len(tree.ids) + len(ids))
        tree.ids += ids
        tree.positions += range(position, position + len(ids))
        tree.segment += [number] * len(ids)
        tree.parent += [number if parent is None else parent] * len(ids)
        return number, tokens

    if not has_views:
        add(views.main)
        return tree
    n = len(views.stem)
    if views.stem == views.main[:n]:
        stem, stem_at = add(views.stem)
        add(views.main[n:], stem, n)
    else:
        add(views.main)
        stem, stem_at = add(views.stem)
    _, preds_at = add(views.preds, stem, n)
    enc_at = range(len(views.enc))
    if views.enc != views.main[:len(views.enc)]:
        _, enc_at = add(views.enc)
    tree.pred_at = embedding_tokens([*stem_at, *preds_at], views.pool)
    tree.enc_at = embedding_tokens(enc_at, views.pool)
    tree.labels += [-100] * (len(tree.ids) - len(tree.labels))
    return tree


# ---- many pairs: a batch -----------------------------------------------------------------------------------

@dataclass(kw_only=True)
class Batch:
    """What both kinds of batches have. All *_at are flat: row * T + column."""
    ids: Tensor  # (B, T)
    labels: Tensor  # (B, T), -100: none
    label_at: Tensor  # (M,) where labels is not -100
    main_at: Tensor  # (examples,) the first token of each example's main
    lengths: Tensor  # (examples,) tokens of main
    pred_at: Tensor | None = None  # (N,) or (N, L) what embeds each view (jepa_loss.gather); None: no views
    enc_at: Tensor | None = None  # the same
    tube_at: Tensor | None = None  # (3 or 4, examples), see jepa_loss.tube and patch
    n_tokens: int  # labels
    n_pairs: int  # examples, those without views included
    n_real: int  # tokens that are no pads
    n_visible: int  # (query, key) pairs among them that attention needs
    for_ema: tuple[int, int]  # n_real, n_visible of what a moving average goes over

    def to(self, device: torch.device, wait: bool = False):
        """The same batch with its tensors on a device; to CUDA from pinned memory, without waiting for it."""
        def move(x):
            if not isinstance(x, Tensor):
                return x
            if device.type != "cuda" or wait:
                return x.to(device)
            return x.pin_memory().to(device, non_blocking=True)
        return type(self)(**{f.name: move(getattr(self, f.name)) for f in fields(self)})


@dataclass(kw_only=True)
class ThreePassBatch(Batch):
    """Three plain batches: ids, and one for each view."""
    pred_ids: Tensor | None = None  # (N, T'); None: no views
    enc_ids: Tensor | None = None  # (N, T'')


@dataclass(kw_only=True)
class FusedBatch(Batch):
    """Rows of segments, see jepa_loss.py."""
    positions: Tensor  # (B, T)
    segment: Tensor | None  # (B, T), unique numbers in a row; None: each row is one example without views
    parent: Tensor | None  # (B, T)


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(B, longest), filled up on the right."""
    out = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for row, ids in zip(out, rows, strict=True):
        row[:len(ids)] = ids
    return torch.from_numpy(out)


def positions_at(tokens: list[Sequence[int]]) -> Tensor | None:
    """What jepa_loss.gather takes: (N,) if there is one token each, else (N, most), filled up with -1."""
    if not tokens:
        return None
    at = pad(tokens, -1)
    return at[:, 0] if at.shape[1] == 1 else at


def labelled(labels: Tensor) -> Tensor:
    """(B, T) -> (M,): the flat positions that have a label."""
    return (labels.flatten() != -100).nonzero().squeeze(1)


def collate_three(examples: list[Views], has_views: Sequence[bool]) -> ThreePassBatch:
    """has_views: False where loss dropout took them away, or no term needs them. Pads are 0: causal attention
    and labels keep them out, whatever their id."""
    def padded(rows: list[list[int]]) -> tuple[Tensor | None, Tensor | None]:
        """ids (N, T), and the flat positions of the tokens that embed each row."""
        if not rows:
            return None, None
        ids, pool = pad(rows, 0), examples[0].pool
        T = ids.shape[1]
        return ids, positions_at([embedding_tokens(range(b * T, b * T + len(row)), pool)
                                  for b, row in enumerate(rows)])

    mains, labels = [v.main for v in examples], pad([v.labels for v in examples], -100)
    with_views = [v for v, has in zip(examples, has_views, strict=True) if has]
    preds, encs = [v.stem + v.preds for v in with_views], [v.enc for v in with_views]
    (pred_ids, pred_at), (enc_ids, enc_at) = padded(preds), padded(encs)
    label_at, lengths = labelled(labels), [len(row) for row in mains + preds + encs]
    enc_lengths = lengths[len(lengths) - len(encs):]
    return ThreePassBatch(
        ids=pad(mains, 0), labels=labels, label_at=label_at,
        main_at=torch.arange(len(mains)) * labels.shape[1], lengths=torch.tensor(lengths[:len(mains)]),
        pred_ids=pred_ids, pred_at=pred_at, enc_ids=enc_ids, enc_at=enc_at, n_tokens=len(label_at),
        n_pairs=len(examples), n_real=sum(lengths), n_visible=causal(lengths),
        for_ema=(sum(enc_lengths), causal(enc_lengths)))


def collate_fused(examples: list[Views], has_views: Sequence[bool], row_len: int = 0) -> FusedBatch:
    """Rows of one example each, or of as many as fit into row_len tokens."""
    trees = [lay_out(views, has) for views, has in zip(examples, has_views, strict=True)]
    lengths = [len(tree.ids) for tree in trees]
    rows = pack(lengths, row_len) if row_len else [[i] for i in range(len(trees))]
    B, T = len(rows), max(sum(lengths[i] for i in row) for row in rows)
    ids, positions = np.zeros((2, B, T), dtype=np.int64)
    labels = np.full((B, T), -100)
    segment = np.tile(np.arange(T), (B, 1))  # each pad is its own segment, numbered by its column so that it
    parent = segment.copy()  # cannot clash: n tokens have no segment above n - 1
    main_at, pred_at, enc_at = np.zeros(len(trees), dtype=np.int64), [], []
    for b, row in enumerate(rows):
        start = first = 0  # token, segment
        for i in row:
            tree, end = trees[i], start + lengths[i]
            ids[b, start:end], labels[b, start:end] = tree.ids, tree.labels
            positions[b, start:end] = tree.positions
            segment[b, start:end] = np.add(tree.segment, first)
            parent[b, start:end] = np.add(tree.parent, first)
            main_at[i] = b * T + start
            if tree.pred_at:
                pred_at.append([b * T + start + at for at in tree.pred_at])
                enc_at.append([b * T + start + at for at in tree.enc_at])
            start, first = end, first + tree.segment[-1] + 1
    ids, labels, positions, segment, parent = map(torch.from_numpy, (ids, labels, positions, segment, parent))
    if not row_len and not any(has_views):
        segment = parent = None
    label_at, n_visible = labelled(labels), sum(tree.n_visible() for tree in trees)
    return FusedBatch(
        ids=ids, labels=labels, label_at=label_at, positions=positions, segment=segment, parent=parent,
        main_at=torch.from_numpy(main_at), lengths=torch.tensor([len(v.main) for v in examples]),
        pred_at=positions_at(pred_at), enc_at=positions_at(enc_at),
        n_tokens=len(label_at), n_pairs=len(examples), n_real=sum(lengths),
        n_visible=n_visible, for_ema=(sum(lengths), n_visible) if any(has_views) else (0, 0))


def tube_positions(batch: Batch, draws: np.ndarray, form: str = "paper") -> Tensor:
    """(3, examples), flat: positions s < r < t of each example's main (3 tokens or more), from draws
    (examples, 3), each uniform in [0, 1). form "released": (4, examples), see jepa_loss.patch."""
    n = batch.lengths.numpy()[:, None]
    places = (np.sort(draws, axis=1) * (n - 2)).astype(np.int64) + [0, 1, 2]
    if form == "released":
        places = np.concatenate([0 * n, places[:, :2], n - 1], axis=1)
    return torch.from_numpy((places + batch.main_at.numpy()[:, None]).T.copy())


# ---- all pairs: which ones a step takes --------------------------------------------------------------------

def loss_dropout(n: int, alpha: float, seed: int, step: int) -> np.ndarray:
    """Which of the n examples of a step keep their views: each with probability 1 - alpha, whatever the
    others do (the paper's LD, but per example and not per batch). The generator belongs to (seed, step)
    alone."""
    return np.random.default_rng([seed, step, 1]).random(n) >= alpha


PAD = Views([0], [-100], [0], [], [0])  # stands in for an example


def collate_share(collate: Callable, views: list[Views], has_views: Sequence[bool], need: bool) -> Batch:
    """The batch of one rank. All ranks must make the same forwards: one that has no example, or none with
    views where another has (`need`), makes them over a pad, which counts nowhere and is of no pair."""
    if len(views) and any(has_views) == need:
        return collate(views, has_views)
    batch, pad = collate([*views, PAD], [*has_views, need]), collate([PAD], [need])
    return replace(batch, main_at=batch.main_at[:-1], lengths=batch.lengths[:-1], n_pairs=len(views),
                   n_real=batch.n_real - pad.n_real, n_visible=batch.n_visible - pad.n_visible,
                   for_ema=tuple(a - b for a, b in zip(batch.for_ema, pad.for_ema, strict=True)),
                   pred_at=batch.pred_at[:0] if need else None, enc_at=batch.enc_at[:0] if need else None)


def micro_batches(c, rendered: Callable[[int], Views], sampler: Sampler, step: int,
                  shape: Shape | None = None) -> list[Batch]:
    """This rank's share of a step's examples, collated in groups of at most --micro_batch. Examples that loss
    dropout leaves without views stand apart, where a row is one example: they are shorter, and need no mask.

    c: train.Config; rendered(i): example i; shape: fill up to it
    """
    indices = sampler.indices(step)
    n = len(indices)
    has_views = loss_dropout(n, c.alpha, c.seed, step)
    if not c.lam and not c.reg_weight:
        has_views[:] = False
    draws = np.random.default_rng([c.seed, step, 3]).random((n, 3))
    size, batches = (c.micro_batch or n) * distributed.world, []
    # places in the step, of all ranks; indices[place] is the example
    for group in (np.arange(start, min(start + size, n)) for start in range(0, n, size)):
        parts, collate = [group], partial(collate_fused, row_len=c.row_len)
        if c.passes == "three":
            collate = collate_three
        elif not c.row_len:
            parts = [part for part in (group[has_views[group]], group[~has_views[group]]) if len(part)]
        for part in parts:
            mine = part[part % distributed.world == distributed.rank]
            batch = collate_share(collate, [rendered(int(indices[i])) for i in mine], has_views[mine],
                                  any(has_views[part]))
            batch = pad_to(batch, shape) if shape else batch
            batch.tube_at = tube_positions(batch, draws[mine], c.stp_form) if c.stp else None
            batches.append(batch)
    return batches


# ---- a look at it ------------------------------------------------------------------------------------------

def picture(batch: FusedBatch, tokenizer: Tokenizer, row: int = 0, colour: bool = False) -> str:
    """One row of a fused batch with views as text: token, segment, parent, position, label, and the keys that
    it sees (#)."""
    names = [tokenizer.name(token) for token in batch.ids[row].tolist()]
    T, width = len(names), max(map(len, names))
    mask = dense_mask(batch.segment[row, None], batch.parent[row, None])[0, 0]  # (T, T)
    lines = [f"{'token':{width}} seg par pos {'label':{width}} sees"]
    for i, name in enumerate(names):
        segment, parent, position, label = (
            x[row, i].item() for x in (batch.segment, batch.parent, batch.positions, batch.labels))
        line = (f"{name:{width}} {segment:3} {parent:3} {position:3} "
                f"{'' if label == -100 else tokenizer.name(label):{width}} "
                + "".join("#" if mask[i, j] else "." for j in range(T)))
        line += "".join(f" <- {view}" for view, at in (("pred", batch.pred_at), ("enc", batch.enc_at))
                        if row * T + i in at.flatten())
        lines.append(f"\033[3{1 + segment % 6}m{line}\033[0m" if colour else line)
    return "\n".join(lines)


@dataclass
class ShowOptions(ViewOptions):
    command: Literal["show", "download"] = opt("", "print one pair, or fetch a dataset and check it")
    name: str = opt("", f"{', '.join(PUBLISHED)}; show: or the path of a .jsonl file")
    data_dir: str = opt("data", "where the published files are", needs="name!=*.jsonl")
    base_url: str = opt("", "a mirror of the published files", needs="command=download")
    index: int = opt(0, "which training example", low=0, needs="command=show")
    vocab_size: int = opt(512, "of a tokenizer of the train split's own", low=256,
                          needs="command=show !init_from")
    init_from: str = opt("", "a model folder, for its tokenizer", needs="command=show")
    format: Literal[FORMATS] = opt("auto", "of conversations", needs="init_from")
    backend: Literal[BACKENDS] = opt("auto", "see train.py", needs="init_from")
    png: str = opt("", "draw segments and attention into this file", needs="command=show")


def show(o: ShowOptions) -> None:
    """Print one pair as `collate_fused` lays it out."""
    paths, source = dataset_paths(o.name, Path(o.data_dir), "")
    train = read_jsonl(paths["train"])
    if o.index >= len(train):
        raise BadInput(f"--index {o.index}: there are {len(train)} training examples")
    example = replace(train[o.index], text_only=o.name == "paraphrase")
    if o.init_from:
        tokenizer = load_tokenizer(o.init_from, format=o.format, backend=o.backend)
    else:
        tokenizer = own_tokenizer(train, o.vocab_size)
    batch = collate_fused([render_views(example, tokenizer, o)], [True])
    print(printable(f"{example.where} ({source})\ntext: {example.text}\ncode: {example.code}\n", keep="\t\n"))
    print(picture(batch, tokenizer, colour=sys.stdout.isatty()))
    if o.png:
        names = [tokenizer.name(token) for token in batch.ids[0].tolist()]
        draw_row(o.png, example.where, names, batch.segment[0].tolist(), batch.parent[0].tolist(),
                 dense_mask(batch.segment, batch.parent)[0, 0])


def main() -> None:
    o = parse_options(ShowOptions, description=__doc__, positional=("command", "name"))
    if o.command == "show":
        return show(o)
    for f in fields(ViewOptions):
        if getattr(o, f.name) != f.default:
            raise BadInput(f"--{f.name} has no effect with download")
    download(o.name, o.data_dir, o.base_url)


if __name__ == "__main__":
    with main_guard():
        main()
