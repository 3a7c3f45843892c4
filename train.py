"""Train LLM-JEPA, from scratch or from a checkpoint: settings, a step, the loop.

    python train.py --dataset nlrx_synth                    LLM-JEPA with all defaults
    python train.py --dataset nlrx_synth --lam 0            the baseline: plain next-token training
    python train.py --dataset nlrx_synth --passes three     the paper's three passes, not the fused one
    python train.py --dataset my.jsonl --test_file my_test.jsonl
    python train.py --dataset gsm8k --init_from DIR         fine-tune the Llama-style model of a Hugging Face
                                                            folder, or a run; --lora_rank 64: adapters only
    torchrun --nproc_per_node 2 train.py --dataset nlrx_synth   the same losses from two processes

A run folder holds run.json (settings, data, versions), metrics.jsonl (an object per logged step: every term
of the loss, unweighted; `tokens` counts next-token targets only; and one per score on the way), state.pt (the
last checkpoint), and at the end the model as a Hugging Face folder has it and eval.json. Ctrl-C and SIGTERM
leave a checkpoint. The same command started again goes on where the last one left it, and ends with the same
weights, bit for bit on a CPU: nothing in a run depends on anything but (seed, step).
"""
import copy
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import RunOptions, fit_splits, load, micro_batches, of_data, of_views, own_tokenizer, render_views
from eval import default_max_new_tokens, evaluate, read_model
from jepa_loss import DISTANCES, REGULARISERS, Terms, dense_mask, flex_mask, fused, stop_gradient
from jepa_loss import three_pass, total_loss
from model import PRESETS, ModelConfig, Transformer
from support import distributed
from support.checkpoint import add_end_token
from support.distributed import DEVICES, device_available, pick_device
from support.files import BadInput, interrupts, main_guard, printable, sha256, write_text
from support.lora import add_lora, merge_lora
from support.runs import Run, git_commit, read_run, read_score, run_summary, trainable
from support.settings import fill, opt, parse, problems, raise_problems, run_name
from support.speed import Sampler, forward_dtype, largest_shape, prefetch
from support.tables import brief, table
from support.tokenizer import CARRIED, Tokenizer
from tasks.datasets import Dataset, Example

# ---- settings ----------------------------------------------------------------------------------------------

of_model = partial(opt, group="model")
of_shape = partial(of_model, low=0, needs="!init_from")
of_loss, of_optim = partial(opt, group="objective"), partial(opt, group="optimization")
of_run, neutral = partial(opt, group="the run"), partial(opt, group="the run", identity="nothing")


@dataclass
class Config(RunOptions):
    """Every setting of a run: `--name value` on the command line, and an entry of run.json.

        loss = gamma * L_LLM + lam * d(Pred(Enc(Text)), Enc(Code)) + reg_weight * r + stp * s
    """
    vocab_size: int = of_data(512, "at most so many BPE tokens, of train", low=256, needs="!init_from")

    init_from: str = of_model("", "begin with a run, or a Hugging Face folder", identity="content")
    trust_remote_code: bool = of_model(False, "run the Python files of the folder",
                                       needs="init_from backend!=ours")
    lora_rank: int = of_model(0, "train adapters of this rank; 0: the weights", low=0, needs="init_from")
    lora_dropout: float = of_model(0.1, "in front of the adapters", low=0, below=1, needs="lora_rank")
    preset: Literal[tuple(PRESETS)] = of_model("nano", "shape of the model", needs="!init_from")
    dim: int = of_shape(0, "width C; 0: the preset's")
    n_layers: int = of_shape(0, "blocks; 0: the preset's")
    n_heads: int = of_shape(0, "query heads; 0: the preset's")
    n_kv_heads: int = of_shape(0, "key-value heads; 0: the preset's")
    ffn_dim: int = of_shape(0, "inner width of the MLP; 0: the preset's")
    max_seq_len: int = of_shape(0, "context in tokens; 0: the preset's")

    gamma: float = opt(1.0, "weight of the next-token loss", group="labels", low=0)
    lam: float = of_loss(1.0, "weight of the JEPA loss; 0: plain next-token training", low=0)
    distance: Literal[tuple(DISTANCES)] = of_loss("cosine", "d", needs="lam")
    temperature: float = of_loss(0.07, "of --distance infonce", above=0, needs="lam distance=infonce")
    target: Literal["online", "stopgrad", "ema"] = of_loss(
        "online", "Enc(Code) of the model, without a gradient, or of a moving average of it", needs="lam")
    ema_decay: float = of_loss(0.99, "of the moving average", low=0, below=1, needs="target=ema")
    lam_warmup: float = of_loss(0.0, "share of the run in which lam rises", low=0, below=1, needs="lam")
    reg_weight: float = of_loss(0.0, "weight of a regulariser of both embeddings; 0: without", low=0)
    reg: Literal[tuple(REGULARISERS)] = of_loss("vicreg", "which one", needs="reg_weight")
    alpha: float = of_views(0.0, "loss dropout: the share of examples without views", low=0, below=1)
    passes: Literal["fused", "three"] = of_views("fused", "one masked pass, or three: the same losses")
    stp: float = of_loss(0.0, "weight of Semantic Tube Prediction; 0: without", low=0)
    stp_form: Literal["paper", "released"] = of_loss("paper", "its formula, or its code's", needs="stp")

    epochs: int = of_optim(3, "passes over the train split", low=1, needs="!max_flops")
    max_steps: int = of_optim(0, "end after so many steps; 0: the epochs", low=0, needs="!max_flops")
    max_flops: float = of_optim(0.0, "end when so many useful FLOPs are spent, not after epochs", low=0)
    batch_size: int = of_optim(32, "examples per step", low=1)
    micro_batch: int = of_optim(0, "examples per forward; 0: the whole batch", low=0, identity="nothing")
    lr: float = of_optim(1e-3, "peak of the learning rate", above=0)
    warmup: float = of_optim(0.05, "share of the run in which it rises, then it falls", low=0, below=1)
    weight_decay: float = of_optim(0.1, "AdamW's, on matrices only", low=0)
    beta1: float = of_optim(0.9, "AdamW's", low=0, below=1)
    beta2: float = of_optim(0.95, "AdamW's", low=0, below=1)
    clip: float = of_optim(1.0, "largest norm of the gradient", above=0)

    seed: int = of_run(82, "of weights, order and loss dropout", low=0)
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = of_run(
        "auto", "of the forward; weights are float32 (float64: both); auto: bfloat16 where it is faster")
    row_len: int = of_run(0, "pack examples into rows of so many tokens; 0: one a row", low=0,
                          needs="passes=fused")
    max_new_tokens: int = of_run(0, "longest answer; 0: 1.5 times the longest of train", low=0,
                                 needs="dataset!=paraphrase")
    attention: Literal["auto", "dense", "flex"] = neutral(
        "auto", "how the fused pass masks; flex: FlexAttention, compiled (auto: there if row_len is set)",
        needs="passes=fused lam|reg_weight|row_len")
    fixed_shapes: bool | None = neutral(None, "fill packed rows up to one shape (default: on CUDA, compiled)",
                                        needs="row_len passes=fused")
    device: Literal[DEVICES] = neutral("auto", "auto: cuda, then mps, then cpu")
    shard: Literal["", "full", "none"] = neutral(
        "", "among ranks; full: each holds a part of weights and optimizer state, none: all (default: full)")
    compile: bool | None = neutral(None, "torch.compile (default: on CUDA only)")
    grad_checkpointing: bool = neutral(False, "recompute activations in the backward: less memory, more time")
    prefetch: bool = neutral(True, "collate in a thread, ahead of the step, and copy without waiting")
    log_every: int = neutral(10, "steps between two lines of metrics.jsonl", low=1)
    checkpoint_every: int = neutral(0, "steps between two checkpoints; 0: an epoch", low=0)
    eval_every: int = neutral(0, "steps between two scores of 200 test items; 0: an epoch", low=0)
    log: Literal["", "tensorboard"] = neutral("", "write what metrics.jsonl has for this program as well")
    out: str = neutral("", "run folder (default: runs/, named after the dataset and other settings)")


# Other defaults with --init_from: the paper's protocol, and the middle of its learning rates
FINE_TUNING = {"lr": 2e-5, "epochs": 4, "batch_size": 16}
# Settings of older runs, and their defaults
FORMER = {"view2": "", "match_flops": "", "objective": "jepa", "stop_gradient": False}


def parse_config(argv: list[str] | None = None, description: str = "") -> Config:
    """A valid Config from the command line. BadInput names everything that is wrong with it, in one line."""
    config, given = parse(Config, argv, description, tuned=("init_from", FINE_TUNING))
    return checked(config, given)


def checked(c: Config, given: set[str] | None = None) -> Config:
    """c itself, with its default folder; given: the settings that the user named (None: that are not at their
    defaults)."""
    tuned = FINE_TUNING if c.init_from else {}
    raise_problems(problems(c, given, tuned) + contradictions(c))
    if not c.init_from:
        model_config(c, c.vocab_size)  # raises where the shape makes no sense
    if not c.lam and not c.reg_weight:
        c.k = 0  # no predictor tokens: none would be trained
    if c.init_from and not Path(c.init_from).name.strip("."):
        c.init_from = str(Path(c.init_from).resolve())  # runs are named and compared by the folder's name
    c.out = c.out or str(Path("runs") / run_name(c, tuned))
    return c


def whole_batch(c: Config) -> bool:
    """Does a term compare the pairs of a batch with each other?"""
    return bool(c.lam and getattr(DISTANCES.get(c.distance), "whole_batch", False) or c.reg_weight)


def may_fill(c: Config) -> bool:
    """May a batch be filled up with pairs of a position with itself? Only if their distance is 0."""
    return c.pool == "last" and c.predictor == "tokens" and c.target != "ema" and not whole_batch(c)


def contradictions(c: Config) -> list[str]:
    """What settings that are right by themselves get wrong together."""
    on_cuda = device_available(c.device) and pick_device(c.device).type == "cuda"
    wrong = {
        f"--device {c.device}: not available here": not device_available(c.device),
        "--lam 0 --gamma 0: nothing to train on": not (c.lam or c.gamma or c.stp or c.reg_weight),
        f"{f'--reg {c.reg}' if c.reg_weight else f'--distance {c.distance}'} compares the pairs of the whole "
        "batch: it needs --batch_size 2 or more, no --micro_batch, no --alpha, no --fixed_shapes and one "
        "process": whole_batch(c) and (
            c.micro_batch or c.alpha or c.batch_size == 1 or distributed.world > 1 or c.fixed_shapes),
        f"--shard {c.shard} has no effect with one process": c.shard and distributed.world == 1,
        "--fixed_shapes needs --pool last, --predictor tokens and no --target ema":
            bool(c.fixed_shapes) and not may_fill(c),
        "--attention flex needs CUDA and --compile: it has no backward elsewhere":
            c.attention == "flex" and (not on_cuda or c.compile is False),
        "a dataset of your own needs --test_file or --eval_split valid":
            c.dataset.endswith(".jsonl") and c.eval_split == "test" and not c.test_file,
        "paraphrase has no test split: it needs --eval_split valid":
            c.dataset == "paraphrase" and c.eval_split != "valid",
        f"--micro_batch {c.micro_batch} is more than --batch_size {c.batch_size}":
            c.micro_batch > c.batch_size}
    return [message for message, is_wrong in wrong.items() if is_wrong]


def model_config(c: Config, vocab_size: int) -> ModelConfig:
    """The preset with the shapes that the user gave."""
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "max_seq_len")
    given = {name: getattr(c, name) for name in names if getattr(c, name)}
    config = ModelConfig(**dict(PRESETS[c.preset]) | given | {"vocab_size": vocab_size})
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

def step_seed(seed: int, step: int) -> int:
    return int(np.random.default_rng([seed, step, 2]).integers(2**63))


class Step(nn.Module):
    """Batch -> Terms: what is compiled. Autocast is entered per forward: entered once and never left, it
    would keep stale bfloat16 copies of the weights."""

    def __init__(self, model: Transformer, c: Config, dtype: str, ema: Transformer | None = None):
        super().__init__()
        self.model, self.dtype, self.ema = model, dtype, ema
        flex = c.row_len and pick_device(c.device).type == "cuda" and c.compile is not False
        flex = flex and getattr(model, "takes_block_masks", True)
        flex = c.attention == "flex" or c.attention == "auto" and flex
        self.passes = three_pass if c.passes == "three" else partial(
            fused, masking=flex_mask if flex else dense_mask)
        self.distance = DISTANCES[c.distance] if c.lam else None
        self.regulariser = REGULARISERS[c.reg] if c.reg_weight else None
        if c.lam and c.distance == "infonce":
            self.distance = partial(self.distance, temperature=c.temperature)
        if c.target == "stopgrad":
            self.distance = stop_gradient(self.distance)

    def forward(self, batch) -> Terms:
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            return self.passes(self.model, batch, self.distance, self.regulariser, self.ema)


def weights_of_terms(c: Config, share: float = 1.0) -> dict[str, float]:
    """loss = sum(weight * term): the terms that take part; share: of the run that is done."""
    weights = {"ntp": c.gamma, "stp": c.stp, "jepa": c.lam, "reg": c.reg_weight}
    weights = {name: weight for name, weight in weights.items() if weight or name == "ntp"}
    if share < c.lam_warmup:
        weights["jepa"] *= share / c.lam_warmup
    return weights


def in_words(c: Config) -> str:
    """What a run is going to do."""
    text, code = ("Code", "Text") if c.reverse else ("Text", "Code")
    terms = {"ntp": "next-token loss", "stp": "Semantic Tube Prediction", "reg": c.reg,
             "jepa": f"{c.distance} of Pred(Enc({text})) and Enc({code})"}
    loss = " + ".join(f"{weight:g} x {terms[name]}" for name, weight in weights_of_terms(c).items() if weight)
    method, start = "LLM-JEPA" if c.lam else "training", c.init_from or "scratch"
    return f"{method} on {c.dataset}, from {start}: {loss}"


@torch.no_grad()
def update_average(ema: nn.Module | None, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, of every weight."""
    if ema is not None:
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def make_optimizer(model: nn.Module, c: Config) -> torch.optim.AdamW:
    """AdamW; norms' gains are not decayed."""
    matrices = [weight for weight in trainable(model).values() if weight.dim() >= 2]
    vectors = [weight for weight in trainable(model).values() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), fused=True)


def lr_at(start: float, end: float, budget: float, c: Config) -> float:
    """Linear up over the warm-up, then down to 0 along half a cosine, for a step from `start` to `end` of a
    budget of steps or FLOPs."""
    warmup = max(1, round(c.warmup * budget))
    if start < warmup:
        return c.lr * min(1.0, end / warmup)
    return c.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (start - warmup) / max(1, budget - warmup))))


def count_step(c: Config, model: Transformer, batches: list) -> tuple[dict, int, int]:
    """What the sums of a step's terms are divided by, its examples, and the FLOPs it needs, of all ranks."""
    flops = sum(model.flops(b.n_real, b.n_visible, b.n_tokens) for b in batches)
    if c.target == "ema":
        flops += sum(model.flops(*b.for_ema, 0, backward=False) for b in batches)
    n_tokens, n_pairs, flops = distributed.total([
        sum(b.n_tokens for b in batches), sum(b.n_pairs for b in batches), flops])
    return {name: n_tokens if name == "ntp" else n_pairs for name in weights_of_terms(c)}, n_pairs, flops


def backward(step_terms: Callable, batches: list, counts: dict[str, int], weights: dict[str, float],
             device: torch.device, wait: bool = True) -> dict[str, Tensor | float]:
    """Add this rank's part of a step's gradient to the weights; returns its part of the mean of each term."""
    means = dict.fromkeys(weights, 0.0)
    for batch in batches:
        terms = step_terms(batch.to(device, wait))
        total_loss(terms, counts, weights).backward()  # summed over the ranks by distributed.shard
        for name, (sum_, _) in terms.items():
            means[name] = means[name] + sum_.detach() / counts[name]
    return means


# ---- before and after the loop -----------------------------------------------------------------------------

def make_model(c: Config, data: Dataset) -> tuple[Transformer, Tokenizer]:
    """New weights and a tokenizer of the train split's own, or both from --init_from."""
    if not c.init_from:
        tokenizer = own_tokenizer(data.train, c.vocab_size)
        model = Transformer(model_config(c, tokenizer.vocab_size), c.k, c.seed)
    elif not Path(c.init_from).is_dir():
        raise BadInput(f"--init_from {c.init_from}: no such folder")
    else:
        model, tokenizer = read_model(c.init_from, c.backend, c.format, c.trust_remote_code, dtype=None)
    if len(model.pred_embedding if model.pred_embedding is not None else ()) != c.k:
        model.add_pred_rows(c.k, c.seed)
    if c.predictor == "tokens":
        model.predictor = None
    elif model.predictor is None or (model.predictor.out is None) != (c.predictor == "linear"):
        model.add_predictor(c.predictor, c.seed)
    if c.layer >= model.config.n_layers:
        raise BadInput(f"--layer {c.layer}: the model's blocks are 0 to {model.config.n_layers - 1}")
    model.embed_layer = c.layer
    if c.lora_rank > model.config.dim:
        raise BadInput(f"--lora_rank {c.lora_rank}: more than the model's width of {model.config.dim}")
    if c.lora_rank:
        add_lora(model, c.lora_rank, c.lora_dropout, c.seed)
    return model, tokenizer


def name_of_base(init_from: str) -> str:
    """The run that --init_from is, by its settings without the seed; empty if it is none."""
    path = Path(init_from, "run.json")
    if not init_from or not path.exists():
        return ""
    stored = read_run(init_from)
    theirs = fill(Config, stored["config"], FORMER, path) | {"seed": Config.seed}
    theirs["init_from"] = stored.get("init_run") or theirs["init_from"]  # by its settings, too
    known = {f.name: theirs.pop(f.name) for f in fields(Config)}
    return run_name(Config(**known), {}) + "".join(f"-{name}{x}" for name, x in theirs.items())


def describe_run(c: Config, data: Dataset, device: torch.device, max_new_tokens: int) -> dict:
    """What run.json is to hold."""
    base = [path for path in sorted(Path(c.init_from).iterdir()) if path.suffix == ".safetensors"
            or path.suffix == ".py" and c.trust_remote_code
            or path.name in ("config.json", *CARRIED)] if c.init_from else []
    return {"config": asdict(c), "source": data.source, "files": data.files,
            "init": {str(path): sha256(path) for path in base}, "init_run": name_of_base(c.init_from),
            "dtype": forward_dtype(c.dtype, device), "system": data.train[0].system,
            "max_new_tokens": max_new_tokens, "device": str(device), "git_commit": git_commit(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__}}


def finish(c: Config, folder: Path, model: Transformer, tokenizer: Tokenizer, data: Dataset,
           limit: int) -> dict:
    """Write the model, adapters merged, and its score on the whole test split; print five answers."""
    merge_lora(model)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    add_end_token(folder, tokenizer.format.end)
    result, answers = evaluate(model, tokenizer, data, c, limit)
    result |= run_summary(folder)
    write_text(folder / "eval.json", json.dumps(result, indent=2) + "\n")
    for example, answer in zip(data.test, answers[:5], strict=False):  # paraphrase has no answers
        print(printable(f"\ntext    {example.text}\ntarget  {example.code}\nanswer  {answer}" + (
            "" if answer == example.code else "   <- differs"), keep="\t\n"))
    return result


# ---- the loop ----------------------------------------------------------------------------------------------

def compile_step(c: Config, step_terms: Step, make: Callable, steps: int) -> tuple[Callable, Callable]:
    """What turns a batch into terms, and what makes the batches of a step: of one shape, where they are
    compiled for it. steps: among which the largest batch is looked for."""
    on_cuda, shape = step_terms.model.device.type == "cuda", None
    compiled = on_cuda if c.compile is None else c.compile
    if c.row_len and (compiled and on_cuda and may_fill(c) if c.fixed_shapes is None else c.fixed_shapes):
        shape = largest_shape(make, steps)
    return (torch.compile(step_terms, dynamic=shape is None) if compiled else step_terms,
            partial(make, shape=shape) if shape else make)


def check_finite(step: int, means: dict, grad_norm: float, saved: int, examples: Sequence[Example],
                 sampler: Sampler) -> None:
    """BadInput if a term or the gradient is NaN or infinite."""
    if not math.isfinite(grad_norm + sum(means.values())):
        kept = f"the checkpoint of step {saved} is kept" if saved else "there is no checkpoint yet"
        terms = ", ".join(f"{name} {mean}" for name, mean in means.items())
        where = [examples[int(i)].where for i in sampler.indices(step)]
        raise BadInput(f"step {step + 1}: the loss is not finite ({terms}, gradient norm {grad_norm}); "
                       f"{kept}; try a lower --lr, or look at the step's examples: {', '.join(where)}")


def score_sample(c: Config, run: Run, model: Transformer, blank: Transformer | None, tokenizer: Tokenizer,
                 data: Dataset, row: dict) -> float:
    """Score 200 test items on the way, on rank 0; returns the seconds that it took. blank: of whole_model."""
    whole = distributed.whole_model(model, blank)
    if whole is None:
        return 0.0
    result, _ = evaluate(whole, tokenizer, data, c, run.record["max_new_tokens"], n=200)
    result.pop("items", None)
    run.write(row | {"look": result})
    tqdm.write(f"epoch {row['epoch']:.3g}, {result['n']} {c.eval_split} items: {brief(result)}")
    return result["seconds"]


def training_loop(c: Config, run: Run, model: Transformer, tokenizer: Tokenizer, data: Dataset,
                  lengths: np.ndarray, device: torch.device) -> Transformer | None:
    """All steps that the run still lacks; returns the trained model, to rank 0. lengths (N,): tokens of main
    of data.train."""
    dtype = run.record["dtype"]
    model.grad_checkpointing = c.grad_checkpointing
    views = lru_cache(maxsize=10_000)(lambda i: render_views(data.train[i], tokenizer, c))
    sampler = Sampler(lengths, c.batch_size, c.seed)
    an_epoch = sampler.steps_per_epoch
    total = sys.maxsize if c.max_flops else min(c.max_steps or sys.maxsize, c.epochs * an_epoch)
    every = c.checkpoint_every or an_epoch
    ema = copy.deepcopy(model).requires_grad_(False) if c.target == "ema" else None
    step_terms, blank = Step(model, c, dtype, ema), distributed.without_weights(model)
    distributed.shard(step_terms, [model, ema] if ema else [model], device, dtype, c.shard)
    optimizer, params = make_optimizer(model, c), trainable(model)
    first = max(every, run.record["config"]["checkpoint_every"] or an_epoch)  # it may differ from run to run
    start, seen = run.restore(model, optimizer, first, ema)
    step_terms, make = compile_step(c, step_terms, partial(micro_batches, c, views, sampler),
                                    an_epoch if c.max_flops else total)
    budget, unit = (c.max_flops, "FLOP") if c.max_flops else (total, "step")
    print(f"{model.n_params():,} parameters ({sum(w.numel() for w in params.values()):,} trained), "
          f"{len(data.train)} examples in format {tokenizer.format.name}, {budget:.12g} {unit}s on "
          f"{distributed.world} x {device} in {dtype}; run folder {run.folder}"
          f"{f', from step {start}' if start else ''}", flush=True)

    steps, logged, saved = range(start, total), seen, start
    batches_of_steps = prefetch(make, steps) if c.prefetch else map(make, steps)
    bar = tqdm(total=budget, initial=seen["flops"] if c.max_flops else start, unit=unit, dynamic_ncols=True,
               unit_scale=bool(c.max_flops), disable=distributed.rank > 0 or None)
    began = time.perf_counter() - seen["seconds"]
    with interrupts.deferred(), bar:
        for step, batches in zip(steps, batches_of_steps, strict=True):
            if c.max_flops and seen["flops"] >= c.max_flops:
                break
            if distributed.total([interrupts.asked])[0]:  # one of the ranks is: all stop here
                run.save(model, optimizer, step, seen, ema)
                raise KeyboardInterrupt(f"the same command goes on from step {step}")
            counts, examples, flops = count_step(c, model, batches)
            before = seen["flops"] if c.max_flops else step
            after = before + (flops if c.max_flops else 1)
            lr, weights = lr_at(before, after, budget, c), weights_of_terms(c, before / budget)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(step_seed(c.seed, step) + distributed.rank)  # of dropout and of sigreg
            means = backward(step_terms, batches, counts, weights, device, wait=not c.prefetch)
            for weight in params.values():  # one of a term that the step lacks is decayed all the same
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            grad_norm = nn.utils.clip_grad_norm_(params.values(), c.clip)
            grad_norm = float(distributed.whole(grad_norm))  # CPU-GPU sync point
            means = dict(zip(means, distributed.total([float(mean) for mean in means.values()]), strict=True))
            check_finite(step, means, grad_norm, saved, data.train, sampler)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            update_average(ema, model, c.ema_decay)

            done = step + 1
            seen = {"examples": seen["examples"] + examples, "tokens": seen["tokens"] + counts["ntp"],
                    "flops": seen["flops"] + flops, "seconds": time.perf_counter() - began}
            last = after >= budget
            row = {"step": done, "epoch": done / an_epoch, **seen}
            bar.update(after - before)
            if done % c.log_every == 0 or done % every == 0 or done % an_epoch == 0 or last:
                speed = round((seen["tokens"] - logged["tokens"]) / (seen["seconds"] - logged["seconds"]))
                logged = seen
                bar.set_postfix({name: f"{mean:.4f}" for name, mean in means.items()})
                loss = sum(weights[name] * mean for name, mean in means.items())
                run.write(row | means | {"loss": loss, "lr": lr, "grad_norm": grad_norm,
                                         "tokens_per_s": speed})
            if done % (c.eval_every or an_epoch) == 0 and not last:
                began += score_sample(c, run, model, blank, tokenizer, data, row)
            if done % every == 0 or last:
                run.save(model, optimizer, done, seen, ema)
                saved = done
    if interrupts.asked:
        raise KeyboardInterrupt
    return distributed.whole_model(model, blank)


def train(c: Config) -> dict:
    """Train, or go on training, and score; returns what eval.json holds (to rank 0)."""
    c = checked(c)
    device, folder = distributed.join(pick_device(c.device)), Path(c.out)
    print(printable(in_words(c)), flush=True)
    with distributed.zero_first():
        data = load(c)
        model, tokenizer = make_model(c, data)
        lengths = fit_splits(data, tokenizer, model.config.max_seq_len, c.on_long, c)
        limit = c.max_new_tokens or default_max_new_tokens(tokenizer, data.train)
        record = describe_run(c, data, device, limit) | {"format_in_use": tokenizer.format.name}
        run = Run(folder, record, Config, FORMER, writes=distributed.rank == 0)
    with run:
        if (folder / "eval.json").exists():
            print(f"{folder}: finished before")
            return read_score(folder)
        model = training_loop(c, run, model, tokenizer, data, lengths, device)
        return {} if distributed.rank else finish(c, folder, model, tokenizer, data, limit)


def main() -> None:
    c = parse_config(description=__doc__)
    try:
        result = train(c)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(str(stop) or "the same command goes on from the last checkpoint") from None
    distributed.leave()
    if not distributed.rank:
        source = printable(f"{result.get('dataset')} ({result.get('source')} data)")
        print(f"\n{source}, {result['n']} {c.eval_split} items")
        print(table({c.out: result}))


if __name__ == "__main__":
    with main_guard():
        main()
