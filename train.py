"""Train LLM-JEPA, from scratch or from a checkpoint: settings, the loop, resume.

    python train.py --dataset nlrx_synth                    LLM-JEPA with all defaults
    python train.py --dataset nlrx_synth --lam 0            the baseline: plain next-token training
    python train.py --dataset nlrx_synth --passes three     the paper's three passes, not the fused one
    python train.py --dataset my.jsonl --test_file my_test.jsonl
    python train.py --dataset gsm8k --init_from DIR         fine-tune the Llama-style model of a Hugging Face
                                                            folder, or a run; --lora_rank 64: adapters only
    torchrun --nproc_per_node 2 train.py --dataset nlrx_synth   the same losses from two processes

A run folder holds run.json (settings, data, versions), metrics.jsonl (an object per logged step), state.pt
(the last checkpoint: weights, optimizer, step), and at the end the model as a Hugging Face folder has it and
eval.json. The same command started again goes on where the last checkpoint left it, and ends with the same
weights, bit for bit on a CPU: nothing in a run depends on anything but (seed, step).
"""
import argparse
import dataclasses
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import ranks
from data import PUBLISHED, Dataset, Rendered, Sampler, Shape, Views, ahead, announce, collate_fused
from data import collate_three, fit_splits, load_dataset, loss_dropout, pack, tube_positions
from eval import VIEW_OPTIONS, default_max_new_tokens, evaluate
from files import BadInput, Parser, main_guard, read_json, write_text
from jepa_loss import DISTANCES, Losses, dense_mask, flex_mask, fused, stop_gradient, three_pass
from jepa_loss import total_loss
from model import DEVICES, PRESETS, ModelConfig, Transformer, device_available, pick_device
from published import sha256
from report import brief, table
from runs import Metrics, git_commit, open_run, restore, save_state, summary, trainable
from scores import check_databases
from tokenizer import CARRIED, FORMATS, Tokenizer, train_bpe

# ---- settings ----------------------------------------------------------------------------------------------


def opt(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every setting of a run: `--name value` on the command line, and an entry of run.json."""
    # data
    dataset: str = opt("nlrx_synth", f"{', '.join(PUBLISHED)}, or the path of a .jsonl file")
    data_dir: str = opt("data", "where the published files are")
    test_file: str = opt("", "the test split of a dataset of your own")
    view2: str = opt("", "a file with other texts for the codes of train, line by line: the view to predict")
    n_train: int = opt(0, "train on the first N examples; 0: all")
    n_test: int = opt(0, "score on the first N examples; 0: all")
    eval_split: Literal["test", "valid"] = opt("test", "valid: score on the last tenth of train, held out")
    on_long: Literal["error", "drop"] = opt("error", "what an example longer than the context is")
    vocab_size: int = opt(512, "at most so many byte-level BPE tokens, trained on the train split")
    format: Literal[FORMATS] = opt("auto", "of conversations; auto: by the tokenizer's special tokens")
    # model
    init_from: str = opt("", "a Hugging Face folder of a Llama-style model, or a run: begin with its weights")
    lora_rank: int = opt(0, "train adapters of this rank in place of the weights; 0: the weights")
    lora_dropout: float = opt(0.1, "in front of the adapters")
    preset: Literal[tuple(PRESETS)] = opt("nano", "shape of the model")
    dim: int = opt(0, "width C; 0: the preset's")
    n_layers: int = opt(0, "blocks; 0: the preset's")
    n_heads: int = opt(0, "query heads; 0: the preset's")
    n_kv_heads: int = opt(0, "key-value heads; 0: the preset's")
    ffn_dim: int = opt(0, "inner width of the MLP; 0: the preset's")
    max_seq_len: int = opt(0, "context in tokens; 0: the preset's")
    # objective: gamma * L_LLM + lam * d(Pred(Enc(Text)), Enc(Code))
    lam: float = opt(1.0, "weight of the JEPA loss; 0: plain next-token training")
    objective: Literal["jepa", "stp"] = opt("jepa", "stp: Semantic Tube Prediction in place of d: no views")
    gamma: float = opt(1.0, "weight of the next-token loss")
    k: int = opt(1, "predictor tokens; 0: Pred is the identity")
    distance: Literal[tuple(DISTANCES)] = opt("cosine", "d")
    temperature: float = opt(0.07, "of --distance infonce")
    stop_gradient: bool = opt(False, "no gradient into Enc(Code), the target")
    passes: Literal["fused", "three"] = opt("fused", "one masked pass, or three: the same losses")
    alpha: float = opt(0.0, "loss dropout: each example goes without its views with this probability")
    ntp_on: Literal["all", "code"] = opt("all", "targets of L_LLM: every token, or only Code")
    train_eos: bool = opt(True, "is the end token a target? (off: the official labels)")
    pred_first: bool = opt(False, "[PRED] in front of Text instead of behind it")
    reverse: bool = opt(False, "Code predicts Text")
    # optimization
    epochs: int = opt(3, "passes over the train split")
    max_steps: int = opt(0, "end after so many steps; 0: after the epochs")
    match_flops: str = opt("", "end when as many useful operations are done as in this finished run")
    batch_size: int = opt(32, "examples per step")
    micro_batch: int = opt(0, "examples per forward and backward; 0: the whole batch")
    lr: float = opt(1e-3, "peak of the learning rate")
    warmup: float = opt(0.05, "share of the steps in which it rises; then it falls to 0 along a cosine")
    weight_decay: float = opt(0.1, "AdamW's, on matrices only")
    beta1: float = opt(0.9, "AdamW's")
    beta2: float = opt(0.95, "AdamW's")
    clip: float = opt(1.0, "largest norm of the gradient")
    # the run
    seed: int = opt(82, "of weights, order and loss dropout")
    device: Literal[DEVICES] = opt("auto", "auto: cuda, then mps, then cpu")
    dtype: Literal["auto", "float32", "tf32", "bfloat16", "float64"] = opt(
        "auto", "of the forward (weights stay float32); auto: bfloat16 where the processor has it natively; "
                "tf32: float32 with products of 10 bits, on CUDA")
    compile: bool | None = opt(None, "torch.compile (default: on CUDA only)")
    grad_checkpointing: bool = opt(False, "less memory, more time: compute activations twice")
    prefetch: bool = opt(True, "collate in a thread, ahead of the step, and copy without waiting")
    fixed_shapes: bool | None = opt(None, "fill packed rows up to one shape (default: on CUDA, with row_len)")
    attention: Literal["auto", "dense", "flex"] = opt(
        "auto", "how the fused pass masks; flex: FlexAttention, compiled (auto: there if row_len is set)")
    row_len: int = opt(0, "pack examples into rows of so many tokens; 0: one example a row")
    log_every: int = opt(10, "steps between two lines of metrics.jsonl")
    checkpoint_every: int = opt(0, "steps between two checkpoints; 0: an epoch")
    max_new_tokens: int = opt(0, "longest answer in evaluation; 0: 1.5 times the longest of train")
    out: str = opt("", "run folder (default: runs/, named after the dataset and what is not default)")


# Other defaults with --init_from: the paper's protocol, and the middle of its learning rates
FINE_TUNING = {"lr": 2e-5, "epochs": 4, "batch_size": 16}


def parse_config(argv: list[str] | None = None) -> Config:
    """A valid Config from the command line. BadInput names everything that is wrong with it, in one line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS)
    hints = get_type_hints(Config)
    for f in dataclasses.fields(Config):
        hint, extra = hints[f.name], {}
        if get_origin(hint) is Literal:
            extra["choices"] = get_args(hint)
        elif hint in (bool, bool | None):
            extra["action"] = argparse.BooleanOptionalAction
        else:
            extra["type"] = hint
        tuned = f"; with --init_from {FINE_TUNING[f.name]}" if f.name in FINE_TUNING else ""
        shown = "" if f.default in (None, "") else f" (default: {f.default}{tuned})"
        parser.add_argument(f"--{f.name}", help=f.metadata["help"] + shown, **extra)
    given = vars(parser.parse_args(argv))
    config = Config(**(FINE_TUNING if given.get("init_from") else {}) | given)
    problems = check(config, set(given))
    if problems:
        raise BadInput("; ".join(problems))
    if not config.init_from:
        model_config(config, config.vocab_size)  # raises where the shape makes no sense
    if not config.lam or config.objective == "stp":
        config.k = 0  # no predictor tokens: none would be trained
    config.out = config.out or str(Path("runs") / describe(config))
    return config


OF_VIEWS = ("view2", "k", "distance", "temperature", "stop_gradient", "passes", "alpha", "pred_first",
            "reverse")


def check(c: Config, given: set[str]) -> list[str]:
    """What is wrong with the settings: values out of range, contradictions, flags that would do nothing."""
    problems = [f"--{name} {getattr(c, name)}: must be {what}" for what, test, names in (
        ("at least 1", lambda x: x >= 1, ("epochs", "batch_size", "log_every")),
        ("0 or more", lambda x: x >= 0, (
            "n_train", "n_test", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "k", "max_steps",
            "micro_batch", "max_seq_len", "row_len", "checkpoint_every", "max_new_tokens", "lora_rank")),
        ("at least 0 and below 2**63", lambda x: 0 <= x < 2**63 - 1, ("seed",)),
        ("a number, 0 or more", lambda x: 0 <= x < math.inf, ("lam", "gamma", "weight_decay")),
        ("a number above 0", lambda x: 0 < x < math.inf, ("temperature", "lr", "clip")),
        ("at least 0 and below 1", lambda x: 0 <= x < 1, ("alpha", "warmup", "beta1", "beta2",
                                                             "lora_dropout")),
        ("at least 256, a token for each byte", lambda x: x >= 256, ("vocab_size",)),
    ) for name in names if not test(getattr(c, name))]
    own = c.dataset.endswith(".jsonl")

    def inert(names: tuple[str, ...], why: str) -> None:
        problems.extend(f"--{name} has no effect {why}" for name in names if name in given)

    if not c.lam:
        inert((*OF_VIEWS, "objective"), "with --lam 0")
        if not c.gamma:
            problems.append("--lam 0 --gamma 0: nothing to train on")
    else:
        if c.objective == "stp":
            inert((*OF_VIEWS, "row_len", "attention"), "with --objective stp: no views, an example a row")
        if not c.gamma:
            inert(("ntp_on", "train_eos"), "with --gamma 0")
        if not c.k:
            inert(("pred_first",), "with --k 0")
        if c.distance != "infonce":
            inert(("temperature",), "without --distance infonce")
        elif c.micro_batch or c.batch_size == 1 or ranks.world > 1:
            problems.append("--distance infonce takes its negatives from the whole batch: it needs "
                            "--batch_size 2 or more, no --micro_batch and one process")
    if c.passes == "three":
        inert(("row_len", "attention", "fixed_shapes"), "with --passes three")
    elif not c.row_len:
        inert(("fixed_shapes",), "without --row_len")
    if c.fixed_shapes and c.distance == "infonce":
        problems.append("--fixed_shapes has pairs of weight 0, which --distance infonce would contrast with")
    if c.dtype == "tf32" and pick_device(c.device).type != "cuda":
        problems.append("--dtype tf32 needs CUDA")
    if c.attention == "flex" and (pick_device(c.device).type != "cuda" or c.compile is False):
        problems.append("--attention flex needs CUDA and --compile: it has no backward elsewhere")
    if c.dataset in PUBLISHED or c.eval_split == "valid":
        inert(("test_file",), "with --eval_split valid" if own else "with a published dataset")
    elif own and not c.test_file:
        problems.append("a dataset of your own needs --test_file or --eval_split valid")
    if own:
        inert(("data_dir",), "with a dataset of your own")
    if c.init_from:
        inert(("vocab_size", "preset", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "max_seq_len"),
              "with --init_from")
    elif c.lora_rank:
        problems.append("--lora_rank needs --init_from: adapters of random weights learn little")
    elif c.format not in ("auto", "plain"):
        problems.append(f"--format {c.format} needs --init_from: a tokenizer of our own has the plain format")
    if not c.lora_rank:
        inert(("lora_dropout",), "without --lora_rank")
    if c.dataset == "paraphrase":
        if c.eval_split != "valid":
            problems.append("paraphrase has no test split: it needs --eval_split valid")
        inert(("max_new_tokens",), "with paraphrase, where nothing is answered")
    if c.match_flops:
        inert(("epochs", "max_steps"), "with --match_flops")
    if c.micro_batch > c.batch_size:
        problems.append(f"--micro_batch {c.micro_batch} is more than --batch_size {c.batch_size}")
    if not device_available(c.device):
        problems.append(f"--device {c.device}: not available here")
    return problems


def describe(c: Config) -> str:
    """The run's default name: the dataset and every setting that is not the default."""
    parts = [Path(c.dataset).stem]
    for f in dataclasses.fields(c):
        value = getattr(c, f.name)
        if f.name in ("dataset", "data_dir", "test_file", "device", "out"):
            continue
        if f.name == "k" and (not c.lam or c.objective == "stp"):
            continue
        if f.name in ("init_from", "match_flops", "view2"):
            parts.extend([f.name.removeprefix("init_"), Path(value).name] if value else [])
        elif value != (FINE_TUNING if c.init_from else {}).get(f.name, f.default):
            parts.append(f.name + (f"{value:g}" if isinstance(value, float) else str(value)))
    return "-".join(parts)


def model_config(c: Config, vocab_size: int) -> ModelConfig:
    """The preset with the shapes that the user gave."""
    shape = dict(PRESETS[c.preset])
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "max_seq_len")
    config = ModelConfig(vocab_size=vocab_size, **shape | {n: getattr(c, n) for n in names if getattr(c, n)})
    if c.n_heads and not c.n_kv_heads:
        config.n_kv_heads = c.n_heads
    if c.dim or c.n_heads:
        config.head_dim = config.dim // config.n_heads
    if config.head_dim * config.n_heads != config.dim or config.head_dim % 2:
        raise BadInput(f"--dim {config.dim} --n_heads {config.n_heads}: heads must have the same, even width")
    if config.n_heads % config.n_kv_heads:
        raise BadInput(f"--n_kv_heads {config.n_kv_heads} does not divide --n_heads {config.n_heads}")
    return config


# ---- one step ----------------------------------------------------------------------------------------------

def native_bf16(device: torch.device) -> bool:
    """Does the processor multiply bfloat16 itself? Emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(torch.cpu.get_capabilities().get(name)
                                        for name in ("avx512_bf16", "amx_bf16"))


def masking(c: Config, device: torch.device) -> Callable:
    flex = device.type == "cuda" and c.compile is not False and c.row_len > 0
    return flex_mask if c.attention == "flex" or c.attention == "auto" and flex else dense_mask


NOTHING = Views(main=[0], labels=[-100], stem=[0], preds=[], enc=[0])


class Step(nn.Module):
    """Batch -> Losses: what is compiled. Autocast is entered per forward: entered once and never left, it
    would keep stale bfloat16 copies of the weights."""

    def __init__(self, model: Transformer, c: Config, dtype: str):
        super().__init__()
        self.model, self.dtype = model, dtype
        self.passes = three_pass if c.passes == "three" else partial(fused, masking=masking(c, model.device))
        self.distance = DISTANCES[c.distance]
        if c.distance == "infonce":
            self.distance = partial(self.distance, temperature=c.temperature)
        if c.stop_gradient:
            self.distance = stop_gradient(self.distance)

    def forward(self, batch) -> Losses:
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            losses = self.passes(self.model, batch, self.distance)
        if batch.pred_at is None and self.model.pred_embedding is not None:  # other ranks may have views
            losses = losses._replace(jepa_sum=losses.jepa_sum + 0 * self.model.pred_embedding.sum())
        return losses


def groups(c: Config, n: int) -> list[range]:
    """Which of a step's n examples this rank takes in each of its micro-batches."""
    mine = range(ranks.rank, n, ranks.world)
    size = c.micro_batch or n
    return [mine[start:start + size] for start in range(0, len(mine), size)]


def micro_batches(c: Config, train: Rendered, indices: list[int], step: int,
                  shape: Shape | None = None) -> list:
    """This rank's share of the step's examples, collated in groups of at most --micro_batch."""
    views = c.lam and c.objective == "jepa"
    keep = loss_dropout(len(indices), c.alpha, c.seed, step) if views else [False] * len(indices)
    collate = collate_three if c.passes == "three" else partial(collate_fused, row_len=c.row_len, shape=shape)
    mine = groups(c, len(indices))
    if not mine:  # fewer examples than ranks: nothing to learn, but the others wait for a backward
        return [replace(collate([NOTHING], [False]), n_pairs=0, n_real=0, n_visible=0)]
    batches = [collate([train[indices[i]] for i in group], [keep[i] for i in group]) for group in mine]
    if c.objective == "stp":
        draws = np.random.default_rng([c.seed, step, 3]).random((len(indices), 3))
        for group, batch in zip(mine, batches, strict=True):
            lengths = [len(train[indices[i]].main) for i in group]
            batch.tube_at = tube_positions(lengths, batch.ids.shape[1], draws[group])
    return batches


def largest_shape(c: Config, sampler: Sampler, counts: np.ndarray, total: int) -> Shape:
    """What the largest micro-batch of all steps needs, none of its views dropped; counts: data.fitting's."""
    rows = labels = pairs = 1
    for step in range(total):
        indices = sampler.indices(step)
        for group in groups(c, len(indices)):
            main, fused_row, labelled = counts[indices[list(group)]].T.tolist()
            rows = max(rows, len(pack(fused_row if c.lam else main, c.row_len)))
            labels, pairs = max(labels, sum(labelled)), max(pairs, len(group))
    return Shape(rows, labels, pairs if c.lam else 0)


def step_seed(seed: int, step: int) -> int:
    return int(np.random.default_rng([seed, step, 2]).integers(2**63))


def set_precision(dtype: str) -> None:
    """Whether float32 products may be rounded; scores are always computed at the highest."""
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")


def step_flops(model: Transformer, batches: list) -> int:
    return sum(model.flops(b.n_real, b.n_visible, b.n_tokens) for b in batches)


def steps_to_match(c: Config, model: Transformer, train: Rendered, sampler: Sampler) -> int:
    """How many steps reach the operations that the run --match_flops took. Every batch is made for it, which
    is a hundredth of the work to come."""
    budget, step = read_json(Path(c.match_flops) / "eval.json").get("trained", {}).get("flops"), 0
    if not budget:
        raise BadInput(f"--match_flops {c.match_flops}: its eval.json does not say what the training took")
    while budget > 0:
        budget -= ranks.counts(step_flops(model, micro_batches(c, train, sampler.indices(step), step)))[0]
        step += 1
    return step


def make_optimizer(model: nn.Module, c: Config) -> torch.optim.AdamW:
    """AdamW; norms' gains are not decayed."""
    matrices = [weight for weight in trainable(model).values() if weight.dim() >= 2]
    vectors = [weight for weight in trainable(model).values() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), fused=True)


def lr_at(step: int, total: int, c: Config) -> float:
    """Linear up over the warm-up, then down to 0 along half a cosine."""
    warmup = max(1, round(c.warmup * total))
    if step < warmup:
        return c.lr * (step + 1) / warmup
    return c.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


# ---- before and after the loop -----------------------------------------------------------------------------

def make_model(c: Config, data: Dataset) -> tuple[Transformer, Tokenizer]:
    """New weights and a tokenizer of the train split's own, or both from --init_from."""
    if not c.init_from:
        texts = (text for e in data.train for text in (e.text, e.code))
        tokenizer = Tokenizer(train_bpe(texts, c.vocab_size))
        return Transformer(model_config(c, tokenizer.vocab_size), c.k, c.seed), tokenizer
    if not Path(c.init_from).is_dir():
        raise BadInput(f"--init_from {c.init_from}: no such folder")
    model = Transformer.from_pretrained(c.init_from, torch.float32)
    tokenizer = Tokenizer.load(c.init_from, model.config.vocab_size, c.format)
    if model.pred_embedding is None or len(model.pred_embedding) != c.k:
        model.add_predictors(c.k, c.seed)
    if c.lora_rank > model.config.dim:
        raise BadInput(f"--lora_rank {c.lora_rank}: more than the model's width of {model.config.dim}")
    if c.lora_rank:
        model.add_lora(c.lora_rank, c.lora_dropout, c.seed)
    return model, tokenizer


def view_options(c: Config) -> dict:
    """What data.render_views takes."""
    return {name: getattr(c, name) for name in VIEW_OPTIONS}


def describe_run(c: Config, data: Dataset, device: torch.device, max_new_tokens: int) -> dict:
    """What run.json is to hold."""
    base = [path for path in sorted(Path(c.init_from).iterdir()) if path.suffix == ".safetensors"
            or path.name in ("config.json", *CARRIED)] if c.init_from else []
    return {"config": asdict(c), "source": data.source, "files": data.files,
            "init": {str(path): sha256(path) for path in base},
            "dtype": c.dtype if c.dtype != "auto" else "bfloat16" if native_bf16(device) else "float32",
            "system": data.train[0].system, "max_new_tokens": max_new_tokens, "device": str(device),
            "git_commit": git_commit(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__}}


def finish(folder: Path, model: Transformer, tokenizer: Tokenizer, data: Dataset, options: dict,
           limit: int) -> dict:
    """Write the model, adapters merged, and its score on the whole test split; print five answers."""
    set_precision("float32")
    model.merge_lora()
    model.save_pretrained(folder)
    tokenizer.save(folder)
    result, answers = evaluate(model, tokenizer, data, options, limit)
    result |= summary(folder)
    write_text(folder / "eval.json", json.dumps(result, indent=2) + "\n")
    for example, answer in zip(data.test, answers[:5], strict=False):  # paraphrase has no answers
        print(f"\ntext    {example.text}\ntarget  {example.code}\nanswer  {answer}" + (
            "" if answer == example.code else "   <- differs"))
    return result


# ---- the loop ----------------------------------------------------------------------------------------------

def train(c: Config) -> dict:
    """Train, or go on training, and score; returns what eval.json holds (to rank 0)."""
    device, folder, options = ranks.join(pick_device(c.device)), Path(c.out), view_options(c)
    with ranks.zero_first():
        data = load_dataset(c.dataset, c.data_dir, c.test_file, c.n_train, c.eval_split, c.n_test, c.view2)
        announce(data)
        check_databases(data)
        model, tokenizer = make_model(c, data)
        counts = fit_splits(data, tokenizer, model.config.max_seq_len, c.on_long, **options)
        limit = c.max_new_tokens or default_max_new_tokens(tokenizer, data.train)
        dtype = open_run(folder, describe_run(c, data, device, limit))["dtype"]
    if (folder / "eval.json").exists():
        print(f"{folder}: finished before")
        return read_json(folder / "eval.json")

    model.to(device, torch.float64 if dtype == "float64" else torch.float32)
    model.grad_checkpointing = c.grad_checkpointing
    set_precision(dtype)
    examples = Rendered(data.train, tokenizer, **options)
    sampler = Sampler(counts[:, 0], c.batch_size, c.seed)
    total = min(c.max_steps or math.inf, c.epochs * sampler.steps_per_epoch)
    if c.match_flops:
        total = steps_to_match(c, model, examples, sampler)
    every = c.checkpoint_every or sampler.steps_per_epoch
    optimizer, weights = make_optimizer(model, c), trainable(model)
    start, seen, metrics_size = restore(folder, model, optimizer)
    metrics = Metrics(folder / "metrics.jsonl", metrics_size) if ranks.rank == 0 else None
    compiled = c.compile if c.compile is not None else device.type == "cuda"
    fixed = c.row_len and c.distance != "infonce" and (
        device.type == "cuda" if c.fixed_shapes is None else c.fixed_shapes)
    shape = largest_shape(c, sampler, counts, total) if fixed else None
    step_losses = ranks.shared(Step(model, c, dtype), device)
    if compiled:
        step_losses = torch.compile(step_losses, dynamic=shape is None)
    n_trained = sum(weight.numel() for weight in weights.values())
    print(f"{model.n_params():,} parameters{f' ({n_trained:,} trained)' if c.lora_rank else ''}, "
          f"{len(examples)} examples, {total} steps on {ranks.world} x {device} "
          f"in {dtype}{', compiled' if compiled else ''}; run folder {folder}"
          f"{f', from step {start}' if start else ''}", flush=True)

    bar = tqdm(range(start, total), initial=start, total=total, disable=ranks.rank > 0 or None, unit="step",
               dynamic_ncols=True)
    collated = (micro_batches(c, examples, sampler.indices(step), step, shape)
                for step in range(start, total))
    if c.prefetch:
        collated = ahead(collated)
    began, logged = time.perf_counter() - seen["seconds"], seen
    for step, batches in zip(bar, collated, strict=True):
        torch.manual_seed(step_seed(c.seed, step) + ranks.rank)  # of the adapters' dropout
        n_tokens, n_pairs, flops = ranks.counts(
            sum(b.n_tokens for b in batches), sum(b.n_pairs for b in batches), step_flops(model, batches))
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, total, c)
        ntp = jepa = 0.0
        for batch in batches:
            with ranks.unshared(step_losses, batch is batches[-1]):
                losses = step_losses(batch.to(device, wait=not c.prefetch))
                # the ranks' gradients will be averaged, and are to be summed
                (ranks.world * total_loss(losses, n_tokens, n_pairs, c.lam, c.gamma)).backward()
            ntp, jepa = ntp + losses.ntp_sum.detach() / n_tokens, jepa + losses.jepa_sum.detach() / n_pairs
        grad_norm = nn.utils.clip_grad_norm_(weights.values(), c.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        seen = {"examples": seen["examples"] + n_pairs, "tokens": seen["tokens"] + n_tokens,
                "flops": seen["flops"] + flops, "seconds": time.perf_counter() - began}
        where = {"step": done, "epoch": done / sampler.steps_per_epoch, **seen}
        if done % c.log_every == 0 or done % every == 0 or done == total:
            ntp, jepa = ranks.total(torch.stack([ntp, jepa])).tolist()  # waits for the device
            if not math.isfinite(ntp + jepa + float(grad_norm)):
                raise BadInput(f"step {done}: the loss is {ntp} + {c.lam} * {jepa}, the gradient's norm "
                               f"{float(grad_norm)}; the last checkpoint is kept; try a lower --lr")
            speed = round((seen["tokens"] - logged["tokens"]) / (seen["seconds"] - logged["seconds"]))
            logged = seen
            bar.set_postfix(ntp=f"{ntp:.4f}", jepa=f"{jepa:.4f}")
            if ranks.rank == 0:
                metrics.write(where | {"ntp": ntp, "jepa": jepa, "loss": c.gamma * ntp + c.lam * jepa,
                                       "lr": optimizer.param_groups[0]["lr"], "grad_norm": float(grad_norm),
                                       "tokens_per_s": speed})
        if ranks.rank == 0 and done % sampler.steps_per_epoch == 0 and done < total:
            look, _ = evaluate(model, tokenizer, data, options, limit, n=200)
            look.pop("items", None)
            began += look["seconds"]
            metrics.write(where | {"look": look})
            tqdm.write(f"epoch {where['epoch']:.0f}, {look['n']} {c.eval_split} items: {brief(look)}")
        if ranks.rank == 0 and (done % every == 0 or done == total):
            save_state(folder, {"model": weights, "optimizer": optimizer.state_dict(),
                                "step": done, "seen": seen, "metrics_size": metrics.size()})
    return finish(folder, model, tokenizer, data, options, limit) if ranks.rank == 0 else {}


def main() -> None:
    c = parse_config()
    result = train(c)
    ranks.leave()
    if ranks.rank:
        return
    print(f"\n{result['dataset']} ({result['source']} data), {result['n']} {c.eval_split} items")
    print(table({c.out: result}))


if __name__ == "__main__":
    with main_guard():
        main()
