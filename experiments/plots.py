"""Pictures of the committed results, and of finished runs:

    python -m experiments.plots                          from experiments/results, into its folder pictures
    python -m experiments.plots RUN RUN ... --out DIR    of runs, for which their weights are needed

From the committed files alone:

    five_questions.png     README.md's: losses, answers, cosines with their control, retrieval
    differences.png        the first table of RESULTS.md, with its intervals
    singular_values.png    of Enc(Text) - Enc(Code). They fall off fast where the map from one to the other is
                           simple, but also where all embeddings are the same
    habit.png              scores on the way, of the runs in ON_THE_WAY; overfit_turk.png, too

Of runs (RESULTS.md's tsne.png and overfitting.png, which is learning_curves.png of those runs):

    learning_curves.png    terms of the loss; scores of 200 items on the way, of all at the end
    tsne.png               Enc(Text) and Enc(Code) of each variant's first seed
    singular_values.png    as above

A line or a panel is a variant (see compare.py), a band goes from its lowest to its highest seed.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from eval import COLLAPSE_ITEMS, EvalOptions, embed_run
from experiments.compare import read_result, variants_of
from support.distributed import DEVICES
from support.files import BadInput, library, main_guard, read_json
from support.pictures import LESSON, plotting, save
from support.runs import read_metrics
from support.settings import opt, parse_options

HERE = Path(__file__).parent
ON_THE_WAY = {"habit": ("plain-*", "jepa-*"), "overfit_turk": ("*",)}  # section -> runs with a looks.jsonl
TERMS, SCORES = ("ntp", "jepa", "stp", "reg"), ("exact", "prefix", "p_end", "cos_paired", "cos_shuffled")


@dataclass
class PlotOptions:
    runs: list[str] = opt((), "finished run folders (default: the committed results)")
    out: str = opt("", "folder to write to (default: pictures, or that of the committed ones)")
    data_dir: str = opt("", "where the published files are (default: the run's)", needs="runs")
    device: Literal[DEVICES] = opt("auto", "auto: cuda, then mps, then cpu", needs="runs")


# ---- curves ------------------------------------------------------------------------------------------------

def curves(folder: str | Path) -> dict[str, np.ndarray]:
    """name -> (n, 2) epochs and values, of metrics.jsonl or looks.jsonl, and of eval.json if there is one.
    Older runs log 0 for a term that they do without: it is left out."""
    path, points = Path(folder) / "metrics.jsonl", {name: [] for name in TERMS + SCORES}
    path = path if path.exists() else path.with_name("looks.jsonl")
    rows = list(read_metrics(path))
    if not rows or not all("epoch" in row for row in rows):
        raise BadInput(f"{path}: damaged; no line, or one without its epoch")
    if path.with_name("eval.json").exists():
        result, last = read_result(folder), rows[-1]
        epoch = last["epoch"] / last["step"] * result["trained"].get("step", last["step"])
        rows.append({"epoch": epoch, "look": result})
    for row in rows:
        values = row.get("look", row)
        for name in SCORES if "look" in row else TERMS:
            points[name] += [(row["epoch"], values[name])] if name in values else []
    return {name: np.array(found) for name, found in points.items()
            if found and (name in SCORES or any(value for _, value in found))}


def line_and_band(axis, lines: list[np.ndarray], label: str, number: int) -> None:
    """Mean, lowest and highest of lines (n, 2), as far as all of them go."""
    if lines:
        n, style = min(map(len, lines)), ("-", "--", ":", "-.")[number % 4]  # told apart in print, too
        x, y = lines[0][:n, 0], np.stack([line[:n, 1] for line in lines])
        seeds = f" ({len(lines)} seeds)" if len(lines) > 1 else ""
        axis.plot(x, y.mean(0), style, color=f"C{number}", label=label + seeds)
        axis.fill_between(x, y.min(0), y.max(0), color=f"C{number}", alpha=0.2)
        axis.legend(fontsize="x-small")


def draw_curves(variants: list[tuple[str, list]], path: Path) -> None:
    """A panel for each term and score, four in a row. variants: (name, its folders)."""
    found = {folder: curves(folder) for _, folders in variants for folder in folders}
    panels = [name for name in TERMS + SCORES if any(name in lines for lines in found.values())]
    rows, columns = -(-len(panels) // 4), min(len(panels), 4)
    figure, axes = plotting().subplots(rows, columns, figsize=(4 * columns, 3.2 * rows), squeeze=False,
                                       layout="constrained")
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels, strict=False):
        for number, (name, folders) in enumerate(variants):
            line_and_band(axis, [found[run][panel] for run in folders if panel in found[run]], name, number)
        axis.set(title=panel, xlabel="epoch", yscale="log" if panel in TERMS else "linear")
    save(figure, path)


def draw_spectra(variants: list[tuple[str, list]], spectrum: Callable, path: Path) -> None:
    """Singular values of Enc(Text) - Enc(Code); spectrum: folder -> (C,)."""
    figure, axis = plotting().subplots(figsize=(5, 3.6))
    for number, (name, folders) in enumerate(variants):
        lines = [np.stack([np.arange(1, len(y) + 1), y], axis=1) for y in map(spectrum, folders)]
        line_and_band(axis, lines, name, number)
    axis.set(title="Enc(Text) - Enc(Code)", xlabel="number", ylabel="singular value", yscale="log")
    save(figure, path)


def named(folders: list) -> list[tuple[str, list]]:
    """(name, folders) of each variant."""
    results = {folder: read_result(folder) for folder in map(str, folders)}
    return [(v.name, [folder for folder in results if results[folder] in v.seeds.values()])
            for v in variants_of(results)]


# ---- of runs -----------------------------------------------------------------------------------------------

def tsne(views: np.ndarray) -> np.ndarray:
    """(N, C) -> (N, 2)."""
    from sklearn.manifold import TSNE
    return TSNE(random_state=0, init="pca", perplexity=min(30, len(views) // 3)).fit_transform(views)


def draw_views(axis, a: np.ndarray, b: np.ndarray, labels: tuple[str, str]) -> None:
    """t-SNE of two views, each (N, C), with a line between those of ten pairs."""
    flat = np.split(tsne(np.concatenate([a, b])), 2)  # (N, 2) each
    for view, marker, label in zip(flat, "ox", labels, strict=True):
        axis.scatter(*view.T, s=9, marker=marker, linewidths=0.7, label=label)
    for pair in zip(*(view[:10] for view in flat), strict=True):
        axis.plot(*zip(*pair, strict=True), color="grey", linewidth=0.5)
    axis.set(xticks=[], yticks=[])


def draw_runs(folders: list[str], out: Path, o: EvalOptions) -> list[str]:
    """The three pictures of runs; returns their names."""
    plt, _ = plotting(), library("sklearn", "a picture", LESSON)
    variants = named(folders)
    views = {folder: embed_run(folder, o) for folder in folders}
    out.mkdir(parents=True, exist_ok=True)
    draw_curves(variants, out / "learning_curves.png")
    draw_spectra(variants, lambda run: torch.linalg.svdvals((views[run][0] - views[run][2]).double()).numpy(),
                 out / "singular_values.png")
    figure, axes = plt.subplots(1, len(variants), figsize=(4.2 * len(variants), 4), squeeze=False)
    for axis, (name, members) in zip(axes[0], variants, strict=True):
        text, _, enc, _ = views[members[0]]
        draw_views(axis, text[:300].numpy(), enc[:300].numpy(), ("Enc(Text)", "Enc(Code)"))
        axis.set_title(name)
    axes[0, 0].legend()
    save(figure, out / "tsne.png")
    plt.close("all")
    return ["learning_curves.png", "singular_values.png", "tsne.png"]


# ---- of the committed results ------------------------------------------------------------------------------

def answers() -> list[tuple[str, str, float, float, float]]:
    """(question, variant, mean, low, high) of each row with an interval in RESULTS.md's first table, which
    tests/test_results.py holds against what compare prints."""
    first, rows, question = (HERE / "RESULTS.md").read_text(encoding="utf-8").split("\n## ")[0], [], ""
    for line in re.findall(r"^\| (.*) \|$", first, re.MULTILINE):
        asked, variant, _, difference, _ = (cell.strip() for cell in line.split("|"))
        question = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", asked) or question
        if interval := re.fullmatch(r"(\S+) \[(\S+), (\S+)\]", difference):
            rows.append((question, variant, *map(float, interval.groups())))
    return rows


def forest(axis, rows: list[tuple[str, float, float, float]]) -> None:
    """(label, mean, low, high), from top to bottom; a filled point where the interval excludes 0."""
    for at, (_, mean, low, high) in enumerate(rows):
        axis.plot([low, high], [at, at], color="C0")
        axis.plot(mean, at, "o", color="C0", markerfacecolor="C0" if low > 0 or high < 0 else "white")
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axis.set_xscale("symlog", linthresh=5)  # most differences are of a point or two, some of fifty
    ticks = (-50, -20, -5, -2, 0, 2, 5, 20)
    axis.set_xticks(ticks, map(str, ticks))
    axis.set(xlabel="difference in exact match, points (95 %);\nbeyond 5 logarithmic",
             ylim=(len(rows) - 0.5, -0.5))


def dots(axis, groups: dict[str, list[dict]], columns: dict[str, tuple[str, str]], scale: float = 1) -> None:
    """A mark for each run. groups: name -> eval.json of its runs; columns: name -> (marker, label)."""
    for column, (marker, label) in columns.items():
        points = [(at, scale * run[column]) for at, runs in enumerate(groups.values()) for run in runs]
        axis.plot(*zip(*points, strict=True), marker, markersize=7, fillstyle="none", label=label)
    axis.set_xticks(range(len(groups)), [*groups])
    axis.set_xlim(-0.5, len(groups) - 0.5)
    axis.legend(fontsize="x-small", loc="center left")


def draw_five_questions(path: Path) -> None:
    """Losses of the default run; exact match of plain training and LLM-JEPA, and its difference; cosines and
    retrieval, where InfoNCE stands beside them, whose embeddings stay apart."""
    def read(pattern: str) -> list[dict]:
        return [read_result(folder) for folder in sorted((HERE / "results").glob(pattern))]

    figure, (losses, exact, minus, cosines, found) = plotting().subplots(1, 5, figsize=(18, 3.1),
                                                                         layout="constrained")
    lines = curves(HERE / "results" / "default_run")
    for number, (term, label) in enumerate((("ntp", "next-token loss"), ("jepa", "JEPA loss, 1 - cosine"))):
        line_and_band(losses, [lines[term]], label, number)
    losses.set(title="Do the losses fall?", xlabel="epoch of the default run", yscale="log")

    corpora = {"SYNTH": ("stopping/plain-train_eos-*", "stopping/jepa-train_eos-*"),
               "TURK": ("turk/plain-*", "turk/jepa-*")}
    groups = {f"{corpus}\n{name}": read(pattern) for corpus, patterns in corpora.items()
              for name, pattern in zip(("plain", "LLM-JEPA"), patterns, strict=True)}
    dots(exact, groups, {"exact": ("o", "a seed")}, scale=100)
    exact.set(title="Are the answers right?", ylabel="exact match, %", ylim=(0, 100))
    forest(minus, [(question.partition(":")[0], *interval) for question, variant, *interval in answers()
                   if variant == "lam 1, k 1 - plain"])
    minus.set_title("Are they more often right than plain?")

    groups = {"plain": read(corpora["SYNTH"][0]), "LLM-JEPA": read(corpora["SYNTH"][1]),
              "InfoNCE,\nlam 0.1": read("search_synth/infonce0.1")}
    dots(cosines, groups, {"cos_paired": ("o", "pairs"), "cos_shuffled": ("x", "mismatched pairs")})
    cosines.set(title="Are pairs close because they are pairs?", ylabel="cosine", ylim=(-0.2, 1.1))
    dots(found, groups, {"retrieval_at_1": ("o", "a seed")}, scale=100)
    found.axhline(100 / COLLAPSE_ITEMS, color="grey", linewidth=0.8, linestyle="--", label="chance")
    found.legend(fontsize="x-small", loc="center left")
    found.set(title="Does a Text find its Code?", ylabel=f"% of {COLLAPSE_ITEMS}", ylim=(-5, 105))
    save(figure, path)


def draw_committed(out: Path) -> list[str]:
    """What the committed files suffice for; returns the pictures' names."""
    plt, results, names = plotting(), HERE / "results", ["five_questions", "differences", "singular_values"]
    out.mkdir(parents=True, exist_ok=True)
    draw_five_questions(out / "five_questions.png")
    rows = [(f"{question.partition(':')[0]}: {variant}".replace("*", ""), *interval)
            for question, variant, *interval in answers()]
    figure, axis = plt.subplots(figsize=(6, 0.8 + 0.28 * len(rows)))
    forest(axis, rows)
    save(figure, out / "differences.png")
    embedded = [path.parent for path in sorted(results.glob("stopping/*/embeddings.json"))]
    draw_spectra(named(embedded), lambda run: read_json(Path(run, "embeddings.json"))["singular_values"],
                 out / "singular_values.png")
    for section, patterns in ON_THE_WAY.items():
        draw_curves(named([run for pattern in patterns for run in sorted((results / section).glob(pattern))]),
                    out / f"{section}.png")
        names.append(section)
    plt.close("all")
    return [f"{name}.png" for name in names]


def main() -> None:
    o = parse_options(PlotOptions, description=__doc__, positional=("runs",))
    out = Path(o.out or ("pictures" if o.runs else HERE / "results" / "pictures"))
    if o.runs:
        names = draw_runs(o.runs, out, EvalOptions(data_dir=o.data_dir, device=o.device))
    else:
        names = draw_committed(out)
    print(f"{', '.join(names)}: in {out}")


if __name__ == "__main__":
    with main_guard():
        main()
