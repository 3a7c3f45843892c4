"""Pictures of finished runs: a line or a panel per variant (see compare.py), a band from the lowest to the
highest seed.

    python -m experiments.plots RUN RUN ... --out DIR

    learning_curves.png    terms of the loss; exact match and cosines of 200 items after each epoch, of all at
                           the end
    tsne.png               Enc(Text) and Enc(Code) of each variant's first seed
    singular_values.png    of Enc(Text) - Enc(Code). They fall off fast where the map from one to the other is
                           simple, but also where all embeddings are the same
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from eval import EvalOptions, embed_run
from experiments.compare import read_result, variants_of
from support.distributed import DEVICES
from support.files import BadInput, atomic, main_guard
from support.runs import read_metrics
from support.settings import opt, parse_options

TERMS, SCORES = ("ntp", "jepa", "stp", "reg"), ("exact", "cos_paired", "cos_shuffled")


@dataclass
class PlotOptions:
    runs: list[str] = opt((), "finished run folders")
    out: str = opt("pictures", "folder to write to")
    data_dir: str = opt("", "where the published files are (default: the run's)")
    device: Literal[DEVICES] = opt("auto", "auto: cuda, then mps, then cpu")


def plotting() -> tuple:
    """matplotlib.pyplot and TSNE; BadInput if they are not installed."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise BadInput(f"pictures need {error.name}: pip install -r requirements-lesson.txt") from None
    return plt, TSNE


def curves(folder: str) -> dict[str, np.ndarray]:
    """name -> (n, 2) epochs and values. Older runs log 0 for a term that they do without: it is left out."""
    path, points = Path(folder) / "metrics.jsonl", {name: [] for name in TERMS + SCORES}
    rows = list(read_metrics(path))
    for row in [*rows, {"epoch": rows[-1]["epoch"], "look": read_result(folder)}]:
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
        axis.plot(x, y.mean(0), style, color=f"C{number}", label=f"{label} ({len(lines)} seeds)")
        axis.fill_between(x, y.min(0), y.max(0), color=f"C{number}", alpha=0.2)
        axis.legend(fontsize="x-small")


def save(figure, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")


def draw(folders: list[str], out: Path, o: EvalOptions) -> None:
    """The three pictures."""
    plt, TSNE = plotting()
    results, views, spectra = {folder: read_result(folder) for folder in folders}, {}, {}
    variants = [(v.name, [folder for folder in folders if results[folder] in v.seeds.values()])
                for v in variants_of(results)]
    for folder in folders:
        text, _, enc, _ = embed_run(folder, o)
        views[folder] = torch.cat([text[:300], enc[:300]])
        values = torch.linalg.svdvals((text - enc).double())
        spectra[folder] = np.stack([np.arange(1, len(values) + 1), values.numpy()], axis=1)
    out.mkdir(parents=True, exist_ok=True)

    found = {folder: curves(folder) for folder in folders}
    panels = [name for name in TERMS + SCORES if any(name in lines for lines in found.values())]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for number, (name, members) in enumerate(variants):
            line_and_band(axis, [found[run][panel] for run in members if panel in found[run]], name, number)
        axis.set(title=panel, xlabel="epoch", yscale="log" if panel in TERMS else "linear")
    save(figure, out / "learning_curves.png")

    figure, axes = plt.subplots(1, len(variants), figsize=(4.2 * len(variants), 4), squeeze=False)
    for axis, (name, members) in zip(axes[0], variants, strict=True):
        both = views[members[0]].numpy()
        flat = TSNE(random_state=0, init="pca", perplexity=min(30, len(both) // 3)).fit_transform(both)
        for view, marker, label in zip(np.split(flat, 2), "ox", ("Enc(Text)", "Enc(Code)"), strict=True):
            axis.scatter(*view.T, s=9, marker=marker, linewidths=0.7, label=label)
        axis.set(title=name, xticks=[], yticks=[])
    axes[0, 0].legend()
    save(figure, out / "tsne.png")

    figure, axis = plt.subplots(figsize=(5, 3.6))
    for number, (name, members) in enumerate(variants):
        line_and_band(axis, [spectra[run] for run in members], name, number)
    axis.set(title="Enc(Text) - Enc(Code)", xlabel="number", ylabel="singular value", yscale="log")
    save(figure, out / "singular_values.png")
    plt.close("all")


def main() -> None:
    o = parse_options(PlotOptions, description=__doc__, positional=("runs",))
    draw(o.runs, Path(o.out), EvalOptions(data_dir=o.data_dir, device=o.device))
    print(f"learning_curves.png, tsne.png and singular_values.png are in {o.out}")


if __name__ == "__main__":
    with main_guard():
        main()
