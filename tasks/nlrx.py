r"""NL-RX: the grammar that writes (text, code) pairs.

Mirrors the synthetic corpus of Locascio et al. 2016 (arXiv 1608.03000): one random tree, read twice, as
English (text) and as a regex (code). The dataset nlrx_synth is what was published of it; regexes.py judges
answers.

    >>> generate(1)
    [("lines with a number before the string 'dog', 5 or more times", '([0-9]).*((dog){5,}).*')]

But: the authors drew 600,000 trees of depth 2; here all such trees are listed with their probabilities, which
gives the same distribution from fewer random numbers.
"""
from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

WORDS = ("dog", "truck", "ring", "lake")  # the words of one tree, in order
WORD = "the string 'WORD'"
LITERAL_CODE = {
    "a number": "[0-9]", "a capital letter": "[A-Z]", "a lower-case letter": "[a-z]", "a letter": "[A-Za-z]",
    "a vowel": "[AEIOUaeiou]", "a character": ".", WORD: "WORD",
}  # fmt: skip
REPEATS = ("at least once", "zero or more", "n or more")
FUNCTIONS = ("contains", "words with", "starts", "ends", "followed by")
LITERALS = (*LITERAL_CODE, WORD, WORD, WORD)  # draws are uniform over a tuple: a word is four times as likely
INNER = (*FUNCTIONS, "or", "not", "and", "before", "and3", "or3", *REPEATS, "only")
ANY = (*INNER, *LITERALS)
OPERANDS = (*FUNCTIONS, *REPEATS, "only", *LITERALS, "or")  # of the repeats, starts and ends


class Kind(NamedTuple):
    """A kind of node: how it reads as code and as text, and for each child the kinds to draw it from."""
    code: str
    text: str
    slots: tuple[tuple[str, ...], ...] = ()


KINDS = {literal: Kind(code, literal) for literal, code in LITERAL_CODE.items()} | {
    "contains": Kind(".*%s.*", "containing %s", (ANY,)),
    "words with": Kind(r"\b%s\b", "words with %s", (INNER,)),
    "starts": Kind("(%s)(.*)", "starting with %s", (OPERANDS,)),
    "ends": Kind("(.*)(%s)", "ending with %s", (OPERANDS,)),
    "followed by": Kind("%s.*%s.*", "%s followed by %s", (LITERALS, LITERALS)),
    "before": Kind("(%s).*(%s).*", "%s before %s", (ANY, ANY)),
    "not": Kind("~(%s)", "not %s", (ANY,)),
    "or": Kind("(%s)|(%s)", "%s or %s", (ANY, ANY)),
    "and": Kind("(%s)&(%s)", "%s and %s", (ANY, ANY)),
    "or3": Kind("(%s)|(%s)|(%s)", "either %s, %s, or %s", (LITERALS,) * 3),
    "and3": Kind("(%s)&(%s)&(%s)", "<and3> %s, %s, and %s", (LITERALS,) * 3),
    "at least once": Kind("(%s)+", "%s at least once", (OPERANDS,)),
    "zero or more": Kind("(%s)*", "%s, zero or more times", (OPERANDS,)),
    "n or more": Kind("(%s){%s,}", "%s, %s or more times", (OPERANDS,)),
    "only": Kind("%s", "containing only %s", (LITERALS,)),
}
UNDER_NOT = {"and": "%s and not %s", "and3": "%s, not %s, and not %s", "or3": "%s, %s, or %s"}
SMOOTHING = (  # in this order
    ("lines a", "lines with a"), ("lines the", "lines with the"), ("lines words", "lines with words"),
    ("lines not a", "lines not having a"), ("lines not the", "lines not having the"),
    ("containing not", "not containing"), ("not not", "not"), ("words with containing", "words that contain"),
    ("lines with words with not a", "lines with words that don't have a"),
    ("lines with words with not", "lines with words that don't"),
    ("lines either", "lines having either"), ("lines <and3>", "lines having"), ("<and3> ", ""),
)  # fmt: skip
UNWANTED = (
    "letter before a letter", "starting with ending", "ending with starting", "starting with containing",
    "containing starting", "before starting",
)  # fmt: skip


class Tree(NamedTuple):
    kind: str
    kids: tuple[Tree, ...] = ()
    n: tuple[int, ...] = ()  # (N,) of "n or more"


class Rejected(Exception):
    """The choices made lead to no tree that the corpus keeps."""


Pick = Callable[[tuple], str | int]  # chooses one of the options


def draw(pick: Pick, max_depth: int, max_nodes: int) -> Tree:
    """One tree, drawn from the root down; raises Rejected. Only literals are drawn once it is max_depth deep,
    has max_nodes nodes or two and/or above."""
    used: list[str] = []

    def choose(slot: tuple[str, ...]) -> str:
        kind = pick(slot)
        group = "repeat" if kind in REPEATS else kind
        if group in used and kind != WORD:  # only words stand twice; one repeat at most
            raise Rejected
        used.append(group)
        return kind

    def grow(kind: str, depth: int, n_nodes: int, n_joins: int) -> Tree:
        kids = []
        for slot in KINDS[kind].slots:
            if depth >= max_depth or n_nodes >= max_nodes or n_joins >= 2:
                slot = LITERALS if WORD in slot else ()
            if not slot:  # "words with" takes no literal
                raise Rejected
            kids.append(choose(slot))
            n_nodes += 1 + len(KINDS[kids[-1]].slots)  # counts the children of ancestors, not of cousins
            n_joins += kids[-1] in ("and", "or")
        n = (pick((2, 3, 4, 5, 6, 7)),) if kind == "n or more" else ()
        return Tree(kind, tuple(grow(kid, depth + 1, n_nodes, n_joins) for kid in kids), n)

    kind = choose(INNER)
    root = grow(kind, 1, 1 + len(KINDS[kind].slots), kind in ("and", "or"))
    below = {kid.kind for kid in root.kids}
    bare = kind in ("or", "and", "or3", "and3") and not below.isdisjoint(LITERALS)
    if bare or "only" in below and kind != "not" or used.count(WORD) > len(WORDS):
        raise Rejected
    if ("and3" in used or "or3" in used) and pick((True, False)):
        raise Rejected
    return root


def every(drawing: Callable[[Pick], Tree]) -> Iterator[tuple[Tree, float]]:
    """All trees that drawing(pick) can return, each with its probability. `drawing` is run for every list of
    choices that `pick` can make; a list that proves too short is replaced by all that are one longer."""
    choices = [((), 1.0)]  # a stack of lists and their probabilities
    while choices:
        made, p = choices.pop()
        turn = itertools.count()

        def pick(options: tuple) -> str | int:
            if (i := next(turn)) < len(made):  # noqa: B023
                return made[i]  # noqa: B023
            choices.extend(((*made, o), p * (options.count(o) / len(options)))  # noqa: B023
                           for o in dict.fromkeys(options))
            raise Rejected

        with contextlib.suppress(Rejected):
            yield drawing(pick), p


def read(tree: Tree) -> tuple[str, str]:
    """Both readings of a tree: (text, code)."""

    def text_of(tree: Tree, under_not: bool) -> str:
        template = under_not and UNDER_NOT.get(tree.kind) or KINDS[tree.kind].text
        return template % (*(text_of(kid, under_not or tree.kind == "not") for kid in tree.kids), *tree.n)

    def code_of(tree: Tree) -> str:
        return KINDS[tree.kind].code % (*map(code_of, tree.kids), *tree.n)

    text, code = "lines " + text_of(tree, False), code_of(tree)
    for rough, smooth in SMOOTHING:
        text = text.replace(rough, smooth)
    for word in WORDS:
        text, code = text.replace("WORD", word, 1), code.replace("WORD", word, 1)
    return text, code


def generate(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """n pairs (text, code), all texts distinct, in random order, the same on every machine.

    The authors drew 600,000 trees of depth 2, then deeper ones, and published 10,000 texts. The number of
    draws until a tree first turns up is about exponential; so each listed tree is kept if its random waiting
    time is below 600,000. Up to 10,000, a shorter list is the beginning of a longer one. ValueError: too few
    texts in 50 n draws.
    """
    rng = random.Random(seed)  # only rng.random(): Python promises no other method's numbers for ever
    pairs: dict[str, str] = {}

    def keep(tree: Tree) -> None:
        text, code = read(tree)
        if not any(phrase in text for phrase in UNWANTED):
            pairs.setdefault(text, code)  # a text that two trees share belongs to the first

    listed = every(lambda pick: draw(pick, max_depth=2, max_nodes=5))
    for when, tree in sorted((-math.log(1 - rng.random()) / p, tree) for tree, p in listed):
        if when < 600_000:
            keep(tree)
    size = max(n, 10_000)
    for _ in range(50 * size):
        if len(pairs) >= size:
            shuffled = sorted((rng.random(), *pair) for pair in pairs.items())
            return [(text, code) for _, text, code in shuffled[: max(n, 0)]]
        with contextlib.suppress(Rejected):
            keep(draw(lambda options: options[int(rng.random() * len(options))], max_depth=3, max_nodes=7))
    raise ValueError(f"{50 * size} draws of the NL-RX grammar gave only {len(pairs)} distinct texts, not {n}")
