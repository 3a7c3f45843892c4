"""nlrx.py against the published corpus; derivatives.py against a matcher that knows none, and against
Python's re."""

import doctest
import hashlib
import itertools
import json
import random
import re
import time

from tasks import regexes as derivatives
from tasks import nlrx
import pytest
from conftest import SHARED_DATA as DATA
from tasks.regexes import BOUNDARY, Node, equal, matches, parse
from tasks.nlrx import ANY, KINDS, LITERALS, Rejected, generate


def published(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not there")
    lines = [json.loads(line)["messages"] for line in path.open(encoding="utf-8")]
    return [(m[1]["content"], m[2]["content"]) for m in lines]


@pytest.fixture(scope="module")
def corpus():
    return generate(10_000)


# ------------------------------------------------------------ the outside matcher: sets of end positions


def ends(node: Node, s: str, start: int, memo: dict) -> frozenset[int]:
    """All j such that the node matches s[start:j]."""
    key = (id(node), start)
    if key not in memo:
        memo[key] = frozenset(_ends(node, s, start, memo))
    return memo[key]


def _ends(node, s, start, memo):
    every_end = range(start, len(s) + 1)
    if node.kind == "chars":
        negated, ranges = node.chars
        if start == len(s):
            return ()
        listed = any(low <= ord(s[start]) <= high for low, high in ranges)
        hit = not listed and s[start] != BOUNDARY if negated else listed
        return (start + 1,) if hit else ()
    if node.kind == "or":
        return set().union(*(ends(kid, s, start, memo) for kid in node.kids))
    if node.kind == "and":
        return set(every_end).intersection(*(ends(kid, s, start, memo) for kid in node.kids))
    if node.kind == "not":
        return set(every_end) - ends(node.kids[0], s, start, memo)
    if node.kind == "cat":
        here = {start}
        for kid in node.kids:
            here = set().union(*(ends(kid, s, i, memo) for i in here))
        return here
    low, high = node.bounds  # repeat: more than len(s) empty-free rounds cannot be, empty ones change nothing
    here, found = {start}, {start} if low == 0 else set()
    for i in range(1, (low + len(s) + 1 if high is None else min(high, low + len(s) + 1)) + 1):
        here = set().union(*(ends(node.kids[0], s, j, memo) for j in here))
        found |= here if i >= low else set()
    return found


def slow_match(regex: str, s: str) -> bool:
    return len(s) in ends(parse(regex), s, 0, {})


# ----------------------------------------------------------------------------------------- the parser


def show(node: Node) -> str:
    """The tree as a term, written apart from the code under test."""
    if node.kind == "chars":
        negated, ranges = node.chars
        text = "".join(chr(a) if a == b else f"{chr(a)}-{chr(b)}" for a, b in ranges)
        return "." if (negated, ranges) == (True, ()) else f"[^{text}]" if negated else text
    inner = " ".join(map(show, node.kids))
    return f"({node.kind} {inner}{' {} {}'.format(*node.bounds) if node.kind == 'repeat' else ''})"


@pytest.mark.parametrize(
    ("regex", "tree"),
    [
        ("a|b&cd", "(or a (and b (cat c d)))"),
        ("(a|b)&c", "(and (or a b) c)"),
        ("ab*", "(cat a (repeat b 0 None))"),
        ("~a*", "(repeat (not a) 0 None)"),  # not the complement of a*
        ("~(a*)", "(not (repeat a 0 None))"),
        ("~ab", "(cat (not a) b)"),
        ("~~~a", "(not (not (not a)))"),
        ("a+?{2}{3,}{4,5}", "(repeat (repeat (repeat (repeat (repeat a 1 None) 0 1) 2 2) 3 None) 4 5)"),
        ("", "(cat )"),
        ("()", "(cat )"),
        ("a()b", "(cat a (cat ) b)"),
        (r"\.\*\(", "(cat . * ()"),
        (r"\d", "d"),  # an escape is the character itself, as in brics
        ("[a-c^.-]", "a-cc^.-".replace("cc", "c")),
        (r"[^\]x]", "[^]x]"),
        (r"\bx\b", f"(cat {BOUNDARY} x {BOUNDARY})"),
        ('"@#<', '(cat " @ # <)'),
    ],
)
def test_precedence(regex, tree):
    assert show(parse(regex)) == tree


@pytest.mark.parametrize(
    ("regex", "position"),
    [("(a", 2), ("a)", 1), ("a|", 2), ("|a", 2), ("a&&b", 4), ("*a", 0), ("a|*", 2), ("~", 1), ("(~)", 2),
     ("a{2,1}", 1), ("a{", 1), ("a{x}", 1), ("a{,3}", 1), ("a{10000}", 1), ("[]", 0), ("[^]", 0), ("[a", 0),
     ("[z-a]", 0), ("a]", 1), ("\\", 0), ("(|a)", 3), ("a" * 3000, 0),
     ("a" + "*" * 60, 51), ("~" * 60 + "a", 60)],
)  # fmt: skip
def test_errors_name_the_position_in_one_line(regex, position):
    with pytest.raises(ValueError, match=f"^position {position} of the regex: [^\n]+$"):
        parse(regex)
    with pytest.raises(ValueError):
        equal("a", regex)


def random_regex(rng, depth, operators="|&~*n"):
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(["a", "b", "[ab]", ".", "[^a]", "ab", "()", "a"])
    x, y = (random_regex(rng, depth - 1, operators) for _ in range(2))
    count = rng.choice(["0,2", "2", "1,", "0,"])
    forms = {"|": f"({x}|{y})", "&": f"({x}&{y})", "~": f"~({x})", "*": f"({x})*", "n": f"({x}){{{count}}}"}
    return rng.choice([*(forms[o] for o in operators), f"({x})({y})", f"({x})?", f"({x})+"])


def strings(letters, longest):
    return ["".join(s) for n in range(longest + 1) for s in itertools.product(letters, repeat=n)]


def test_parse_and_matches_agree_with_python_where_the_dialects_do():
    rng = random.Random(0)
    for _ in range(200):
        regex = random_regex(rng, 3, "|*n")
        for s in strings("abc", 3):
            theirs = re.fullmatch(regex, s, re.DOTALL) is not None
            assert slow_match(regex, s) == matches(regex, s) == theirs, (regex, s)


def test_boundary_is_a_letter_of_its_own():
    assert matches(r"\bdog\b", f"{BOUNDARY}dog{BOUNDARY}")
    assert not matches(".", BOUNDARY) and not matches("[^a]", BOUNDARY) and matches("~(a)", BOUNDARY)
    assert equal(r"\ba", "ba").equal is False
    assert equal(r"~(\b)", "~(a&b)") == (False, BOUNDARY)
    assert equal("~(a&b)", ".*").equal is True  # no regex has it: the alphabet has it not


# ----------------------------------------------------------------------------------------------- equality


def variants(rng, x, y, z):
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


WORDS_TO_TRY = strings("ad", 6) + strings("aB0", 4) + strings(("e", "dog", "truck", BOUNDARY), 3)


def told_apart(a, b, tries):
    return next((s for s in tries if slow_match(a, s) != slow_match(b, s)), None)


def test_a_thousand_pairs_of_the_grammar(corpus):
    """Equal: no string tells them apart. Different: the witness does. Every rewrite is found equal."""
    rng = random.Random(1)
    codes = [code for _, code in corpus]
    short = [code for code in codes if len(code) < 22]
    for i in range(1000):
        same = i % 2 == 0
        a, b = variants(rng, *rng.sample(short, 3)) if same else rng.sample(codes, 2)
        verdict = equal(a, b, seconds=60)  # the machine may be busy
        assert verdict.equal is not None and (verdict.equal or not same), (a, b, verdict)
        if verdict.equal:
            has_boundary = r"\b" in a + b  # else it is no letter of theirs
            tries = [s for s in rng.sample(WORDS_TO_TRY, 25) if has_boundary or BOUNDARY not in s]
            assert told_apart(a, b, tries) is None, (a, b)
        else:
            w = verdict.witness
            assert slow_match(a, w) != slow_match(b, w) and matches(a, w) != matches(b, w), (a, b, w)


def test_small_random_pairs_on_all_strings_up_to_6():
    """Over two letters and one that stands for all others, every string up to length 6 is tried."""
    rng = random.Random(2)
    tries = [s for s in strings("ab", 6)] + strings("abc", 4)
    n_equal = 0
    for _ in range(400):
        a, b = (random_regex(rng, 2) for _ in range(2))
        verdict, s = equal(a, b), told_apart(a, b, tries)
        assert verdict.equal is (s is None), (a, b, verdict, s)
        if s is not None:
            assert len(verdict.witness) <= len(s) + 2
        n_equal += verdict.equal
    assert n_equal > 5


def test_gold_answers_are_judged_quickly():
    gold = [code for _, code in published("synth_test.jsonl")]
    other = gold[:]
    random.Random(0).shuffle(other)
    begin = time.perf_counter()
    assert all(equal(code, code).equal for code in gold)
    assert all(equal(a, b).equal is not None for a, b in zip(gold, other, strict=True))
    assert time.perf_counter() - begin < 20


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("((a{7,}){7,}){7,}", "a{343,}", True),
        ("(((a{7,}){7,}){7,}){7,}", "a{2401,}", True),
        ("~(" * 20 + "a" + ")" * 20, "a", True),
        ("~(" * 21 + "a" + ")" * 21, "a", False),
        ("(" * 450 + "a" + ")" * 450, "a", True),
        ("((((a*)*b*)*c*)*d*)*", "[abcd]*", True),
        ("(a?){300}a{300}", "a{300,600}", True),
        ("a{9999}", "a{9998}", None),  # more steps than the bounds allow, or a witness: never a wrong answer
        ("(a|b)*a(a|b){20}", "(a|b)*b(a|b){20}", None),
        ("(((a{2,9}b?){2,9}){2,9}){2,9}", "(((a{2,9}b?){2,9}){2,9}){2,8}", None),
        (".*a" * 300, ".*a" * 299, None),
        ("".join(map(chr, range(1000, 1990))), "".join(map(chr, range(1001, 1990))), None),
    ],
)
def test_hostile_answers_end(a, b, expected):
    begin = time.perf_counter()
    verdict = equal(a, b, seconds=1.0)
    assert time.perf_counter() - begin < 5
    assert verdict.equal is expected or (expected is None and verdict.witness is not None)


def test_bounds_give_undecided():
    assert equal(".*a.{9}", ".*b.{9}b", max_states=5) == (None, None)
    assert equal("a{2000}", "a{2001}", seconds=0) == (None, None)


def test_anything_at_all_is_answered_or_refused():
    rng = random.Random(3)
    for _ in range(1500):
        regex = "".join(rng.choice('ab()()[]{}|&~*+?.,29^-\\\n"é😀') for _ in range(rng.randrange(14)))
        try:
            parse(regex)
        except ValueError as error:
            assert "\n" not in str(error).replace(regex, "")
        else:
            assert equal(regex, regex, seconds=1).equal is True


# ------------------------------------------------------------------------------------------ the grammar


def test_generate_is_the_same_everywhere(corpus):
    assert corpus[:3] == [
        ("lines with a number before the string 'dog', 5 or more times", "([0-9]).*((dog){5,}).*"),
        ("lines with a character before a number followed by a letter", "(.).*([0-9].*[A-Za-z].*).*"),
        ("lines with the string 'dog' or a lower-case letter, 2 or more times", "((dog)|([a-z])){2,}"),
    ]
    assert generate(3, seed=1) != corpus[:3]
    digest = hashlib.sha256("\n".join(f"{text}\t{code}" for text, code in corpus).encode()).hexdigest()
    assert digest == "ca6f80f5305730939eb12e8869bd5016f4cd361ad43c1a4010575f2a17b6e16d"


def test_every_text_once_and_every_code_parses(corpus):
    assert len(corpus) == len({text for text, _ in corpus}) == 10_000
    for text, code in corpus:
        parse(code)
        assert text.startswith("lines ") and "WORD" not in text + code and "<" not in text


def test_what_is_never_kept(corpus):
    for text, code in corpus:
        words = re.findall("dog|truck|ring|lake", code)
        assert words == ["dog", "truck", "ring", "lake"][: len(words)] == re.findall("'([a-z]+)'", text)
        for literal in ("[0-9]", "[A-Z]", "[a-z]", "[A-Za-z]", "[AEIOUaeiou]"):
            assert code.count(literal) <= 1
        assert text.count("times") + text.count("at least once") <= 1
        assert "letter before a letter" not in text and "starting with ending" not in text
        assert not re.fullmatch(r"\((\[[^]]*\]|\.|[a-z]+)\)[|&]\((\[[^]]*\]|\.|[a-z]+)\)", code)


def test_too_many_is_refused_in_one_line(monkeypatch):
    def reject(pick, max_depth, max_nodes):
        raise Rejected

    monkeypatch.setattr(nlrx, "draw", reject)
    with pytest.raises(ValueError, match="gave only 0 distinct texts, not 10000$"):
        generate(10_000)


def test_words_are_four_times_as_likely():
    assert LITERALS.count("the string 'WORD'") == 4 and len(LITERALS) == 10
    assert len(ANY) == 25 and all(set(slot) <= set(KINDS) for kind in KINDS.values() for slot in kind.slots)


def test_generated_looks_like_published(corpus):
    """Shares of what stands in the codes within 2 points; about half of the texts are the very same."""
    pairs = dict(published("synth_train.jsonl"))
    for part in ("&", "~", "\\b", "|", ")+", ")*", ",}", "dog", "truck", "[0-9]", "[a-z]", "(.*)"):
        ours = sum(part in code for _, code in corpus) / len(corpus)
        theirs = sum(part in code for code in pairs.values()) / len(pairs)
        assert abs(ours - theirs) < 0.02, part
    for i in (0, 1):
        ours, theirs = (sorted(len(pair[i]) for pair in x) for x in (corpus, pairs.items()))
        assert all(abs(ours[len(ours) * q // 10] - theirs[len(theirs) * q // 10]) <= 1 for q in range(1, 10))
    shared = [text for text, _ in corpus if text in pairs]
    assert len(shared) > 0.55 * len(pairs)
    assert sum(pairs[text] == code for text, code in corpus if text in pairs) > 0.88 * len(shared)


def test_the_worked_example():
    assert doctest.testmod(nlrx) == (0, 1) and doctest.testmod(derivatives) == (0, 2)
