"""Runs side by side, from the eval.json of each:

    python -m experiments.compare RUN RUN ...
    python -m experiments.compare RUN RUN ... --against RUN    differences from the variant of this run
    python -m experiments.compare RUN RUN ... --narrow         the most important columns only
    python -m experiments.compare RUN RUN ... --latex          for a paper, with what must be said of it

Runs that differ in nothing but the seed are one variant: mean ± standard deviation over its seeds. The
baseline of a variant is the plain one (next-token loss alone) that shares its other settings. On the seeds
that both have, the table shows the mean difference and its 95 % interval for other seeds and other test items
(with one seed: for other items alone). A difference is significant if the interval excludes 0.
"""
import hashlib
import json
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import train
from support.files import BadInput, main_guard, printable, write_text
from support.runs import SCORES as SHOWN
from support.runs import read_score
from support.settings import fill, idle, in_group, opt, parse_options, with_identity
from support.tables import COLUMNS, from_hex, markdown, shown

COST = ("examples", "flops", "seconds")
NARROW = ("dfa_equal", "correct", "ntp", "cos_gap", "retrieval_at_1")
STOPPING = ("prefix", "stopped", "p_end")  # where not every answer stops
SPREAD = ("rank_enc", "uniformity_enc")  # where a regulariser is to keep embeddings apart
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % for 2 to 10 seeds


@dataclass
class CompareOptions:
    runs: list[str] = opt((), "run folders, or folders with the eval.json of one")
    against: str = opt("", "one of the runs; its variant is the baseline of all others")
    narrow: bool = opt(False, "the most important columns only")
    latex: bool = opt(False, "the table for a paper (booktabs): seeds, intervals and versions in its caption")
    json: str = opt("", "write all numbers to this file")


@dataclass
class Variant:
    settings: dict
    seeds: dict[int, dict]  # seed -> what eval.json holds
    name: str = ""

    def is_plain(self) -> bool:
        config = next(iter(self.seeds.values()))["config"] | self.settings
        return [*train.weights_of_terms(SimpleNamespace(**config))] == ["ntp"]


def read_result(folder: str | Path) -> dict:
    """What eval.json holds, with all of today's settings. BadInput if it is damaged."""
    path, result = Path(folder) / "eval.json", read_score(folder)
    try:
        config, numbers = result["config"], [result["trained"][name] for name in COST]
        if not (type(config["seed"]) is int and {"files", "init", "test", "dtype"} <= result.keys()
                and all(type(x) in (int, float) and not abs(x) > 1e99 for x in numbers)):
            raise ValueError
        config = fill(train.Config, config, train.FORMER)
        train.weights_of_terms(SimpleNamespace(**config))  # is_plain will ask for them
        return result | {"config": config}
    except (LookupError, TypeError, ValueError, AttributeError):
        raise BadInput(f"{path}: damaged, or not written by this program's train.py") from None


def settings_of(result: dict) -> dict:
    """What makes the variant: all settings with an effect, but the seed and what changes no result. A base
    model counts by its files; if it is a run, by the name of that run."""
    config = train.FORMER | result["config"]
    if config.pop("objective") == "stp":  # this and the next two: of older runs
        config |= {"lam": 0.0, "stp": config["lam"]}
    if config.pop("stop_gradient"):
        config["target"] = "stopgrad"
    if config.pop("match_flops"):  # it names a run, which has a seed of its own
        config["max_flops"] = "matched"
    left_out = {"seed", *with_identity(train.Config, "nothing"), *with_identity(train.Config, "content")}
    as_config = SimpleNamespace(**config)
    left_out |= {f.name for f in fields(train.Config) if idle(f, as_config)}
    config |= {"dtype": result["dtype"]}
    settings = {name: config[name] for name in ("lam", *sorted(config)) if name not in left_out}
    return settings | {"init_from": str(result.get("init_run") or result["init"])}


def variants_of(results: dict[str, dict]) -> list[Variant]:
    """The plain ones first. BadInput if the runs saw different data, or if two are the same."""
    def data(r: dict) -> tuple:
        return (r["test"], r["n"], sorted(r.get("items", {})), r["files"], r["config"]["n_train"],
                r["config"]["eval_split"])

    variants, first = {}, next(iter(results))
    for folder, result in results.items():
        if data(result) != data(results[first]):
            raise BadInput(f"{folder} and {first}: trained or scored on different data; compare them apart")
        settings, seed = settings_of(result), result["config"]["seed"]
        variant = variants.setdefault(json.dumps(settings, sort_keys=True), Variant(settings, {}))
        if seed in variant.seeds:
            raise BadInput(f"{folder}: seed {seed} of these settings is there twice")
        variant.seeds[seed] = result
    for variant in variants.values():
        variant.name = name_among(list(variants.values()), variant)
    names = [variant.name for variant in variants.values()]
    for variant in variants.values():
        if names.count(variant.name) > 1:  # base models in folders of one name
            digest = hashlib.sha256(variant.settings["init_from"].encode()).hexdigest()
            variant.name += f" ({digest[:6]})"
    return sorted(variants.values(), key=lambda variant: not variant.is_plain())


def name_among(variants: list[Variant], variant: Variant) -> str:
    """The settings that differ. Those that more than two thirds of the variants share are omitted, unless
    nothing else is left. A variant in which a setting has no effect shares its default only."""
    default, share = {f.name: f.default for f in fields(train.Config)}, {}
    for name, value in variant.settings.items():
        held = [other.settings[name] for other in variants if name in other.settings]
        share[name] = held.count(value) / (len(held) if value == default.get(name) else len(variants))
    differing = [name for name in share if share[name] < 1]
    rare = [name for name in differing if share[name] <= 2 / 3]
    values = variant.settings | {"init_from": next(iter(variant.seeds.values()))["config"]["init_from"]}
    return ", ".join(f"{name} {values[name]}" for name in rare or differing) or "all"


def baseline_of(variant: Variant, variants: list[Variant]) -> Variant | None:
    """The plain variant that shares all settings but those of the objective. If there is none and one of the
    two has a FLOP budget, the length of training may differ, too. None if several would do."""
    def plain(ignored: set[str]) -> list[Variant]:
        return [v for v in variants if v.is_plain() and all(
            v.settings.get(name, x) == x for name, x in variant.settings.items() if name not in ignored)]

    objective = {*in_group(train.Config, "objective"), *train.FORMER}
    found = plain(objective) or [v for v in plain(objective | {"max_flops"})
                                 if v.settings["max_flops"] or variant.settings["max_flops"]]
    return found[0] if len(found) == 1 and not variant.is_plain() else None


def paired_interval(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of a - b; a, b (S, N): verdicts of the same S seeds on the same N items. With
    S = 1 the interval knows nothing of other seeds.

    Two errors add up: that of the seeds, from the spread of their S means, with Student's quantile; and that
    of the items, from the spread of their N means, less the noise of single verdicts, which is in the first
    error already. tests/test_compare.py counts how often the interval holds the truth (95 %).
    """
    difference = a.astype(float) - b
    S, N = difference.shape
    if N == 1:
        return float(difference.mean()), -1.0, 1.0
    mean, of_seeds, of_items = difference.mean(), difference.mean(1), difference.mean(0)
    if S == 1:
        seeds, items = 0.0, of_items.var(ddof=1) / N
    else:
        noise = (difference - of_items - of_seeds[:, None] + mean).var() * S * N / ((S - 1) * (N - 1))
        seeds, items = of_seeds.var(ddof=1) / S, max(0.0, of_items.var(ddof=1) - noise / S) / N
    student = STUDENT[S - 2] if S - 2 < len(STUDENT) else 1.96 + 2.6 / (S - 1)
    half = math.sqrt(student**2 * seeds + 1.96**2 * items)
    return float(mean), float(mean - half), float(mean + half)


def subtract(ours: Variant, theirs: Variant) -> dict[str, dict]:
    """For each kind of verdict, ours minus theirs on the seeds that both have."""
    common, found = [seed for seed in ours.seeds if seed in theirs.seeds], {}
    for column in ours.seeds[common[0]].get("items", {}) if common else ():
        a, b = (np.stack([from_hex(v.seeds[seed]["items"][column], v.seeds[seed]["n"]) for seed in common])
                for v in (ours, theirs))
        mean, low, high = paired_interval(a, b)
        found[column] = {"mean": mean, "low": low, "high": high, "identical": bool((a == b).all()),
                         "seeds": common}
    return found


def mean_and_std(values: list[float]) -> list[float]:
    """Of one value, the mean alone."""
    return [float(np.mean(values)), *([float(np.std(values, ddof=1))] if len(values) > 1 else [])]


def compare(results: dict[str, dict], against: str = "") -> list[dict]:
    """A row per variant. results: folder -> what `read_result` returns; against: the folder whose variant is
    the baseline of all others."""
    if against and against not in results:
        raise BadInput(f"--against {against}: not one of the runs")
    variants, rows = variants_of(results), []
    chosen = next((v for v in variants if against and results[against] in v.seeds.values()), None)
    for variant in variants:
        runs, baseline = list(variant.seeds.values()), chosen or baseline_of(variant, variants)
        baseline = None if baseline is variant else baseline
        columns = {c: [run[c] for run in runs if run.get(c) is not None] for c in SHOWN}
        rows.append({"variant": variant.name, "settings": variant.settings, "seeds": list(variant.seeds),
                     "columns": {c: mean_and_std(values) for c, values in columns.items() if values},
                     **{c: mean_and_std([run["trained"][c] for run in runs])[0] for c in COST},
                     "against": baseline and baseline.name,
                     "minus": subtract(variant, baseline) if baseline else {}})
    return rows


def difference(row: dict, column: str) -> str:
    """In points, with its interval."""
    if column not in row["minus"]:
        return "-"
    d = row["minus"][column]
    of = f" ({len(d['seeds'])} seeds)" if len(d["seeds"]) < len(row["seeds"]) else ""
    interval = f"{100 * d['mean']:+.2f} [{100 * d['low']:+.2f}, {100 * d['high']:+.2f}]"
    return ("identical" if d["identical"] else interval) + of


def latex(caption: str, lines: list[list[str]], results: dict[str, dict]) -> str:
    """The same as LaTeX. The caption also says which seeds, what the intervals are of, and with what the runs
    were made."""
    def every(get) -> str:
        return ", ".join(sorted({str(get(run)) for run in results.values()}))

    def escape(text: str) -> str:
        text = re.sub(r"[&%$#_{}]", r"\\\g<0>", text.replace("\\", "/"))
        return text.replace("±", r"$\pm$").replace("~", r"\textasciitilde{}").replace("^", r"\^{}")

    seeds = [*dict.fromkeys(str(run["config"]["seed"]) for run in results.values())]
    others = "seeds and items" if len(seeds) > 1 else "items"
    caption += (f". Mean ± standard deviation over seeds {', '.join(seeds)}; differences on the same seeds "
                f"and items, with 95 % intervals for other {others}. LLM-JEPA from scratch at commit "
                f"{every(lambda run: str(run.get('git_commit'))[:7])}, PyTorch "
                f"{every(lambda run: (run.get('versions') or {}).get('torch'))}, "
                f"{every(lambda run: run.get('device'))}, "
                f"{every(lambda run: run['dtype'])}.")
    head, *rows = (" & ".join(map(escape, line)) + r" \\" for line in lines)
    return "\n".join([r"\begin{table}", rf"\caption{{{escape(caption)}}}",
                      rf"\begin{{tabular}}{{l{'r' * (len(lines[0]) - 1)}}}", r"\toprule", head, r"\midrule",
                      *rows, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def comparison(results: dict[str, dict], against: str = "", narrow: bool = False,
               for_paper: bool = False) -> str:
    """A line that says what is compared, and a table of `compare`, in Markdown or, for_paper, in LaTeX."""
    rows, (first, *_) = compare(results, against), results.values()
    caption = f"{first['config']['dataset']}, {first['config']['eval_split']}, {first['n']:,} items"
    caption += f"; baseline: the variant of {against}" if against else ""
    if any(len(d["seeds"]) == 1 for row in rows for d in row["minus"].values()):
        caption += "; one seed: the interval is for other items alone"
    columns, judged = COLUMNS, ("exact", "prefix", "dfa_equal", "correct")
    if narrow:
        means = [{c: x[0] for c, x in row["columns"].items()} for row in rows]
        goes_on = any("p_end" in x and x.get("stopped", 1) < 0.9 for x in means)
        regularised = any(row["settings"]["reg_weight"] for row in rows)
        columns = ("exact", *(STOPPING if goes_on else ()), *NARROW, *(SPREAD if regularised else ()))
        judged = ("exact", "prefix", "correct") if goes_on else ("exact", "correct")
    columns = [c for c in columns if any(c in row["columns"] for row in rows)]
    minus = [c for c in judged if any(c in row["minus"] for row in rows)]
    lines = [["variant", "seeds", *columns, *(f"{c} - {'baseline' if against else 'plain'}" for c in minus)]]
    for row in rows:
        means = (" ± ".join(shown(c, x) for x in row["columns"].get(c, ())) or "-" for c in columns)
        lines.append([row["variant"], str(len(row["seeds"])), *means, *(difference(row, c) for c in minus)])
        if not narrow:
            lines[-1] += [f"{row['examples']:,.0f}", f"{row['flops'] / 1e15:.3g}"]
    lines[0] += [] if narrow else ["examples", "PFLOP"]
    return latex(caption, lines, results) if for_paper else f"{printable(caption)}\n\n{markdown(lines)}"


def main() -> None:
    o = parse_options(CompareOptions, description=__doc__, positional=("runs",))
    results = {str(Path(folder)): read_result(folder) for folder in o.runs}
    against = o.against and str(Path(o.against))
    print(comparison(results, against, o.narrow, o.latex))
    if o.json:
        write_text(o.json, json.dumps(compare(results, against), indent=2) + "\n")


if __name__ == "__main__":
    with main_guard():
        main()
