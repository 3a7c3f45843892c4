"""bpe.py against the algorithm that counts all pairs again for every merge."""
import random
import time
from collections import Counter
from functools import lru_cache
from itertools import pairwise

import pytest
import regex
import tqdm.std
from conftest import PAIRS, SHARED_DATA
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.datasets import load_dataset
from support.bpe import PATTERN, train_bpe
from support.tokenizer import Tokenizer


def merge(ids: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    merged, i = [], 0
    while i < len(ids):
        found = ids[i:i + 2] == pair
        merged.append(new if found else ids[i])
        i += 2 if found else 1
    return tuple(merged)


def train_slowly(texts, vocab_size: int, pattern: str = PATTERN) -> dict[bytes, int]:
    pieces = Counter(piece for text in texts for piece in regex.findall(pattern, text))
    words = {tuple(piece.encode("utf-8")): count for piece, count in pieces.items()}
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < vocab_size:
        pairs = Counter()
        for ids, count in words.items():
            for pair in pairwise(ids):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merged = Counter()
        for ids, count in words.items():
            merged[merge(ids, best, len(tokens))] += count
        words = merged
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return {token: rank for rank, token in enumerate(tokens)}


def encode_slowly(piece: bytes, ranks: dict[bytes, int]) -> tuple[int, ...]:
    """The trainer's own merges, one after the other, in the order in which they were made."""
    ids, tokens = tuple(piece), list(ranks)
    for new in range(256, len(tokens)):
        token = tokens[new]
        splits = [(ranks.get(token[:i]), ranks.get(token[i:])) for i in range(1, len(token))]
        for pair in splits:  # the pair that was merged is the one whose halves are older tokens
            if None not in pair and max(pair) < new:
                ids = merge(ids, pair, new)
    return ids


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text("aaab .[]é一丁🙂", max_size=60), max_size=12), st.integers(200, 330),
       st.sampled_from([PATTERN, r"(?s).+"]))
def test_merges_equal_the_slow_ones(texts, vocab_size, pattern):
    """Ties, runs of one token, repeated pieces, pieces as long as the text, and nothing left to merge."""
    slow = train_slowly(texts * 2, vocab_size, pattern)
    assert list(train_bpe(texts * 2, vocab_size, pattern).items()) == list(slow.items())


def test_by_hand():
    """`aaabdaaabac`, the textbook's word: aa, then ab (ties: lowest ids first), then aaab."""
    assert merge((1, 2, 1, 2, 2), (1, 2), 9) == (9, 9, 2) and merge((1, 1, 1), (1, 1), 9) == (9, 1)
    assert list(train_bpe(["aaabdaaabac"], 259))[256:] == [b"aa", b"ab", b"aaab"]
    # nothing left to merge
    assert train_bpe(["ab"], 300) == {bytes([i]): i for i in range(256)} | {b"ab": 256}
    assert len(train_bpe([], 300)) == len(train_bpe(["ab"], 0)) == 256


def test_punctuation_stands_alone():
    tokens = list(train_bpe(["(a)&(b)[a-z]"] * 100, 300))[256:]
    assert not [token for token in tokens if b")" in token or b"&" in token] and b"[a-z]" in tokens


def chinese(lines: int) -> list[str]:
    r = random.Random(0)
    return ["".join(chr(0x4e00 + int(2500 * r.random()**3)) for _ in range(95)) for _ in range(lines)]


def test_long_unspaced_pieces_are_quick():
    """A merge once recounted every line: 30 s for 1,500 lines of Chinese, half an hour for 100,000."""
    began = time.monotonic()
    assert len(train_bpe(chinese(1500), 512)) == 512
    assert time.monotonic() - began < 6
    few = chinese(15)
    assert train_bpe(few, 300) == train_slowly(few, 300)


def test_progress_is_shown_after_two_seconds(capsys, monkeypatch):
    """Training a vocabulary was a long silence."""
    train_bpe(chinese(15), 300)
    assert capsys.readouterr().err == ""
    clock = iter(range(10_000))
    monkeypatch.setattr(tqdm.std, "time", lambda: next(clock))  # every look at it takes a second
    train_bpe(chinese(15), 300)
    assert "training the vocabulary" in capsys.readouterr().err


@pytest.mark.parametrize("corpus", ["pairs", pytest.param("nlrx_synth", marks=pytest.mark.skipif(
    not SHARED_DATA.exists(), reason="the published files are not here"))])
def test_tiktoken_encodes_by_the_same_merges(corpus):
    texts = [text for pair in PAIRS for text in pair]
    if corpus == "nlrx_synth":
        rows = load_dataset(corpus, SHARED_DATA)
        texts = [text for e in [*rows.train, *rows.test] for text in (e.text, e.code)]
    tokenizer = Tokenizer(train_bpe(texts, 512))
    slow = lru_cache(None)(lambda piece: encode_slowly(piece, tokenizer.ranks))
    for text in texts:
        pieces = regex.findall(PATTERN, text)
        assert tokenizer.encode(text) == [i for piece in pieces for i in slow(piece.encode())]
    assert len(tokenizer.encode("lines with a vowel")) < len("lines with a vowel")
