"""tasks/regexes.py against a matcher that knows no derivatives, and against Python's re."""
import doctest
import functools
import itertools
import random
import re
import time

import pytest
from conftest import SHARED_DATA

from tasks import regexes
from tasks.datasets import read_jsonl
from tasks.regexes import BOUNDARY, Node, equal

parse = functools.cache(regexes.parse)


# ---- the outside matcher -----------------------------------------------------------------------------------

def ends(node: Node, s: str, start: int, memo: dict) -> frozenset[int]:
    """Where in s a match of the node can end that begins at `start`."""
    key = id(node), start
    if key not in memo:
        memo[key] = frozenset(_ends(node, s, start, memo))
    return memo[key]


def _ends(node, s, start, memo):
    def after(starts, kid):
        return set().union(*(ends(kid, s, i, memo) for i in starts))
    whole, of_kids = set(range(start, len(s) + 1)), (ends(kid, s, start, memo) for kid in node.kids)
    if node.kind == "chars":
        negated, ranges = node.chars
        listed = start < len(s) and any(low <= ord(s[start]) <= high for low, high in ranges)
        hit = not listed and start < len(s) and s[start] != BOUNDARY if negated else listed
        return {start + 1} if hit else set()
    if node.kind == "or":
        return set().union(*of_kids)
    if node.kind == "and":
        return whole.intersection(*of_kids)
    if node.kind == "not":
        return whole.difference(*of_kids)
    if node.kind == "cat":
        return functools.reduce(after, node.kids, {start})
    low, high = node.bounds  # after the first `low`, only rounds that are not empty change anything
    rounds = low + len(s) if high is None else min(high, low + len(s))
    here = itertools.accumulate([node.kids[0]] * rounds, after, initial={start})
    return set().union(*itertools.islice(here, low, None))


def matches(regex: str, s: str) -> bool:
    return len(s) in ends(parse(regex), s, 0, {})


def told_apart(a: str, b: str, tries: list[str]) -> str | None:
    return next((s for s in tries if matches(a, s) != matches(b, s)), None)


def strings(letters, longest: int) -> list[str]:
    return ["".join(s) for n in range(longest + 1) for s in itertools.product(letters, repeat=n)]


# ---- the parser --------------------------------------------------------------------------------------------

def show(node: Node) -> str:
    """The tree as a term, written apart from the code under test."""
    if node.kind == "chars":
        negated, ranges = node.chars
        text = "".join(chr(a) if a == b else f"{chr(a)}-{chr(b)}" for a, b in ranges)
        return "." if (negated, ranges) == (True, ()) else f"[^{text}]" if negated else text
    inner = " ".join(map(show, node.kids))
    return f"({node.kind} {inner}{' {} {}'.format(*node.bounds) if node.kind == 'repeat' else ''})"


@pytest.mark.parametrize("regex,tree", [
    ("a|b&cd", "(or a (and b (cat c d)))"), ("(a|b)&c", "(and (or a b) c)"),
    ("ab*", "(cat a (repeat b 0 None))"), ("~a*", "(repeat (not a) 0 None)"),  # not the complement of a*
    ("~(a*)", "(not (repeat a 0 None))"), ("~ab", "(cat (not a) b)"), ("~~~a", "(not (not (not a)))"),
    ("a+?{2}{3,}{4,5}", "(repeat (repeat (repeat (repeat (repeat a 1 None) 0 1) 2 2) 3 None) 4 5)"),
    ("", "(cat )"), ("()", "(cat )"), ("a()b", "(cat a (cat ) b)"), (r"\.\*\(", "(cat . * ()"),
    (r"\d", "d"),  # an escape is the character itself, as in brics
    ("[a-c^.-]", "a-c^.-"), (r"[^\]x]", "[^]x]"), (r"\bx\b", f"(cat {BOUNDARY} x {BOUNDARY})"),
    ('"@#<', '(cat " @ # <)')])
def test_precedence(regex, tree):
    assert show(parse(regex)) == tree


@pytest.mark.parametrize("regex,position", [
    ("(a", 2), ("a)", 1), ("a|", 2), ("|a", 2), ("a&&b", 4), ("*a", 0), ("a|*", 2), ("~", 1), ("(~)", 2),
    ("a{2,1}", 1), ("a{", 1), ("a{x}", 1), ("a{,3}", 1), ("a{10000}", 1), ("[]", 0), ("[^]", 0), ("[a", 0),
    ("[z-a]", 0), ("a]", 1), ("\\", 0), ("(|a)", 3), ("a" * 3000, 0), ("a" + "*" * 60, 51),
    ("~" * 60 + "a", 60)])
def test_errors_name_the_position_in_one_line(regex, position):
    with pytest.raises(ValueError, match=f"^position {position} of the regex: [^\n]+$"):
        equal("a", regex)


def random_regex(rng, depth, operators="|&~*n"):
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(["a", "b", "[ab]", ".", "[^a]", "ab", "()", "a"])
    x, y = (random_regex(rng, depth - 1, operators) for _ in range(2))
    count = rng.choice(["0,2", "2", "1,", "0,"])
    forms = {"|": f"({x}|{y})", "&": f"({x}&{y})", "~": f"~({x})", "*": f"({x})*", "n": f"({x}){{{count}}}"}
    return rng.choice([*(forms[o] for o in operators), f"({x})({y})", f"({x})?", f"({x})+"])


def test_python_agrees_where_the_dialects_do():
    """On what a regex matches: asked of the outside matcher, and of `equal` by an intersection."""
    rng = random.Random(0)
    for _ in range(100):
        regex = random_regex(rng, 3, "|*n")
        for s in strings("abc", 3):
            theirs = re.fullmatch(regex, s, re.DOTALL) is not None
            assert matches(regex, s) == equal(f"({regex})&({s})", s or "()").equal == theirs, (regex, s)


def test_boundary_is_a_letter_of_its_own():
    assert matches(r"\bdog\b", f"{BOUNDARY}dog{BOUNDARY}")
    assert equal(r"\ba", "ba").equal is False
    assert equal(r".|[^a]|\b", r".|\b").equal is equal(r".&\b", "a&b").equal is True
    assert equal(r"~(\b)", "~(a&b)") == (False, BOUNDARY)
    assert equal("~(a&b)", ".*").equal is True  # no regex has it: the alphabet has it not


# ---- equality ----------------------------------------------------------------------------------------------

def rewritten(rng, x, y, z):
    """Two regexes of one language. Counters under a star have too many derivatives: u and v are without."""
    u, v = (re.sub(r"\{\d,\}", "+", code) for code in (y, z))
    return rng.choice([
        (f"({x})|({y})", f"({y})|({x})"),
        (f"({x})&({y})", f"({y})&({x})"),
        (f"~(~({x}))", x),
        (f"({x}){{2,}}", f"({x})({x})({x})*"),
        (f"({x})+", f"({x})({x})*"),
        (f"({x}){{1,3}}", f"({x})(({x})(({x})?))?"),
        (f"~(({x})|({y}))", f"~({x})&~({y})"),
        (f"~(({x})&({y}))", f"~({x})|~({y})"),
        (f"({x})&(({y})|({z}))", f"(({x})&({y}))|(({x})&({z}))"),
        (f"({x})|(({y})&({z}))", f"(({x})|({y}))&(({x})|({z}))"),
        (f"({x})(({y})|({z}))", f"({x})({y})|({x})({z})"),
        (f"(({x})*)*", f"(({x})|())*"),
        (f"(({u})|({v}))*", f"(({u})*({v})*)*"),
        (f"({u})(({x})({u}))*", f"(({u})({x}))*({u})"),
        (f"({x})|(({x})&({y}))", x),
    ])  # fmt: skip


def test_a_thousand_pairs_of_the_grammar(corpus):
    """Equal: no string tells them apart. Different: the witness does. Every rewrite is found equal."""
    rng, codes = random.Random(1), [code for _, code in corpus]
    short = [code for code in codes if len(code) < 22]
    words = strings("ad", 6) + strings("aB0", 4) + strings(("e", "dog", "truck", BOUNDARY), 3)
    for i in range(1000):
        same = i % 2 == 0
        a, b = rewritten(rng, *rng.sample(short, 3)) if same else rng.sample(codes, 2)
        verdict = equal(a, b, seconds=60)  # the machine may be busy
        assert verdict.equal is not None and (verdict.equal or not same), (a, b, verdict)
        if verdict.equal:  # without \b, BOUNDARY is no letter of theirs
            tries = [s for s in rng.sample(words, 25) if r"\b" in a + b or BOUNDARY not in s]
            assert told_apart(a, b, tries) is None, (a, b)
        else:
            assert told_apart(a, b, [verdict.witness]) is not None, (a, b, verdict)


def test_small_random_pairs_on_all_strings_up_to_6():
    """Over two letters and one that stands for all others, every string up to length 6 is tried."""
    rng, n_equal = random.Random(2), 0
    tries = strings("ab", 6) + strings("abc", 4)
    for _ in range(400):
        a, b = (random_regex(rng, 2) for _ in range(2))
        verdict, s = equal(a, b), told_apart(a, b, tries)
        assert verdict.equal is (s is None), (a, b, verdict, s)
        assert s is None or len(verdict.witness) <= len(s) + 2
        n_equal += verdict.equal
    assert n_equal > 5


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the published files are not here")
def test_published_answers_are_judged_quickly():
    gold = [e.code for e in read_jsonl(SHARED_DATA / "synth_test.jsonl")]
    other = random.Random(0).sample(gold, len(gold))
    began = time.perf_counter()
    assert all(equal(code, code).equal for code in gold)
    assert all(equal(a, b).equal is not None for a, b in zip(gold, other, strict=True))
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize("a,b,expected", [
    ("((a{7,}){7,}){7,}", "a{343,}", True), ("(((a{7,}){7,}){7,}){7,}", "a{2401,}", True),
    ("~(" * 20 + "a" + ")" * 20, "a", True), ("~(" * 21 + "a" + ")" * 21, "a", False),
    ("(" * 450 + "a" + ")" * 450, "a", True), ("((((a*)*b*)*c*)*d*)*", "[abcd]*", True),
    ("(a?){300}a{300}", "a{300,600}", True),
    # more than the bounds allow, or a witness: never a wrong answer
    ("a{9999}", "a{9998}", None), ("(a|b)*a(a|b){20}", "(a|b)*b(a|b){20}", None),
    ("(((a{2,9}b?){2,9}){2,9}){2,9}", "(((a{2,9}b?){2,9}){2,9}){2,8}", None),
    ("((a|b)*a(a|b){30})&((a|b)*b(a|b){30})", "a", None),
    (".*a" * 300, ".*a" * 299, None),
    ("".join(map(chr, range(1000, 1990))), "".join(map(chr, range(1001, 1990))), None)])
def test_hostile_answers_end(a, b, expected):
    began, seconds = time.perf_counter(), 0.2 if expected is None else 4
    verdict = equal(a, b, seconds=seconds)
    assert time.perf_counter() - began < 5
    assert verdict.equal is expected or (expected is None and verdict.witness is not None)


def test_bounds_give_undecided():
    assert equal(".*a.{9}", ".*b.{9}b", max_states=5) == (None, None)
    assert equal("a{2000}", "a{2001}", seconds=0) == (None, None)


def test_the_worked_example():
    assert doctest.testmod(regexes) == (0, 1)
