"""Pictures: matplotlib, an optional extra, imported when one is drawn; a row of segments, and the tokens that
each of its tokens sees. Letters: T tokens."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from support.files import atomic, library

LESSON = "requirements-lesson.txt"
COLOURS = ("#4878d0", "#ee854a", "#6acc64", "#d65f5f", "#956cb4", "#8c613c")  # of segments, in turn


def plotting():
    """matplotlib.pyplot, for files and not for windows; BadInput if it is not installed."""
    library("matplotlib", "a picture", LESSON).use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save(figure, path: str | Path, dpi: int = 150) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, bbox_inches="tight")


def colour(segment: int) -> str:
    return COLOURS[segment % len(COLOURS)]


def draw_mask(axis, names: Sequence[str], segment: Sequence[int], mask) -> None:
    """What each token (a line) sees: a square in the colour of the segment that is seen. mask (T, T) boolean,
    names and segment (T,)."""
    from matplotlib.colors import to_rgb
    of_keys = np.array([to_rgb(colour(s)) for s in segment])  # (T, 3)
    axis.imshow(np.where(np.asarray(mask)[..., None], of_keys, 1.0))
    ticks, style = range(len(names)), {"fontsize": 7, "family": "monospace", "parse_math": False}
    axis.set_xticks(ticks, names, rotation=90, **style)
    axis.set_yticks(ticks, names, **style)
    for at, s in enumerate(segment):
        axis.get_xticklabels()[at].set_color(colour(s))
        axis.get_yticklabels()[at].set_color(colour(s))
    axis.set_xticks(np.arange(-0.5, len(names)), minor=True)
    axis.set_yticks(np.arange(-0.5, len(names)), minor=True)
    axis.grid(which="minor", color="#e8e8e8", linewidth=0.5)
    axis.tick_params(length=0, which="both")


def draw_tree(axis, segment: Sequence[int], parent: Sequence[int]) -> None:
    """The segments, (T,) numbers from 0, as bars over their tokens: a child stands below its parent, with an
    arrow from it."""
    depth, ends = {}, {}  # of each segment; its last token
    for at, (s, above) in enumerate(zip(segment, parent, strict=True)):
        if s not in depth:
            depth[s] = 0 if above == s else depth[above] + 1
            if above != s:
                axis.annotate("", (at, -depth[s]), (ends[above], -depth[above]),
                              arrowprops={"arrowstyle": "->", "color": "grey", "shrinkA": 0, "shrinkB": 0})
        axis.bar(at, 0.5, width=1, bottom=-depth[s] - 0.25, color=colour(s))
        ends[s] = at
    for s, end in ends.items():
        middle = end - (list(segment).count(s) - 1) / 2
        axis.text(middle, -depth[s], s, color="white", fontsize=8, ha="center", va="center")
    axis.set(xlim=(-0.5, len(segment) - 0.5), ylim=(-max(depth.values()) - 0.6, 0.6), yticks=[], xticks=[])
    axis.spines[:].set_visible(False)


def draw_row(path: str | Path, title: str, names: Sequence[str], segment: Sequence[int],
             parent: Sequence[int], mask) -> None:
    """A PNG of both: the tree of segments above the tokens that each token sees."""
    side = min(1.5 + 0.17 * len(names), 60)  # inches
    figure, (above, below) = plotting().subplots(2, 1, figsize=(side, side * 1.2), height_ratios=(1, 6),
                                                 layout="constrained")
    draw_tree(above, segment, parent)
    draw_mask(below, names, segment, mask)
    above.set_title(title, fontsize=8, parse_math=False)
    save(figure, path)
