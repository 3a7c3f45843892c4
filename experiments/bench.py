"""How fast, and how far from the hardware: every arm of the method side by side, in one run.

    python bench.py                                                       preset nano, on what device there is
    python bench.py --preset llama-3.2-1b --row_len 4096                  as on a GPU: packed rows
    python bench.py --json bench.json

The arms (plain, three passes, fused, fused with loss dropout 0.75) take turns, block by block, over the same
examples; medians over the blocks, and the smallest and largest beside them. `useful` counts the arithmetic
that the loss needs (the formula: model.Transformer.flops), and nothing that padding or masked attention adds;
its share is of `peak`, the fastest matrix product of the same dtype, measured between the blocks.
"""
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from batches import Sampler
from config import Config, model_config
from data import Views, own_tokenizer, render_prompt, render_views
from eval import generate, generate_slow
from support.files import BadInput, Parser, main_guard, write_text
from jepa_loss import total_loss
from model import PRESETS, Transformer
from support.distributed import DEVICES, pick_device
from support.tokenizer import Tokenizer
from tasks.datasets import load_dataset
from train import Step, forward_dtype, make_optimizer, micro_batches, set_precision, step_flops

ARMS = {"plain": dict(lam=0.0), "three passes": dict(passes="three"), "fused": dict(),
        "fused, alpha 0.75": dict(alpha=0.75)}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations per second of the fastest of many square matrix products."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def one_block(arm: Config, step_losses, model: Transformer, optimizer, examples: list[Views],
              sampler: Sampler, steps: range) -> dict:
    """These steps as train.py does them: seconds, those of collating alone, and what was done in them."""
    device, done = model.device, {"seconds": 0.0, "loading": 0.0, "examples": 0, "tokens": 0, "flops": 0}
    synchronize(device)
    began = time.perf_counter()
    for step in steps:
        at = time.perf_counter()
        batches = micro_batches(arm, examples, sampler.indices(step), step)
        done["loading"] += time.perf_counter() - at
        done["flops"] += step_flops(model, batches)
        n_tokens, n_pairs = sum(b.n_tokens for b in batches), sum(b.n_pairs for b in batches)
        for batch in batches:
            done["examples"] += batch.n_pairs
            done["tokens"] += batch.n_real
            total_loss(step_losses(batch.to(device)), n_tokens, n_pairs, arm.lam).backward()
        nn.utils.clip_grad_norm_(model.parameters(), arm.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    synchronize(device)
    return done | {"seconds": time.perf_counter() - began}


def measure(c: Config, blocks: int, steps: int, profiled: bool = False) -> dict:
    """All that the tables show, as numbers."""
    device = pick_device(c.device)
    dtype = forward_dtype(c, device)
    data = load_dataset(c.dataset, c.data_dir)
    tokenizer = own_tokenizer(data.train, c.vocab_size)
    model = Transformer(model_config(c, tokenizer.vocab_size), c.k, c.seed).to(device)
    examples = [render_views(e, tokenizer, c.k) for e in data.train]
    sampler = Sampler([len(v.main) for v in examples], c.batch_size, c.seed)
    optimizer = make_optimizer(model, c)
    compiled = c.compile if c.compile is not None else device.type == "cuda"
    arms = {name: replace(c, **changes) for name, changes in ARMS.items()}
    modules = {name: Step(model, arm, dtype) for name, arm in arms.items()}
    if compiled:
        modules = {name: torch.compile(module, dynamic=True) for name, module in modules.items()}

    set_precision(dtype)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16} if dtype == "bfloat16" else {
        dtype: torch.float32}
    peaks = dict.fromkeys(dtypes, 0.0)

    spans = [range(block * steps, (block + 1) * steps) for block in range(blocks + 1)]
    blocks_of, memory_of = {name: [] for name in arms}, dict.fromkeys(arms)
    for span in spans:  # the first warms up
        peaks = {name: max(rate, peak(device, dtypes[name])) for name, rate in peaks.items()}
        for name, arm in arms.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            blocks_of[name].append(one_block(arm, modules[name], model, optimizer, examples, sampler, span))
            if device.type == "cuda":
                memory_of[name] = torch.cuda.max_memory_allocated()
    results = {name: account(done[1:], peaks[dtype]) | {"memory": memory_of[name]}
               for name, done in blocks_of.items()}
    for result in results.values():
        result["time_to_plain"] = result["seconds_per_example"] / results["plain"]["seconds_per_example"]
        result["tokens_to_plain"] = result["tokens_per_example"] / results["plain"]["tokens_per_example"]
    shares = profile(lambda: one_block(c, modules["fused"], model, optimizer, examples, sampler, spans[-1]),
                     device) if profiled else {}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    name = torch.cuda.get_device_name() if device.type == "cuda" else str(device)
    return {"device": name, "dtype": dtype, "compiled": compiled, "preset": c.preset,
            "parameters": model.n_params(), "torch": torch.__version__, "threads": torch.get_num_threads(),
            "peak": peaks, "process_memory": memory, "arms": results,
            "profile": shares, "generation": generation(model, tokenizer, data.test)}


def account(blocks: list[dict], peak_rate: float) -> dict:
    """Rates of an arm from its blocks: medians."""
    def rates(of: str) -> list[float]:
        return sorted(block[of] / block["seconds"] for block in blocks)

    def total(of: str) -> float:
        return sum(block[of] for block in blocks)
    rate, useful = statistics.median(rates("examples")), statistics.median(rates("flops"))
    return {"examples_per_s": rate, "slowest": rates("examples")[0], "fastest": rates("examples")[-1],
            "seconds_per_example": 1 / rate, "tokens_per_s": statistics.median(rates("tokens")),
            "tokens_per_example": total("tokens") / total("examples"), "useful_flops": useful,
            "share_of_peak": useful / peak_rate, "loader": total("loading") / total("seconds")}


def profile(run: Callable, device: torch.device, top: int = 12) -> dict[str, float]:
    """Share of the time that each of the most expensive operators takes while run() runs."""
    on_device = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_device else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as recorded:
        run()
    times = {event.key: event.self_device_time_total if on_device else event.self_cpu_time_total
             for event in recorded.key_averages()}
    return {name: times[name] / sum(times.values()) for name in sorted(times, key=times.get)[:-top - 1:-1]}


def generation(model: Transformer, tokenizer: Tokenizer, test: list) -> dict:
    """Test items per second with the cache and, on every hundredth, without: each answer as long as its
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
    peaks = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in r["peak"].items())
    lines = [f"{r['preset']}, {r['parameters']:,} parameters, {r['dtype']}{', compiled' * r['compiled']}, on "
             f"{r['device']} ({r['threads']} threads), torch {r['torch']}",
             f"matrix products: {peaks}; process memory {r['process_memory'] / 2**30:.2f} GiB", "",
             "| arm | examples/s (min to max) | tokens/s | useful GFLOP/s | of peak | time / plain "
             "| tokens / plain | loader | memory |", "|---|---|---|---|---|---|---|---|---|"]
    for name, a in r["arms"].items():
        memory = f"{a['memory'] / 2**30:.2f} GiB" if a["memory"] else "-"
        rate = f"{a['examples_per_s']:.0f} ({a['slowest']:.0f} to {a['fastest']:.0f})"
        lines.append(f"| {name} | {rate} | {a['tokens_per_s']:,.0f} | {a['useful_flops'] / 1e9:,.0f} "
                     f"| {a['share_of_peak']:.1%} | {a['time_to_plain']:.3f} | {a['tokens_to_plain']:.3f} "
                     f"| {a['loader']:.1%} | {memory} |")
    if r["profile"]:
        lines += ["", "time of the fused arm: " + ", ".join(f"{name} {share:.1%}" for name, share in
                                                              r["profile"].items())]
    g = r["generation"]
    return "\n".join([*lines, "", f"generation of {g['items']:,} test answers: {g['seconds']:.1f} s, "
                                  f"{g['cached']:.1f} items/s with the cache, {g['uncached']:.1f} without"])


def main() -> None:
    parser = Parser(description="Plain, three passes, fused, fused with loss dropout: side by side.")
    parser.add_argument("--preset", choices=PRESETS, default="nano")
    parser.add_argument("--dataset", default="nlrx_synth")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "tf32", "bfloat16"), default="auto")
    parser.add_argument("--compile", action="store_true", default=None, help="(default: on CUDA only)")
    parser.add_argument("--batch_size", type=int, default=32, help="examples per step")
    parser.add_argument("--row_len", type=int, default=0, help="pack into rows of so many tokens; 0: no")
    parser.add_argument("--steps", type=int, default=20, help="steps per block")
    parser.add_argument("--blocks", type=int, default=5, help="blocks per arm, after one to warm up")
    parser.add_argument("--profile", action="store_true", help="where the time of the fused arm goes")
    parser.add_argument("--json", help="write all numbers to this file")
    args = vars(parser.parse_args())
    blocks, steps, path, profiled = (args.pop(name) for name in ("blocks", "steps", "json", "profile"))
    if min(blocks, steps, args["batch_size"]) < 1 or args["row_len"] < 0:
        raise BadInput("--blocks, --steps and --batch_size must be at least 1, --row_len 0 or more")
    if args["dtype"] == "tf32" and pick_device(args["device"]).type != "cuda":
        raise BadInput("--dtype tf32 needs CUDA")
    result = measure(Config(**args), blocks, steps, profiled)
    print(report(result))
    if path:
        write_text(path, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    with main_guard():
        main()
