"""What the embeddings of a trained model look like: numbers, and pictures of them.

    python eval.py RUN RUN ... --embeddings              a row per run; writes RUN/embeddings.json
    python eval.py RUN RUN ... --embeddings --plot DIR   draws learning curves, t-SNE and singular values

Enc(Text) and Enc(Code) are what jepa_loss.three_pass takes, Pred(Enc(Text)) what it compares with Enc(Code).
The paper's two pictures are t-SNE of both views, and the singular values of Enc(Text) - Enc(Code), which fall
off fast where the map from one to the other is simple. But so they do where all embeddings are the same:
look at the rank and at the control, the same with strangers for pairs.
"""
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from batches import collate_three
from data import render_views
from support.files import BadInput, atomic
from jepa_loss import collapse_report, pick, rank_me
from model import Transformer
from experiments.compare import arms_of, read_result
from support.tokenizer import Tokenizer
from tasks.datasets import Example


@torch.inference_mode()
def embed_pairs(model: Transformer, tokenizer: Tokenizer, examples: list[Example], chunk: int = 64,
                **view_options) -> tuple[Tensor, Tensor]:
    """pred and enc of every example, each (N, C), on the CPU, from the passes of jepa_loss.three_pass."""
    views = [render_views(example, tokenizer, **view_options) for example in examples]
    pred, enc = [], []
    for start in range(0, len(views), chunk):
        part = views[start:start + chunk]
        batch = collate_three(part, [True] * len(part)).to(model.device)
        pred.append(pick(model(batch.pred_ids), batch.pred_at))
        enc.append(pick(model(batch.enc_ids), batch.enc_at))
    return torch.cat(pred).cpu(), torch.cat(enc).cpu()


def targets(examples: list[Example], reverse: bool) -> list[str]:
    """What the code view of each example says: an identical one counts as found."""
    return [e.text_view or e.text if reverse else e.code_view or e.code for e in examples]


def linear_map_error(x: Tensor, y: Tensor) -> float:
    """How much of y is no linear function of x: a least-squares map with a constant is fitted to one half of
    the pairs; on the other half, its squared error to that of the first half's mean (1: x says nothing that
    is linear; it can be more: C + 1 unknowns are fitted to noise). The mean of both ways. x, y (N, C) with
    N > 2 C + 2."""
    x, y = torch.cat([x, torch.ones_like(x[:, :1])], dim=1).double(), y.double()
    half, errors = len(x) // 2, []
    for fit, test in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        fitted = torch.linalg.lstsq(x[fit], y[fit], driver="gelsd").solution
        error = (x[test] @ fitted - y[test]).square().sum()
        errors.append(error / (y[fit].mean(0) - y[test]).square().sum())
    return float(sum(errors) / 2)


def analyse(text: Tensor, pred: Tensor, enc: Tensor, codes: list[str]) -> dict:
    """collapse_report of pred and enc, as they are and, `_centred`, less their means; the spread of text and
    enc (root mean square distance from the mean); of Enc(Text) - Enc(Code) all singular values and the
    rank; of the linear map from Enc(Text) to Enc(Code) the error, and with strangers for pairs, unless the
    pairs are too few to fit one. All (N, C)."""
    enough = len(text) > 2 * text.shape[1] + 2
    centred = collapse_report(pred - pred.mean(0), enc - enc.mean(0), codes)
    return collapse_report(pred, enc, codes) | {f"{name}_centred": x for name, x in centred.items()} | {
        "rank_text": rank_me(text),
        **{f"spread_{name}": float((x - x.mean(0)).square().sum(1).mean().sqrt())
           for name, x in (("text", text), ("enc", enc))},
        "rank_difference": rank_me(text - enc),
        "linear_error": linear_map_error(text, enc) if enough else None,
        "linear_error_shuffled": linear_map_error(text, enc.roll(-1, 0)) if enough else None,
        "singular_values": torch.linalg.svdvals((text - enc).double()).tolist()}


# ---- pictures ----------------------------------------------------------------------------------------------

def curves(folder: str | Path) -> dict[str, np.ndarray]:
    """name -> (n, 2) epochs and values: the logged losses; exact and cosines of the looks at 200 items after
    an epoch, and at the end those of eval.json."""
    points, row = {}, {}
    for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        wanted = ("exact", "cos_paired", "cos_shuffled") if "look" in row else ("ntp", "jepa")
        for name, value in row.get("look", row).items():
            if name in wanted:
                points.setdefault(name, []).append((row["epoch"], value))
    for name, value in read_result(folder).items():
        if name in ("exact", "cos_paired", "cos_shuffled"):
            points.setdefault(name, []).append((row["epoch"], value))
    return {name: np.array(values) for name, values in points.items()}


def save(figure, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")


def plotting() -> tuple:
    """What pictures need; BadInput if it is not installed."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise BadInput(f"--plot needs {error.name}: pip install -r requirements-plot.txt") from None
    return plt, TSNE


def plot(folders: list[str], embedded: dict[str, tuple[Tensor, Tensor]], singular: dict[str, list[float]],
         out: str | Path) -> list[Path]:
    """learning_curves.png, tsne.png and singular_values.png in the folder `out`: a line or a panel per arm of
    the runs (see report.py), a band from the lowest to the highest seed.

    embedded: Enc(Text) and Enc(Code) of each run, (N, C); singular: of their difference.
    """
    plt, TSNE = plotting()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    results = {folder: read_result(folder) for folder in folders}
    arms = {arm["name"]: [folder for folder in folders if results[folder] in arm["seeds"].values()]
            for arm in arms_of(results)}
    styles = {name: {"linestyle": ("-", "--", ":", "-.")[i % 4], "color": f"C{i}"}  # told apart in print, too
              for i, name in enumerate(arms)}

    panels = ("ntp", "jepa", "exact", "cos_paired", "cos_shuffled")
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2))
    for axis, panel in zip(axes, panels, strict=True):
        for name, members in arms.items():
            lines = [curve[panel] for curve in map(curves, members) if panel in curve]
            if not lines or panel == "jepa" and not max(line[:, 1].max() for line in lines):
                continue
            n = min(map(len, lines))  # with --match_flops a seed may need a step more
            epochs, values = lines[0][:n, 0], np.stack([line[:n, 1] for line in lines])
            axis.plot(epochs, values.mean(0), **styles[name], label=f"{name} ({len(lines)} seeds)")
            axis.fill_between(epochs, values.min(0), values.max(0), color=styles[name]["color"], alpha=0.2)
        axis.set(title=panel, xlabel="epoch", yscale="log" if panel in ("ntp", "jepa") else "linear")
        axis.legend(fontsize="x-small")
    save(figure, out / "learning_curves.png")

    figure, axes = plt.subplots(1, len(arms), figsize=(4.2 * len(arms), 4), squeeze=False)
    for axis, (name, members) in zip(axes[0], arms.items(), strict=True):
        text, enc = (view[:300].cpu() for view in embedded[members[0]])
        flat = TSNE(random_state=0, init="pca").fit_transform(torch.cat([text, enc]).numpy())
        for view, marker, label in zip(np.split(flat, 2), "ox", ("Enc(Text)", "Enc(Code)"), strict=True):
            axis.scatter(*view.T, s=9, marker=marker, linewidths=0.7, label=label)
        axis.set(title=name, xticks=[], yticks=[])
    axes[0, 0].legend()
    save(figure, out / "tsne.png")

    figure, axis = plt.subplots(figsize=(5, 3.6))
    for name, members in arms.items():
        values = np.stack([singular[member] for member in members])
        axis.plot(range(1, values.shape[1] + 1), values.mean(0), **styles[name], label=name)
        axis.fill_between(range(1, values.shape[1] + 1), values.min(0), values.max(0),
                          color=styles[name]["color"], alpha=0.2)
    axis.set(title="Enc(Text) - Enc(Code)", xlabel="number", ylabel="singular value", yscale="log")
    axis.legend(fontsize="x-small")
    save(figure, out / "singular_values.png")
    plt.close("all")
    return [out / name for name in ("learning_curves.png", "tsne.png", "singular_values.png")]
