r"""Do two regexes describe the same strings? A parser for the dialect of NL-RX, and derivatives.

The dialect is dk.brics.automaton's: full match; from loose to tight `|`, `&` (both), concatenation,
`* + ? {n} {n,} {n,m}`, `~` (not). Regexes are compared by their derivatives (Brzozowski 1964): the derivative
of x by the letter c is the language of what may follow c in x.

    >>> equal("(a|b){2,}", "[ab][ab]+"), equal("~(a)", "[^a]")
    (Verdict(equal=True, witness=None), Verdict(equal=False, witness=''))

But:
- `"`, `@`, `#`, `<` are ordinary characters; brics gives them meanings that NL-RX never uses;
- `*a`, `a|`, `[z-a]`, `a{2,1}` are errors; brics reads them as literals or empty languages;
- `\b` is one more letter, BOUNDARY. Only `\b` and complements match it, never `.` or `[^...]`, and it counts
  only if one of the two regexes has it. For brics it is the letter b, for Python a position.
"""
from __future__ import annotations

import itertools
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

BOUNDARY = "\b"  # U+0008, which stands for `\b` in a witness
MAX_LENGTH, MAX_HEIGHT = 1_000, 50  # of a regex, of its tree; in NL-RX 54 and about 10
TOKEN = re.compile(r"\\.|\[(?!\^\])\^?(?:\\.|[^]\\])+\]|\{[0-9]{1,4}(?:,[0-9]{0,4})?\}|.", re.DOTALL)
Chars = tuple[bool, tuple[tuple[int, int], ...]]  # negated?, ranges of code points, both ends included


class Node(NamedTuple):
    """A parsed regex: "chars", or "cat" (of none: the empty string), "or", "and", "not", "repeat" of kids."""
    kind: str
    kids: tuple[Node, ...] = ()
    chars: Chars = (False, ())
    bounds: tuple[int, int | None] = (1, 1)  # of "repeat": at least, at most
    height: int = 0


def _node(kind: str, kids: list[Node], bounds: tuple[int, int | None] = (1, 1)) -> Node:
    if len(kids) == 1 and kind in ("cat", "or", "and"):
        return kids[0]
    height = 1 + max((kid.height for kid in kids), default=0)
    if height > MAX_HEIGHT:  # everything after the parser is recursive
        raise ValueError(f"nested more than {MAX_HEIGHT} deep")
    return Node(kind, tuple(kids), bounds=bounds, height=height)


def _chars(token: str) -> Node:
    """A class, `.`, an escaped character or a plain one."""
    if token in ("[", "]", "{", "}", "\\"):
        raise ValueError(f"{token} is not complete, or lacks a backslash")
    if token == ".":
        return Node("chars", chars=(True, ()))
    negated = token.startswith("[^")
    inside = token[1 + negated : -1] if token[0] == "[" else token
    pairs = re.findall(r"(\\.|[^\\])(?:-(\\.|[^\\]))?", inside, re.DOTALL)
    ranges = [[ord(BOUNDARY if c == r"\b" else c[-1]) for c in (low, high or low)] for low, high in pairs]
    if any(low > high for low, high in ranges):
        raise ValueError("a range runs backwards")
    return Node("chars", chars=(negated, tuple(map(tuple, ranges))))


def _repeat(factors: list, token: str) -> Node:
    if not factors or factors[-1] == "~":
        raise ValueError(f"nothing for {token} to repeat")
    token = {"*": "{0,}", "+": "{1,}", "?": "{0,1}"}.get(token, token)
    low, comma, high = token[1:-1].partition(",")
    bounds = int(low), int(high) if high else None if comma else int(low)
    if high and bounds[0] > int(high):
        raise ValueError("a repeat runs backwards")
    return _node("repeat", [factors[-1]], bounds)


def _close(group: list[list[list]]) -> Node:
    if group == [[[]]]:
        return Node("cat")
    if any(not factors or factors[-1] == "~" for both in group for factors in both):
        raise ValueError("something is missing beside |, & or ~")
    return _node("or", [_node("and", [_node("cat", factors) for factors in both]) for both in group])


def _take(groups: list[list], token: str) -> None:
    """Read one token. `groups` are the parentheses still open, outermost first. A group is a list of
    alternatives, these are lists of operands of `&`, and these of factors: a Node, or a "~" before one."""
    factors = groups[-1][-1][-1]
    if token == "(":
        groups.append([[[]]])
    elif token == "|":
        groups[-1].append([[]])
    elif token == "&":
        groups[-1][-1].append([])
    elif token == "~":
        factors.append("~")
    elif token in ("*", "+", "?") or len(token) > 1 and token[0] == "{":
        factors[-1:] = [_repeat(factors, token)]
    elif token == ")" and len(groups) == 1:
        raise ValueError("no ( for this )")
    else:
        node = _close(groups.pop()) if token == ")" else _chars(token)
        factors = groups[-1][-1][-1]
        while factors and factors[-1] == "~":  # at once, since it binds tightest
            node = _node("not", [node])
            factors.pop()
        factors.append(node)


def parse(regex: str) -> Node:
    """The tree of a regex; the empty regex is the empty string, as `()` is.

    ValueError, one line with the position: malformed, longer than MAX_LENGTH or deeper than MAX_HEIGHT.
    """
    groups: list[list] = [[[[]]]]
    at = 0
    try:
        if len(regex) > MAX_LENGTH:
            raise ValueError(f"longer than {MAX_LENGTH} characters")
        for match in TOKEN.finditer(regex):
            at = match.start()
            _take(groups, match[0])
        at = len(regex)
        if len(groups) > 1:
            raise ValueError("a ( is not closed")
        return _close(groups[0])
    except ValueError as error:
        raise ValueError(f"position {at} of the regex: {error}") from None


# ---- derivatives -------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Form:
    """A language in normal form. Algebra makes each form once (hash-consing), so `is` compares them."""
    number: int
    kind: str
    parts: tuple
    has_empty: bool


def _all_chars(node: Node) -> Iterator[Chars]:
    yield from (node.chars,) if node.kind == "chars" else itertools.chain(*map(_all_chars, node.kids))


def _member(code: int, chars: Chars) -> bool:
    listed = any(low <= code <= high for low, high in chars[1])
    return not listed and code != ord(BOUNDARY) if chars[0] else listed


class Algebra:
    """The languages of some trees and their derivatives. A letter of its alphabet is the class of all
    characters that these trees do not tell apart. TimeoutError once max_forms or the seconds are used up."""

    def __init__(self, trees: list[Node], max_forms: int, seconds: float):
        self.max_forms, self.deadline = max_forms, time.monotonic() + seconds
        self.forms: dict[tuple, Form] = {}
        sets = list(dict.fromkeys(itertools.chain(*map(_all_chars, trees))))
        edge = ord(BOUNDARY)
        cuts = {0, edge + 1, *(cut for _, ranges in sets for a, b in ranges for cut in (a, b + 1))}
        if any(_member(edge, chars) for chars in sets):
            cuts.add(edge)
        letters: dict[tuple[bool, ...], list[str]] = {}  # which sets hold it -> its characters at the cuts
        for cut in sorted(cuts - {sys.maxunicode + 1}):
            letters.setdefault(tuple(_member(cut, chars) for chars in sets), []).append(chr(cut))
        self.letters = [max(some, key=lambda c: (c.isalnum(), c.isprintable())) for some in letters.values()]
        self.masks = {chars: sum(m[i] << k for k, m in enumerate(letters)) for i, chars in enumerate(sets)}
        self.nothing, self.empty = self.form("chars", (0,), False), self.form("cat", (), True)
        self.anything = self.complement(self.nothing)
        self.derivative = cache(self._derivative)

    def form(self, kind: str, parts: tuple, has_empty: bool) -> Form:
        if len(self.forms) >= self.max_forms or time.monotonic() > self.deadline:
            raise TimeoutError
        if (kind, parts) not in self.forms:
            self.forms[kind, parts] = Form(len(self.forms), kind, parts, has_empty)
        return self.forms[kind, parts]

    def complement(self, x: Form) -> Form:
        return x.parts[0] if x.kind == "not" else self.form("not", (x,), not x.has_empty)

    def cat(self, *forms: Form) -> Form:
        parts = tuple(part for x in forms for part in (x.parts if x.kind == "cat" else (x,)))
        if self.nothing in parts:
            return self.nothing
        return parts[0] if len(parts) == 1 else self.form("cat", parts, all(x.has_empty for x in parts))

    def join(self, kind: str, forms: Iterable[Form]) -> Form:
        """x|y or x&y, whatever the order, grouping and repetition: so the derivatives are finitely many."""
        parts = {part for x in forms for part in (x.parts if x.kind == kind else (x,))}
        neutral, absorbing = (self.nothing, self.anything) if kind == "or" else (self.anything, self.nothing)
        if absorbing in parts or any(x.kind == "not" and x.parts[0] in parts for x in parts):
            return absorbing
        if kind == "and" and self.empty in parts:
            return self.empty if all(x.has_empty for x in parts) else self.nothing
        parts = sorted(parts - {neutral}, key=lambda x: x.number) or [neutral]
        has_empty = (any if kind == "or" else all)(x.has_empty for x in parts)
        return parts[0] if len(parts) == 1 else self.form(kind, tuple(parts), has_empty)

    def repeat(self, x: Form, low: int, high: int | None) -> Form:
        """x{low,high}, never written out: its derivative only counts down."""
        low = 0 if x.has_empty else low
        if x.kind == "repeat" and x.parts[2] is None and high != 0 and (low or x.parts[1] < 2):
            return self.repeat(x.parts[0], x.parts[1] * low, None)  # (y{a,}){b,c} = y{ab,}
        if high == 0 or x is self.empty or x is self.nothing and not low:
            return self.empty
        if x is self.nothing or (low, high) == (1, 1):
            return x
        return self.form("repeat", (x, low, high), low == 0)

    def build(self, node: Node) -> Form:
        if node.kind == "chars":
            return self.form("chars", (self.masks[node.chars],), False)
        kids = [self.build(kid) for kid in node.kids]
        if node.kind == "repeat":
            return self.repeat(*kids, *node.bounds)
        if node.kind == "not":
            return self.complement(*kids)
        return self.cat(*kids) if node.kind == "cat" else self.join(node.kind, kids)

    def _derivative(self, x: Form, letter: int) -> Form:
        if x.kind == "chars":
            return self.empty if x.parts[0] >> letter & 1 else self.nothing
        if x.kind == "repeat":  # right even if y has the empty string: empty copies may as well come last
            y, low, high = x.parts
            return self.cat(self.derivative(y, letter), self.repeat(y, max(low - 1, 0), high and high - 1))
        if x.kind == "cat":  # the letter is in the first part, or in a later one if all before can be empty
            n_empty = sum(1 for _ in itertools.takewhile(lambda part: part.has_empty, x.parts))
            heads = enumerate(x.parts[: n_empty + 1], 1)
            return self.join("or", [self.cat(self.derivative(y, letter), *x.parts[i:]) for i, y in heads])
        kids = [self.derivative(part, letter) for part in x.parts]
        return self.complement(*kids) if x.kind == "not" else self.join(x.kind, kids)


class Verdict(NamedTuple):
    equal: bool | None  # None: undecided within the bounds
    witness: str | None  # a string in exactly one of two languages that differ


def _compare(algebra: Algebra, x: Form, y: Form) -> Verdict:
    """Assume x = y and follow what must then be equal too (Hopcroft and Karp 1971), breadth first."""
    leader: dict[Form, Form] = {}  # union-find: the forms assumed equal form trees

    def find(form: Form) -> Form:
        while form in leader:
            form = leader[form]
        return form

    queue = deque([(x, y, "")])
    while queue:
        x, y, path = queue.popleft()
        if x.has_empty != y.has_empty:
            return Verdict(False, path)
        if find(x) is not find(y):
            leader[find(x)] = find(y)
            for i, char in enumerate(algebra.letters):
                queue.append((algebra.derivative(x, i), algebra.derivative(y, i), path + char))
    return Verdict(True, None)


def equal(a: str, b: str, max_states: int = 20_000, seconds: float = 5.0) -> Verdict:
    """Have two regexes one language? If not, a short string that only one of them matches.

    Undecided (None, None) once `max_states` normal forms or the seconds are used up. ValueError: see parse.
    """
    trees = [parse(a), parse(b)]
    try:
        algebra = Algebra(trees, max_states, seconds)
        return _compare(algebra, *map(algebra.build, trees))
    except (TimeoutError, RecursionError):
        return Verdict(None, None)
