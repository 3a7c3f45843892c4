"""How fast, and how far from the hardware: all variants of the method side by side, in one run.

    python -m experiments.bench                                           preset nano, on what device there is
    python -m experiments.bench --preset llama-3.2-1b --row_len 4096      as on a GPU: packed rows
    python -m experiments.bench --ranks 2                                 two processes against one
    python -m experiments.bench --paper                                   memory of larger models, by formula
    python -m experiments.bench --json bench.json

The variants (plain, three passes, fused, fused with loss dropout 0.75) take turns, block by block, over the
same examples; the table has medians over the blocks. `useful` counts the FLOPs that the loss needs
(model.Transformer.flops) and none that padding or masked attention adds; its share is of the peak, the
fastest matrix product of the same dtype, measured between the blocks. `loader`: share of the time spent
waiting for batches.
"""
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from data import micro_batches, own_tokenizer, render_prompt, render_views
from model import PRESETS, ModelConfig, Transformer
from support import distributed
from support.distributed import DEVICES, pick_device
from support.files import main_guard, write_text
from support.generation import generate, generate_slow
from support.settings import opt, parse_options
from support.speed import Sampler, forward_dtype, prefetch
from support.tables import markdown
from support.tokenizer import Tokenizer
from tasks.datasets import load_dataset
from train import Config, Step, backward, checked, compile_step, count_step, make_optimizer
from train import model_config, weights_of_terms

VARIANTS = {"plain": dict(lam=0.0), "three passes": dict(passes="three", row_len=0), "fused": dict(),
            "fused, alpha 0.75": dict(alpha=0.75)}


timed = partial(opt, needs="!paper")


@dataclass
class BenchOptions:
    preset: Literal[tuple(PRESETS)] = timed("nano", "shape of the model")
    dataset: str = timed("nlrx_synth", "as of train.py")
    data_dir: str = timed("data", "where the published files are")
    device: Literal[DEVICES] = timed("auto", "auto: cuda, then mps, then cpu")
    dtype: Literal["auto", "float32", "bfloat16"] = timed("auto", "as of train.py")
    compile: bool | None = timed(None, "torch.compile (default: on CUDA only)")
    batch_size: int = timed(32, "examples per step", low=1)
    row_len: int = timed(0, "pack examples into rows of so many tokens; 0: one example a row", low=0)
    steps: int = timed(20, "steps per block", low=1)
    blocks: int = timed(5, "blocks per variant, after one to warm up", low=1)
    ranks: int = timed(0, "the fused variant on so many processes, against one", low=0)
    paper: bool = opt(False, "measure nothing, show what larger models need")
    json: str = timed("", "write all numbers to this file")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of the fastest of many square matrix products."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def one_block(c: Config, model: Transformer, optimizer: torch.optim.Optimizer, step_terms: Callable,
              make: Callable, steps: range) -> dict:
    """Train these steps; returns their seconds, those of waiting for batches, and what was done in them."""
    done = {"seconds": 0.0, "loading": 0.0, "examples": 0, "tokens": 0, "flops": 0}
    weights, batches_of_steps = weights_of_terms(c), prefetch(make, steps)
    synchronize(model.device)
    began = time.perf_counter()
    for _ in steps:
        at = time.perf_counter()
        batches = next(batches_of_steps)
        done["loading"] += time.perf_counter() - at
        counts, examples, flops = count_step(c, model, batches)
        done["examples"] += examples
        done["tokens"] += distributed.total([sum(batch.n_real for batch in batches)])[0]
        done["flops"] += flops
        backward(step_terms, batches, counts, weights, model.device, wait=False)
        nn.utils.clip_grad_norm_(model.parameters(), c.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    synchronize(model.device)
    return done | {"seconds": time.perf_counter() - began}


def prepare(o: BenchOptions) -> tuple:
    """Config, device, dtype of the forward, dataset, tokenizer, model, and what makes a variant's batches."""
    c = checked(Config(**{f.name: getattr(o, f.name) for f in fields(o) if hasattr(Config, f.name)}))
    device = distributed.join(pick_device(c.device))
    data = load_dataset(c.dataset, c.data_dir)
    tokenizer = own_tokenizer(data.train, c.vocab_size)
    model = Transformer(model_config(c, tokenizer.vocab_size), c.k, c.seed)
    examples = [render_views(e, tokenizer, c) for e in data.train]
    sampler = Sampler([len(v.main) for v in examples], c.batch_size, c.seed)
    return (c, device, forward_dtype(c.dtype, device), data, tokenizer, model,
            lambda variant: partial(micro_batches, variant, examples.__getitem__, sampler))


def measure(o: BenchOptions) -> dict:
    """All that the tables show, as numbers."""
    c, device, dtype, data, tokenizer, model, make_of = prepare(o)
    on_cuda, model = device.type == "cuda", model.to(device)
    optimizer, run_block, n_steps = make_optimizer(model, c), {}, (o.blocks + 1) * o.steps
    for name, changes in VARIANTS.items():
        variant = replace(c, **changes)
        step_terms, make = compile_step(variant, Step(model, variant, dtype), make_of(variant), n_steps)
        run_block[name] = partial(one_block, variant, model, optimizer, step_terms, make)

    peaks = dict.fromkeys(("float32", dtype) if dtype == "bfloat16" else (dtype,), 0.0)
    done, memory = {name: [] for name in VARIANTS}, dict.fromkeys(VARIANTS)
    for first in range(0, n_steps, o.steps):
        for name, rate in peaks.items():
            peaks[name] = max(rate, peak(device, getattr(torch, name)))
        for name in VARIANTS:
            if on_cuda:
                torch.cuda.reset_peak_memory_stats()
            done[name].append(run_block[name](range(first, first + o.steps)))
            memory[name] = torch.cuda.max_memory_allocated() if on_cuda else None
    variants = {name: rates(blocks[1:], peaks[dtype]) | {"memory": memory[name]}  # the first block warms up
                for name, blocks in done.items()}
    plain, rss = variants["plain"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for x in variants.values():
        x["time_to_plain"] = plain["examples_per_s"] / x["examples_per_s"]
        x["tokens_to_plain"] = x["tokens_per_example"] / plain["tokens_per_example"]
    return {"device": torch.cuda.get_device_name() if on_cuda else str(device), "dtype": dtype,
            "compiled": on_cuda if c.compile is None else c.compile, "preset": c.preset,
            "parameters": model.n_params(), "torch": torch.__version__, "threads": torch.get_num_threads(),
            "peak": peaks, "variants": variants,
            "process_memory": rss * (1 if sys.platform == "darwin" else 1024),
            "generation": generation(model, tokenizer, data.test)}


def rates(blocks: list[dict], peak_rate: float) -> dict:
    """Medians over a variant's blocks."""
    speeds, flops, tokens = ([block[of] / block["seconds"] for block in blocks]
                             for of in ("examples", "flops", "tokens"))
    total = {name: sum(block[name] for block in blocks) for name in blocks[0]}
    return {"examples_per_s": statistics.median(speeds), "slowest": min(speeds), "fastest": max(speeds),
            "tokens_per_s": statistics.median(tokens), "useful_flops": statistics.median(flops),
            "share_of_peak": statistics.median(flops) / peak_rate,
            "tokens_per_example": total["tokens"] / total["examples"],
            "loader": total["loading"] / total["seconds"]}


def generation(model: Transformer, tokenizer: Tokenizer, test: list) -> dict:
    """Test items per second with the cache and, on every hundredth, without. Each answer is as long as its
    target, as those of a trained model are."""
    prompts = [render_prompt(example, tokenizer) for example in test]
    limits = [len(tokenizer.encode(example.code)) + 1 for example in test]
    generate(model, prompts[:8], -1, 2)
    began = time.perf_counter()
    generate(model, prompts, -1, limits)
    seconds, began = time.perf_counter() - began, time.perf_counter()
    for prompt, limit in zip(prompts[::100], limits[::100], strict=True):
        generate_slow(model, prompt, -1, limit)
    return {"items": len(test), "seconds": seconds, "cached": len(test) / seconds,
            "uncached": len(prompts[::100]) / (time.perf_counter() - began)}


def report(r: dict) -> str:
    """All of it as text."""
    peaks = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in r["peak"].items())
    rows = [("variant", "examples/s (min to max)", "tokens/s", "useful GFLOP/s", "of peak", "time / plain",
             "tokens / plain", "loader", "memory")]
    rows += [(name, f"{x['examples_per_s']:.0f} ({x['slowest']:.0f} to {x['fastest']:.0f})",
              f"{x['tokens_per_s']:,.0f}", f"{x['useful_flops'] / 1e9:,.0f}", f"{x['share_of_peak']:.1%}",
              f"{x['time_to_plain']:.3f}", f"{x['tokens_to_plain']:.3f}", f"{x['loader']:.1%}",
              f"{x['memory'] / 2**30:.2f} GiB" if x["memory"] else "-") for name, x in r["variants"].items()]
    return (f"{r['preset']}, {r['parameters']:,} parameters, {r['dtype']}{', compiled' * r['compiled']}, on "
            f"{r['device']} ({r['threads']} threads), torch {r['torch']}\n"
            f"matrix products: {peaks}; process memory {r['process_memory'] / 2**30:.2f} GiB\n\n"
            f"{markdown(rows)}\n\n"
            + "generation of {items:,} test answers: {seconds:.1f} s, {cached:.1f} items/s with the cache, "
              "{uncached:.1f} without".format(**r["generation"]))


# ---- many processes, and memory ----------------------------------------------------------------------------

LARGER = {"llama-3.2-3b": dict(PRESETS["llama-3.2-1b"], dim=3072, n_layers=28, n_heads=24, head_dim=128),
          "llama-3.1-8b": dict(PRESETS["llama-3.2-1b"], dim=4096, n_layers=32, head_dim=128, ffn_dim=14336,
                               tie_embeddings=False)}


def memory(config: ModelConfig, ranks: int, tokens: int, labels: int, width: int = 2,
           recompute: bool = False) -> dict[str, float]:
    """Bytes of one rank that trains all weights: what it always holds, the peak of a step, and the peak of
    scoring on rank 0. tokens, labels: of its largest forward; width: bytes of a number in the forward."""
    C, L, V, F = config.dim, config.n_layers, config.vocab_size, config.ffn_dim
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    block, rest = 2 * C * (q + kv) + 3 * C * F + 2 * C, V * C * (1 if config.tie_embeddings else 2) + C
    weights = L * block + rest
    kept = 4 * 4 * C + width * (2 * C + 2 * q + 2 * kv + 4 * F)  # of a token and block, for the backward
    activations = tokens * (L * 4 * C + kept if recompute else L * kept) + 12 * labels * V
    gathered = 0 if ranks == 1 else 8 * rest + 2 * (width + 4) * block  # with their gradients
    if width == 2:  # what autocast keeps of float32 weights: of those that are not gathered in bfloat16
        gathered += 2 * (weights if ranks == 1 else rest)
    held = 16 * weights / ranks  # weight, gradient, two moments
    return {"weights": weights, "held": held, "scoring": held * 3 / 4 + 4 * weights,
            # the backward makes gradients, from the last block to the first, and frees activations
            "step": max(held * 3 / 4 + activations, held + tokens * kept) + gathered}


def paper() -> str:
    """GPUs of each size that train a model, one row of 4,096 tokens each, half of them with a label."""
    sizes = (24, 40, 80, 141)
    rows = [("model", "parameters", "recompute", "GiB on 1, 2, 8 GPUs", *(f"GPUs of {n} GB" for n in sizes))]
    for name, shape in (PRESETS | LARGER).items():
        config = ModelConfig(**dict(vocab_size=512 if name == "nano" else 128256) | shape)
        for recompute in (False, True):
            need = {n: memory(config, n, 4096, 2048, recompute=recompute) for n in (1, 2, 4, 8, 16, 32)}
            fits = [[n for n in need if max(need[n]["step"], need[n]["scoring"]) < 0.9e9 * size]
                    for size in sizes]
            rows.append((name, f"{need[1]['weights'] / 1e6:,.0f} M", "yes" if recompute else "no",
                         ", ".join(f"{need[n]['step'] / 2**30:.1f}" for n in (1, 2, 8)),
                         *(str(found[0]) if found else "-" for found in fits)))
    return markdown(rows)


def peak_memory(step: nn.Module, optimizer: torch.optim.Optimizer, run: Callable) -> int:
    """Bytes of all tensors at their peak while run() trains `step`; on a CPU PyTorch's own tracker counts."""
    if step.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed._tools.mem_tracker import MemTracker
    tracker = FSDPMemTracker(step, optimizer) if distributed.world > 1 else MemTracker()
    if distributed.world == 1:
        tracker.track_external(step, optimizer)
    with tracker:
        run()
    return tracker.get_tracker_snapshot("peak")[step.model.device]["Total"]


def one_rank(o: BenchOptions) -> dict:
    """Train the fused variant as one of many processes, or alone: its speed, and the most memory that a rank
    needs, measured and by formula."""
    c, device, dtype, _, _, model, make_of = prepare(o)
    step, n_steps = Step(model, c, dtype), (o.blocks + 1) * o.steps
    distributed.shard(step, [model], device, dtype, "full")
    optimizer = make_optimizer(model, c)
    step_terms, make = compile_step(c, step, make_of(c), n_steps)
    train_steps = partial(one_block, c, model, optimizer)
    blocks = [train_steps(step_terms, make, range(first, first + o.steps))
              for first in range(0, n_steps, o.steps)]
    peak_bytes = peak_memory(step, optimizer, lambda: train_steps(step, make, range(n_steps, n_steps + 1)))
    held = [x.to_local() if hasattr(x, "to_local") else x for w in model.parameters()
            for x in (w, w, *optimizer.state[w].values())]  # the second: a gradient is as big as its weight
    batch, = make(n_steps)
    wanted = memory(model.config, distributed.world, batch.ids.numel(), len(batch.label_at),
                    2 if dtype == "bfloat16" else 4)
    mine = {"held": sum(x.nbytes for x in held), "held_by_formula": round(wanted["held"]),
            "peak": peak_bytes, "peak_by_formula": round(wanted["step"])}
    of_all = [distributed.total([x * (rank == distributed.rank) for x in mine.values()])
              for rank in range(distributed.world)]
    return rates(blocks[1:], 1.0) | dict(zip(mine, map(max, *of_all, [0] * 4), strict=True))


def scaling(o: BenchOptions, arguments: list[str]) -> dict[str, dict]:
    """`one_rank` in one process, then in o.ranks, each with its share of the cores."""
    results = {}
    for n in (1, o.ranks):
        with tempfile.TemporaryDirectory() as folder:
            threads = max(1, len(os.sched_getaffinity(0)) // n)
            subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                            str(n), "-m", "experiments.bench", *arguments, "--json", f"{folder}/one.json"],
                           check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
            results[str(n)] = json.loads(Path(folder, "one.json").read_text())
    return results


def scaling_report(results: dict[str, dict]) -> str:
    rows = [("ranks", "examples/s (min to max)", "of one", "held / rank", "by formula", "peak / rank",
             "by formula")]
    bytes_of = ("held", "held_by_formula", "peak", "peak_by_formula")
    rows += [(n, f"{x['examples_per_s']:.0f} ({x['slowest']:.0f} to {x['fastest']:.0f})",
              f"{x['examples_per_s'] / results['1']['examples_per_s']:.2f}",
              *(f"{x[name] / 2**20:,.0f} MiB" for name in bytes_of)) for n, x in results.items()]
    return markdown(rows)


def main() -> None:
    o = parse_options(BenchOptions, description=__doc__)
    if o.paper:
        print(paper())
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:  # one of those that `scaling` starts
        result = one_rank(o)
        distributed.leave()
    elif o.ranks:
        dtype = forward_dtype(o.dtype, pick_device(o.device))  # may be timed, and then ranks could differ
        result = scaling(o, [*sys.argv[1:], "--dtype", dtype])
        print(scaling_report(result))
    else:
        result = measure(o)
        print(report(result))
    if o.json and not distributed.rank:
        write_text(o.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    with main_guard():
        main()
