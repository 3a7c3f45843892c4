"""Tables of scores; and many runs side by side, from the eval.json of each: `python eval.py RUN RUN ...`.

Runs that differ in nothing but the seed are one arm: mean and standard deviation over its seeds. An arm with
a JEPA loss is held against the arm without one (lam = 0) that shares its other settings, on the seeds that
both have: the mean difference, and a 95 % interval for other seeds and other test items (for other items
alone, where there is but one seed).
"""
import json
import math
from pathlib import Path

import numpy as np

from support.files import BadInput, read_json
from support.runs import verify

JEPA = ("lam", "view2", "objective", "k", "distance", "temperature", "stop_gradient", "passes", "alpha",
        "pred_first", "reverse", "match_flops")
LENGTH = ("epochs", "max_steps")  # without a say where --match_flops is given
# what may differ within an arm
WITHIN = ("seed", "device", "compile", "log_every", "checkpoint_every", "prefetch", "grad_checkpointing")
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % for 2 to 10 seeds
SHARES = ("exact", "prefix", "stopped", "exact_unseen", "dfa_equal", "correct")
COLLAPSE = ("cos_paired", "cos_shuffled", "retrieval_at_1", "rank_pred", "rank_enc")
COLUMNS = (*SHARES, "ntp", *COLLAPSE, *(f"{name}_centred" for name in COLLAPSE), "rank_text", "spread_text",
           "spread_enc", "rank_difference", "linear_error", "linear_error_shuffled")


def markdown(rows: list[tuple]) -> str:
    """A table of strings, the first row its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(f"{x:{w}}" for x, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def shown(column: str, value: float) -> str:
    """Shares in percent, the rest as it is."""
    if column in SHARES or column.startswith("retrieval"):
        return f"{100 * value:.2f}"
    return str(value) if column == "n" else f"{value:.2f}" if column.startswith("rank") else f"{value:.4f}"


def brief(result: dict) -> str:
    """Accuracy, next-token loss and cosines in one line."""
    parts = [f"{name} {result[name]:.1%}" for name in ("exact", "correct", "stopped") if name in result]
    if "ntp" in result:
        parts.append(f"ntp {result['ntp']:.4f}")
    if "cos_paired" in result:
        parts.append(f"cosine {result['cos_paired']:.3f} (shuffled pairs {result['cos_shuffled']:.3f})")
    return ", ".join(parts)


def table(results: dict[str, dict]) -> str:
    """Markdown: a row per model. A column that none has is left out."""
    columns = [c for c in (*COLUMNS, "n") if any(r.get(c) is not None for r in results.values())]
    return markdown([("model", *columns), *(
        (name, *("-" if r.get(c) is None else shown(c, r[c]) for c in columns))
        for name, r in results.items())])


def from_hex(text: str, n: int) -> np.ndarray:
    """(n,) verdicts, 0 or 1; see eval.to_hex."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:n]


def read_result(folder: str | Path) -> dict:
    path = Path(folder) / "eval.json"
    result = read_json(path)
    if (Path(folder) / "run.json").exists():
        verify(folder)
    try:  # can it be shown alone, and paired?
        comparison(compare({str(folder): result}))
        if any(len(from_hex(text, result["n"])) != result["n"] for text in result.get("items", {}).values()):
            raise ValueError
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise BadInput(f"{path}: not a run's, damaged, or an older version's; train it again") from None
    return result


def paired_interval(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of a - b; a, b (S, N): verdicts of the same S seeds on the same N items. With
    S = 1 the interval knows nothing of other seeds.

    Two errors add up: that of the seeds, from the spread of their S means, with Student's quantile; and that
    of the items, from the spread of their N means, less the noise of single verdicts, which is in the first
    error already. tests/test_report.py counts how often the interval holds the truth (95 %), and how often
    that of a bootstrap over seeds and items would: too rarely where few seeds differ, too often where not.
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


def settings(result: dict) -> dict:
    """What makes the arm. match_flops names a run, and so a seed: what counts is whether it is given. A base
    model is what its files are, or, if it is a run, one of any seed."""
    unsaid = WITHIN + (LENGTH if result["config"]["match_flops"] else ())
    config = {name: value for name, value in result["config"].items() if name not in unsaid}
    return config | {"match_flops": bool(config["match_flops"]), "dtype": result["dtype"],
                     "init": [] if result.get("init_run") else result["init"]}


def without(arm: dict, names: tuple[str, ...]) -> dict:
    return {name: value for name, value in arm["settings"].items() if name not in names}


def arms_of(results: dict[str, dict]) -> list[dict]:
    """One entry an arm: its settings, the results of its seeds, and its name: what sets it apart, less what
    more than two thirds of the arms share (the arm that has nothing else is named in full). BadInput if the
    runs saw different data, or if two are the same."""
    first, arms = next(iter(results)), {}
    for folder, result in results.items():
        for what, same in (
                ("test set", lambda r: (r["test"], r["n"], sorted(r.get("items", {})))),
                ("training data", lambda r: (r["files"], *(
                    r["config"].get(name) for name in ("dataset", "n_train", "eval_split"))))):
            if same(result) != same(results[first]):
                raise BadInput(f"{folder} and {first}: not the same {what}; compare them apart")
        of_arm = settings(result)
        arm = arms.setdefault(json.dumps(of_arm, sort_keys=True), {"settings": of_arm, "seeds": {}})
        seed = result["config"]["seed"]
        if seed in arm["seeds"]:
            raise BadInput(f"{folder}: seed {seed} of these settings is there twice")
        arm["seeds"][seed] = result
    for arm in arms.values():
        shares = {name: np.mean([other["settings"].get(name, value) == value for other in arms.values()])
                  for name, value in arm["settings"].items() if name != "init"}
        apart = [name for name, share in shares.items() if share < 1]
        rare = [name for name in apart if shares[name] <= 2 / 3]
        arm["name"] = ", ".join(f"{name} {arm['settings'][name]}" for name in rare or apart) or "all"
    return sorted(arms.values(), key=lambda arm: bool(arm["settings"]["lam"]))  # the baselines first


def baseline(arm: dict, arms: list[dict]) -> dict | None:
    """The arm without a JEPA loss that shares the other settings; if there is none, one of equal operations.
    Of two that --match_flops sets apart, LENGTH may differ. None, too, where several would do."""
    for matched in (False, True):
        apart = JEPA + (LENGTH if matched or arm["settings"]["match_flops"] else ())
        found = [other for other in arms if without(other, apart) == without(arm, apart)
                 and other["settings"]["match_flops"] == matched and not other["settings"]["lam"]]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def compare(results: dict[str, dict], against: str | None = None) -> list[dict]:
    """What the table shows, an entry an arm; results: what the eval.json of each folder holds; against: the
    folder whose arm all others are held against, if not each against its own baseline."""
    if against and against not in results:
        raise BadInput(f"--against {against}: not one of the runs")
    arms, rows = arms_of(results), []
    chosen = next((arm for arm in arms if against and results[against] in arm["seeds"].values()), None)
    for arm in arms:
        runs = list(arm["seeds"].values())
        row = {"arm": arm["name"], "settings": arm["settings"], "seeds": list(arm["seeds"]), "columns": {},
               "n": runs[0]["n"], "against": None, "minus": {}}
        for column in COLUMNS:
            values = [run[column] for run in runs if run.get(column) is not None]
            if values:
                std = float(np.std(values, ddof=1)) if len(values) > 1 else None
                row["columns"][column] = {"mean": float(np.mean(values)), "std": std}
        for name in ("examples", "flops", "seconds"):
            row[name] = float(np.mean([run["trained"][name] for run in runs]))
        other = chosen or (baseline(arm, arms) if arm["settings"]["lam"] else None)
        other = None if other is arm else other
        row["against"] = other and other["name"]
        common = [seed for seed in arm["seeds"] if other and seed in other["seeds"]]
        for column in runs[0].get("items", {}) if common else ():
            a, b = (np.stack([from_hex(of["seeds"][seed]["items"][column], row["n"]) for seed in common])
                    for of in (arm, other))
            mean, low, high = paired_interval(a, b)
            row["minus"][column] = {"mean": mean, "low": low, "high": high, "seeds": common}
        rows.append(row)
    return rows


def caption(results: dict[str, dict], rows: list[dict], against: str | None = None) -> str:
    """What the table of `compare` is of, in a line."""
    result = next(iter(results.values()))
    single = any(len(minus["seeds"]) == 1 for row in rows for minus in row["minus"].values())
    c = result["config"]
    return f"{c['dataset']}, {c['eval_split']}, {result['n']:,} items" + (
        f"; baseline: the arm of {against}" if against else "") + (
        "; one seed: the interval is for other items alone" if single else "")


def comparison(rows: list[dict], baseline: str = "plain") -> str:
    """Markdown: a row per arm; baseline: what to call the arm that is subtracted."""
    columns = [column for column in COLUMNS if any(column in row["columns"] for row in rows)]
    against = [column for column in ("exact", "prefix", "dfa_equal", "correct")
               if any(column in row["minus"] for row in rows)]

    def cell(row: dict, column: str) -> str:
        value = row["columns"].get(column)
        if value is None:
            return "-"
        spread = "" if value["std"] is None else f" ± {shown(column, value['std'])}"
        return shown(column, value["mean"]) + spread

    def difference(row: dict, column: str) -> str:
        d = row["minus"].get(column)
        if d is None:
            return "-"
        fewer = f" ({len(d['seeds'])} seeds)" if len(d["seeds"]) < len(row["seeds"]) else ""
        return f"{100 * d['mean']:+.2f} [{100 * d['low']:+.2f}, {100 * d['high']:+.2f}]{fewer}"
    head = ("arm", "seeds", *columns, *(f"{column} - {baseline}" for column in against), "examples", "PFLOP")
    return markdown([head, *((
        row["arm"], str(len(row["seeds"])), *(cell(row, column) for column in columns),
        *(difference(row, column) for column in against), f"{row['examples']:,.0f}",
        f"{row['flops'] / 1e15:.3g}") for row in rows)])
