"""Train LLM-JEPA, from scratch or from a checkpoint: a step, the loop, resume. Settings: config.py.

    python train.py --dataset nlrx_synth                    LLM-JEPA with all defaults
    python train.py --dataset nlrx_synth --lam 0            the baseline: plain next-token training
    python train.py --dataset nlrx_synth --passes three     the paper's three passes, not the fused one
    python train.py --dataset my.jsonl --test_file my_test.jsonl
    python train.py --dataset gsm8k --init_from DIR         fine-tune the Llama-style model of a Hugging Face
                                                            folder, or a run; --lora_rank 64: adapters only
    torchrun --nproc_per_node 2 train.py --dataset nlrx_synth   the same losses from two processes

A run folder holds run.json (settings, data, versions), metrics.jsonl (an object per logged step: ntp and jepa
are the terms of the loss, in which a pair that --alpha drops counts as 0; tokens are L_LLM's targets, without
the views'), state.pt (the last checkpoint:
weights, optimizer, step), and at the end the model as a Hugging Face folder has it and eval.json. Ctrl-C and
SIGTERM leave a checkpoint. The same command started again goes on where the last one left it, and ends with
the same weights, bit for bit on a CPU: nothing in a run depends on anything but (seed, step).
"""
import contextlib
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from support import distributed as ranks
from batches import Rendered, Sampler, Shape, ahead, collate_fused, collate_three, fit_splits, loss_dropout
from batches import pack, tube_positions
from config import Config, describe, model_config, parse_config
from data import Dataset, announce, load_dataset, own_tokenizer
from eval import VIEW_OPTIONS, default_max_new_tokens, evaluate
from support.files import BadInput, Interrupted, interrupts, main_guard, read_json, write_text
from jepa_loss import DISTANCES, Losses, dense_mask, flex_mask, fused, stop_gradient, three_pass
from jepa_loss import total_loss
from model import Transformer
from support.distributed import pick_device
from support.lora import add_lora, merge_lora
from tasks.datasets import sha256
from experiments.compare import brief, read_result, table
from support.runs import Run, git_commit, summary, trainable, verify
from tasks.scorers import check_databases
from support.tokenizer import CARRIED, Tokenizer

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
            return self.passes(self.model, batch, self.distance)


def groups(c: Config, n: int) -> list[range]:
    """Which of a step's n examples this rank takes in each of its micro-batches."""
    mine = range(ranks.rank, n, ranks.world)
    size = c.micro_batch or n
    return [mine[start:start + size] for start in range(0, len(mine), size)]


def micro_batches(c: Config, train: Rendered, indices: np.ndarray, step: int,
                  shape: Shape | None = None) -> list:
    """This rank's share of the step's examples, collated in groups of at most --micro_batch."""
    views = c.lam and c.objective == "jepa"
    keep = loss_dropout(len(indices), c.alpha, c.seed, step) if views else [False] * len(indices)
    collate = collate_three if c.passes == "three" else partial(collate_fused, row_len=c.row_len, shape=shape)
    mine = groups(c, len(indices))
    batches = [collate([train[indices[i]] for i in group], [keep[i] for i in group]) for group in mine]
    if c.objective == "stp":
        draws = np.random.default_rng([c.seed, step, 3]).random((len(indices), 3))
        for group, batch in zip(mine, batches, strict=True):
            lengths = [len(train[indices[i]].main) for i in group]
            batch.tube_at = tube_positions(lengths, batch.ids.shape[1], draws[group])
    return batches


def largest_shape(c: Config, sampler: Sampler, counts: np.ndarray, total: int) -> Shape:
    """What the largest micro-batch of all steps needs, no views dropped; counts: batches.fitting's."""
    rows, tokens, labels, pairs = 1, c.row_len, 1, 1
    for step in range(total):
        indices = sampler.indices(step)
        for group in groups(c, len(indices)):
            main, fused_row, labelled = counts[indices[list(group)]].T.tolist()
            lengths = fused_row if c.lam else main
            rows, tokens = max(rows, len(pack(lengths, c.row_len))), max(tokens, *lengths)
            labels, pairs = max(labels, sum(labelled)), max(pairs, len(group))
    return Shape(rows, tokens, labels, pairs if c.lam else 0)


def step_seed(seed: int, step: int) -> int:
    return int(np.random.default_rng([seed, step, 2]).integers(2**63))


def set_precision(dtype: str) -> None:
    """Whether float32 products may be rounded; the scores of eval.json never come from such ones."""
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")


def step_flops(model: Transformer, batches: list) -> int:
    return sum(model.flops(b.n_real, b.n_visible, b.n_tokens) for b in batches)


def steps_to_match(budget: int, c: Config, model: Transformer, train: Rendered, sampler: Sampler) -> int:
    """How many steps reach so many operations. Every batch is made for it: a hundredth of the work to come.
    """
    step = 0
    while budget > 0:
        budget -= ranks.total([step_flops(model, micro_batches(c, train, sampler.indices(step), step))])[0]
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
        tokenizer = own_tokenizer(data.train, c.vocab_size)
        return Transformer(model_config(c, tokenizer.vocab_size), c.k, c.seed), tokenizer
    if not Path(c.init_from).is_dir():
        raise BadInput(f"--init_from {c.init_from}: no such folder")
    verify(c.init_from)
    model = Transformer.from_pretrained(c.init_from, torch.float32)
    tokenizer = Tokenizer.load(c.init_from, model.config.vocab_size, c.format)
    if model.pred_embedding is None or len(model.pred_embedding) != c.k:
        model.add_predictors(c.k, c.seed)
    if c.lora_rank > model.config.dim:
        raise BadInput(f"--lora_rank {c.lora_rank}: more than the model's width of {model.config.dim}")
    if c.lora_rank:
        add_lora(model, c.lora_rank, c.lora_dropout, c.seed)
    return model, tokenizer


def view_options(c: Config) -> dict:
    """What data.render_views takes."""
    return {name: getattr(c, name) for name in VIEW_OPTIONS}


def name_of(init_from: str) -> str:
    """A run by its settings, without its seed; "" if it is none."""
    path, known = Path(init_from, "run.json"), {field.name for field in fields(Config)} - {"seed"}
    if not init_from or not path.exists():
        return ""
    config = read_json(path).get("config", {})
    return describe(Config(**{name: value for name, value in config.items() if name in known}))


def forward_dtype(c: Config, device: torch.device) -> str:
    """--dtype, auto resolved."""
    return c.dtype if c.dtype != "auto" else "bfloat16" if native_bf16(device) else "float32"


def budget_of(match_flops: str) -> int | None:
    """The operations that the run --match_flops took."""
    if not match_flops:
        return None
    flops = read_result(match_flops)["trained"]["flops"]
    if type(flops) is not int or flops < 1:
        raise BadInput(f"--match_flops {match_flops}: its eval.json does not say what the training took")
    return flops


def describe_run(c: Config, data: Dataset, device: torch.device, max_new_tokens: int) -> dict:
    """What run.json is to hold."""
    base = [path for path in sorted(Path(c.init_from).iterdir()) if path.suffix == ".safetensors"
            or path.name in ("config.json", *CARRIED)] if c.init_from else []
    return {"config": asdict(c), "source": data.source, "files": data.files,
            "init": {str(path): sha256(path) for path in base}, "init_run": name_of(c.init_from),
            "budget": budget_of(c.match_flops),
            "dtype": forward_dtype(c, device),
            "system": data.train[0].system, "max_new_tokens": max_new_tokens, "device": str(device),
            "git_commit": git_commit(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__}}


def finish(folder: Path, model: Transformer, tokenizer: Tokenizer, data: Dataset, options: dict,
           limit: int) -> dict:
    """Write the model, adapters merged, and its score on the whole test split; print five answers."""
    set_precision("float32")
    merge_lora(model)
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

def fit(c: Config, run: Run, model: Transformer, tokenizer: Tokenizer, data: Dataset, counts: np.ndarray,
        device: torch.device) -> None:
    """All steps that the run still lacks; counts: batches.fitting's of data.train."""
    dtype, options = run.record["dtype"], view_options(c)
    model.to(device, torch.float64 if dtype == "float64" else torch.float32)
    model.grad_checkpointing = c.grad_checkpointing
    set_precision(dtype)
    examples = Rendered(data.train, tokenizer, **options)
    sampler = Sampler(counts[:, 0], c.batch_size, c.seed)  # by the length of main
    an_epoch = sampler.steps_per_epoch
    total = min(c.max_steps or math.inf, c.epochs * an_epoch)
    if c.match_flops:
        total = steps_to_match(run.record["budget"], c, model, examples, sampler)
    every = c.checkpoint_every or an_epoch
    optimizer, weights = make_optimizer(model, c), trainable(model)
    start, seen = run.restore(model, optimizer, every)
    compiled = c.compile if c.compile is not None else device.type == "cuda"
    fixed = c.row_len and c.distance != "infonce" and (
        device.type == "cuda" if c.fixed_shapes is None else c.fixed_shapes)
    shape = largest_shape(c, sampler, counts, total) if fixed else None
    step_losses = Step(model, c, dtype)
    if compiled:
        step_losses = torch.compile(step_losses, dynamic=shape is None)
    n_trained = sum(weight.numel() for weight in weights.values())
    print(f"{model.n_params():,} parameters{f' ({n_trained:,} trained)' if c.lora_rank else ''}, "
          f"{len(examples)} examples, {total} steps on {ranks.world} x {device} "
          f"in {dtype}{', compiled' if compiled else ''}; run folder {run.folder}"
          f"{f', from step {start}' if start else ''}", flush=True)

    bar = tqdm(range(start, total), initial=start, total=total, disable=ranks.rank > 0 or None, unit="step",
               dynamic_ncols=True)
    collated = (micro_batches(c, examples, sampler.indices(step), step, shape)
                for step in range(start, total))
    if c.prefetch:
        collated = ahead(collated)
    began, logged, saved, step = time.perf_counter() - seen["seconds"], seen, start, start
    interrupts.waits = True
    try:
        for step, batches in zip(bar, collated, strict=True):
            look = None
            if ranks.rank == 0 and step and step % an_epoch == 0:
                with contextlib.suppress(Interrupted), interrupts.now():  # if interrupted, repeated on resume
                    look, _ = evaluate(model, tokenizer, data, options, run.record["max_new_tokens"], n=200)
            n_tokens, n_pairs, flops, interrupted = ranks.total(
                [sum(b.n_tokens for b in batches), sum(b.n_pairs for b in batches),
                 step_flops(model, batches), interrupts.asked])
            if interrupted:  # one of the ranks is: all stop here
                raise Interrupted
            if look:
                look.pop("items", None)
                began += look["seconds"]
                run.write({"step": step, "epoch": step / an_epoch, **seen, "look": look})
                tqdm.write(f"epoch {step // an_epoch}, {look['n']} {c.eval_split} items: {brief(look)}")
            torch.manual_seed(step_seed(c.seed, step) + ranks.rank)  # of the adapters' dropout
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, total, c)
            ntp = jepa = 0.0
            for batch in batches:
                losses = step_losses(batch.to(device, wait=not c.prefetch))
                total_loss(losses, n_tokens, n_pairs, c.lam, c.gamma).backward()
                ntp = ntp + losses.ntp_sum.detach() / n_tokens
                jepa = jepa + losses.jepa_sum.detach() / n_pairs
            ranks.sum_gradients(weights.values())
            grad_norm = nn.utils.clip_grad_norm_(weights.values(), c.clip)
            ntp, jepa = ranks.total([float(ntp), float(jepa)])  # waits for the device
            if not math.isfinite(float(grad_norm) + ntp + jepa):
                where = ", ".join(data.train[int(i)].where for i in sampler.indices(step))
                kept = f"the checkpoint of step {saved} is kept" if saved else "there is no checkpoint yet"
                raise BadInput(f"step {step + 1}: the loss is {ntp} + {c.lam} * {jepa}, the "
                               f"gradient's norm {float(grad_norm)}; {kept}; "
                               f"try a lower --lr, or look at the step's examples: {where}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            seen = {"examples": seen["examples"] + n_pairs, "tokens": seen["tokens"] + n_tokens,
                    "flops": seen["flops"] + flops, "seconds": time.perf_counter() - began}
            if done % c.log_every == 0 or done % every == 0 or done % an_epoch == 0 or done == total:
                speed = round((seen["tokens"] - logged["tokens"]) / (seen["seconds"] - logged["seconds"]))
                logged = seen
                bar.set_postfix(ntp=f"{ntp:.4f}", jepa=f"{jepa:.4f}")
                run.write({"step": done, "epoch": done / an_epoch, **seen, "ntp": ntp, "jepa": jepa,
                           "loss": c.gamma * ntp + c.lam * jepa, "lr": optimizer.param_groups[0]["lr"],
                           "grad_norm": float(grad_norm), "tokens_per_s": speed})
            if done % every == 0 or done == total:
                run.save(model, optimizer, done, seen)
                saved = done
    except Interrupted:
        run.save(model, optimizer, step, seen)
        raise Interrupted(f"the same command goes on from step {step}") from None
    finally:
        interrupts.waits = False
    interrupts.look()


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
        run = Run(folder, describe_run(c, data, device, limit), writes=ranks.rank == 0)
    with run:
        if (folder / "eval.json").exists():
            verify(folder)
            print(f"{folder}: finished before")
            return read_json(folder / "eval.json")
        fit(c, run, model, tokenizer, data, counts, device)
        if ranks.rank:
            return {}
        return finish(folder, model, tokenizer, data, options, limit)


def main() -> None:
    c = parse_config(description=__doc__)
    try:
        result = train(c)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(str(stop) or "the same command goes on from the last checkpoint") from None
    ranks.leave()
    if ranks.rank:
        return
    print(f"\n{result['dataset']} ({result['source']} data), {result['n']} {c.eval_split} items")
    print(table({c.out: result}))


if __name__ == "__main__":
    with main_guard():
        main()
