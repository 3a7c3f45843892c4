"""tasks/nlrx.py: the same pairs on every machine, and like the published corpus."""
import hashlib
import itertools

import pytest
from conftest import SHARED_DATA

from tasks import nlrx
from tasks.datasets import read_jsonl
from tasks.nlrx import Rejected, every, generate


def test_generate_is_the_same_everywhere(corpus):
    assert corpus[:3] == [
        ("lines with a number before the string 'dog', 5 or more times", "([0-9]).*((dog){5,}).*"),
        ("lines with a character before a number followed by a letter", "(.).*([0-9].*[A-Za-z].*).*"),
        ("lines with the string 'dog' or a lower-case letter, 2 or more times", "((dog)|([a-z])){2,}"),
    ]
    digest = hashlib.sha256("\n".join(f"{text}\t{code}" for text, code in corpus).encode()).hexdigest()
    assert digest == "ca6f80f5305730939eb12e8869bd5016f4cd361ad43c1a4010575f2a17b6e16d"
    assert repr(corpus[:1]) in nlrx.__doc__


def test_the_seed_and_the_number(monkeypatch):
    """Another seed is another list; a shorter list is the beginning of a longer one."""
    monkeypatch.setattr(nlrx, "every", lambda drawing: [])
    monkeypatch.setattr(nlrx, "draw", lambda *args, **options: None)

    def texts(n, seed):
        numbers = itertools.count()
        monkeypatch.setattr(nlrx, "read", lambda tree: (f"lines {next(numbers)}", "x"))
        return [text for text, _ in generate(n, seed)]
    assert len(texts(9, 0)) == 9 and texts(9, 0)[:3] == texts(3, 0) != texts(3, 1) and texts(0, 0) == []


def test_every_lists_what_drawing_can_return():
    def drawing(pick):
        first = pick(("a", "b", "b", "b"))
        if first == "a" and pick((True, False)):
            raise Rejected
        return first, pick((1, 2)) if first == "b" else 0
    assert sorted(every(drawing)) == [(("a", 0), 1 / 8), (("b", 1), 3 / 8), (("b", 2), 3 / 8)]


def test_too_many_is_refused_in_one_line(monkeypatch):
    def reject(pick, max_depth, max_nodes):
        raise Rejected

    monkeypatch.setattr(nlrx, "draw", reject)
    with pytest.raises(ValueError, match="gave only 0 distinct texts, not 10000$"):
        generate(10_000)


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the published files are not here")
def test_generated_looks_like_published(corpus):
    """Shares of what stands in the codes within 2 points; about half of the texts are the very same."""
    pairs = {e.text: e.code for e in read_jsonl(SHARED_DATA / "synth_train.jsonl")}
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
