"""How many NL-RX-SYNTH texts can anyone get right? Not a pytest file: ten minutes on one core.

    python tests/check_ceiling.py DIR_OF_THE_PUBLISHED_FILES [MINUTES]

Many texts can be read in several ways ("lines ending with the string 'dog' or a number": ending with
either, or one of two things?), and the corpus keeps the reading that happened to be drawn first. So the
best possible guess is the reading that the grammar draws most often, and it is right as often as that
reading is drawn. Trees of depth 2 are all listed; deeper ones are drawn for a while, and for each text of
the published train split the share of its most frequent reading is estimated twice: the reading chosen on
one half of its draws and its share counted on the other (too low, since half the draws may choose wrongly),
and both on all draws (too high). Texts drawn fewer than ten times count as the others of their depth.
"""
import contextlib
import random
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tasks.datasets import load_dataset  # noqa: E402
from tasks.nlrx import Rejected, draw, every, read  # noqa: E402


def listed_readings() -> dict[str, dict[str, float]]:
    """text -> {code: probability} of all trees of depth 2."""
    readings: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for tree, probability in every(lambda pick: draw(pick, max_depth=2, max_nodes=5)):
        text, code = read(tree)
        readings[text][code] += probability
    return readings


def drawn_readings(texts: set[str], seconds: float) -> dict[str, list[str]]:
    """text -> the codes it was drawn with, in order, for those of the texts that came up."""
    rng, end, drawn = random.Random(0), time.monotonic() + seconds, defaultdict(list)
    while time.monotonic() < end:
        with contextlib.suppress(Rejected):
            text, code = read(draw(lambda options: options[int(rng.random() * len(options))], 3, 7))
            if text in texts:
                drawn[text].append(code)
    return drawn


def main(published: str, minutes: float = 10) -> None:
    texts = {e.text for e in load_dataset("nlrx_synth", published).train}
    listed = listed_readings()
    shallow = [max(listed[t].values()) / sum(listed[t].values()) for t in texts if t in listed]
    drawn = drawn_readings({t for t in texts if t not in listed}, 60 * minutes)
    low, high = [], []
    for codes in drawn.values():
        if len(codes) >= 10:
            choice, check = Counter(codes[::2]).most_common(1)[0][0], codes[1::2]
            low.append(check.count(choice) / len(check))
            high.append(Counter(codes).most_common(1)[0][1] / len(codes))
    n_deep = len(texts) - len(shallow)
    print(f"{len(shallow)} texts of depth 2: best guess right {sum(shallow) / len(shallow):.1%}")
    bounds = [sum(x) / len(x) for x in (low, high)]
    print(f"{n_deep} deeper texts ({len(low)} with ten draws or more): {bounds[0]:.1%} to {bounds[1]:.1%}")
    total = [(sum(shallow) + n_deep * bound) / len(texts) for bound in bounds]
    print(f"all: {total[0]:.1%} to {total[1]:.1%}")


if __name__ == "__main__":
    main(sys.argv[1], *map(float, sys.argv[2:]))
