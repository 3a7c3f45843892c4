"""How fast, and how far from the hardware: all variants of the method side by side, in one run.

    python -m experiments.bench                                           preset nano, on what device there is
    python -m experiments.bench --preset llama-3.2-1b --row_len 4096      as on a GPU: packed rows
    python -m experiments.bench --json bench.json

The variants (plain, three passes, fused, fused with loss dropout 0.75) take turns, block by block, over the
same examples; the table has medians over the blocks. `useful` counts the FLOPs that the loss needs
(model.Transformer.flops) and none that padding or masked attention adds; its share is of the peak, the
fastest matrix product of the same dtype, measured between the blocks. `loader`: share of the time spent
waiting for batches.
"""
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal

import torch
from torch import nn

from data import micro_batches, own_tokenizer, render_prompt, render_views
from model import PRESETS, Transformer
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


@dataclass
class BenchOptions:
    preset: Literal[tuple(PRESETS)] = opt("nano", "shape of the model")
    dataset: str = opt("nlrx_synth", "as of train.py")
    data_dir: str = opt("data", "where the published files are")
    device: Literal[DEVICES] = opt("auto", "auto: cuda, then mps, then cpu")
    dtype: Literal["auto", "float32", "bfloat16"] = opt("auto", "as of train.py")
    compile: bool | None = opt(None, "torch.compile (default: on CUDA only)")
    batch_size: int = opt(32, "examples per step", low=1)
    row_len: int = opt(0, "pack examples into rows of so many tokens; 0: one example a row", low=0)
    steps: int = opt(20, "steps per block", low=1)
    blocks: int = opt(5, "blocks per variant, after one to warm up", low=1)
    profile: bool = opt(False, "show where the time of the fused variant goes")
    json: str = opt("", "write all numbers to this file")


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
        done["tokens"] += sum(batch.n_real for batch in batches)
        done["flops"] += flops
        backward(step_terms, batches, counts, weights, model.device, wait=False)
        nn.utils.clip_grad_norm_(model.parameters(), c.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    synchronize(model.device)
    return done | {"seconds": time.perf_counter() - began}


def measure(o: BenchOptions) -> dict:
    """All that the tables show, as numbers."""
    c = checked(Config(**{f.name: getattr(o, f.name) for f in fields(o) if hasattr(Config, f.name)}))
    device = pick_device(c.device)
    on_cuda, dtype = device.type == "cuda", forward_dtype(c.dtype, device)
    data = load_dataset(c.dataset, c.data_dir)
    tokenizer = own_tokenizer(data.train, c.vocab_size)
    model = Transformer(model_config(c, tokenizer.vocab_size), c.k, c.seed).to(device)
    examples = [render_views(e, tokenizer, c) for e in data.train]
    sampler = Sampler([len(v.main) for v in examples], c.batch_size, c.seed)
    optimizer, run_block, n_steps = make_optimizer(model, c), {}, (o.blocks + 1) * o.steps
    for name, changes in VARIANTS.items():
        variant = replace(c, **changes)
        make = partial(micro_batches, variant, examples.__getitem__, sampler)
        step_terms, make = compile_step(variant, Step(model, variant, dtype), make, n_steps)
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
            "profile": profile(partial(run_block["fused"], range(o.steps)), device) if o.profile else {},
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


def profile(run: Callable, device: torch.device, top: int = 12) -> dict[str, float]:
    """Share of the time that each of the most expensive operators takes while run() runs."""
    on_cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as recorded:
        run()
    times = {event.key: event.self_device_time_total if on_cuda else event.self_cpu_time_total
             for event in recorded.key_averages()}
    return {name: times[name] / sum(times.values()) for name in sorted(times, key=times.get)[:-top - 1:-1]}


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
    shares = ", ".join(f"{name} {share:.1%}" for name, share in r["profile"].items())
    rows = [("variant", "examples/s (min to max)", "tokens/s", "useful GFLOP/s", "of peak", "time / plain",
             "tokens / plain", "loader", "memory")]
    rows += [(name, f"{x['examples_per_s']:.0f} ({x['slowest']:.0f} to {x['fastest']:.0f})",
              f"{x['tokens_per_s']:,.0f}", f"{x['useful_flops'] / 1e9:,.0f}", f"{x['share_of_peak']:.1%}",
              f"{x['time_to_plain']:.3f}", f"{x['tokens_to_plain']:.3f}", f"{x['loader']:.1%}",
              f"{x['memory'] / 2**30:.2f} GiB" if x["memory"] else "-") for name, x in r["variants"].items()]
    return (f"{r['preset']}, {r['parameters']:,} parameters, {r['dtype']}{', compiled' * r['compiled']}, on "
            f"{r['device']} ({r['threads']} threads), torch {r['torch']}\n"
            f"matrix products: {peaks}; process memory {r['process_memory'] / 2**30:.2f} GiB\n\n"
            f"{markdown(rows)}\n\n" + (f"time of the fused variant: {shares}\n\n" if shares else "")
            + "generation of {items:,} test answers: {seconds:.1f} s, {cached:.1f} items/s with the cache, "
              "{uncached:.1f} without".format(**r["generation"]))


def main() -> None:
    o = parse_options(BenchOptions, description=__doc__)
    result = measure(o)
    print(report(result))
    if o.json:
        write_text(o.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    with main_guard():
        main()
