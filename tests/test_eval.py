"""eval.py: cached answers equal uncached ones, and every score counts what its docstring says."""
import json

import pytest
import torch

from data import Dataset, Example
from eval import Answer, answer_texts, evaluate, generate, generate_slow, same_language, score, table
from files import BadInput


@pytest.mark.parametrize("batch_size", [3, 64])
def test_cached_answers_equal_uncached_ones(tiny, batch_size):
    """Float64; prompts of many lengths, answers that stop at many places (so that rows are dropped on the
    way)."""
    model, g = tiny(0), torch.Generator().manual_seed(1)
    prompts = [torch.randint(250, (n,), generator=g).tolist() for n in (1, 9, 2, 30, 17, 9, 4, 12, 5, 25)]
    free = [generate_slow(model, p, -1, 20).ids for p in prompts]
    # stops the most of them
    end = max({t for ids in free for t in ids}, key=lambda t: sum(t in ids for ids in free))
    slow = [generate_slow(model, prompt, end, 20) for prompt in prompts]
    assert generate(model, prompts, end, 20, batch_size) == slow
    assert len({len(answer.ids) for answer in slow}) > 2 and {answer.stopped for answer in slow} == {True,
                                                                                                     False}


def test_limits_of_generation(tiny):
    model = tiny(0, max_seq_len=10)
    (answer,) = generate(model, [[1, 2, 3]], -1, 50)
    assert len(answer.ids) == 7 and not answer.stopped  # the context is full
    slow = generate_slow(model, [1, 2, 3], -1, 7)
    assert slow == answer
    first = slow.ids[0]
    assert generate(model, [[1, 2, 3]], first, 5) == [Answer([], True)]  # an empty answer is an answer


def test_a_prompt_that_fills_the_context_is_refused(tiny, tokenizer):
    with pytest.raises(BadInput, match="leaves no room"):
        answer_texts(tiny(0, max_seq_len=10), tokenizer, ["lines with a vowel and so on"], 5)


EXAMPLES = [Example("one", "(a)|(b)"), Example("two", "~(c)"), Example("three", "d{2,}"),
            Example("four", "e")]


def test_scores():
    answers = ["(a)|(b)",  # exact
               "~(c) and more",  # prefix only
               "ddd*",  # the same language
               ""]  # empty: wrong
    scores = score(EXAMPLES, answers, [True, False, True, True], {("one", "(a)|(b)"), ("four", "x")},
                   is_regex=True)
    assert scores == {"exact": 1 / 4, "prefix": 2 / 4, "stopped": 3 / 4, "exact_unseen": 0 / 3,
                      "dfa_equal": 2 / 4,
                      "dfa_undecided": 0}
    assert "dfa_equal" not in score(EXAMPLES, answers, [True] * 4, set())
    assert score(EXAMPLES[:1], answers[:1], [True], {("one", "(a)|(b)")})["exact_unseen"] is None


@pytest.mark.parametrize("answer,same", [
    ("(b)|(a)", True), ("a|b", True), ("(a)|(b)|(a)", True), ("~(~((a)|(b)))", True), (" (a)|(b)", False),
    ("(a)|(b", False), ("", False), ("(a)|(b)(a)|(b)", False), (")(" * 2000, False), ("(" * 10**5, False)])
def test_same_language(answer, same):
    """An answer that does not parse is wrong, never an error."""
    assert same_language(answer, "(a)|(b)") is same


def test_evaluate(tiny, tokenizer, examples):
    data = Dataset("d", examples[:2], examples, "file", {}, is_regex=True)
    options = dict(k=1, ntp_on="all", train_eos=True, pred_first=False, reverse=False)
    result, answers = evaluate(tiny(1), tokenizer, data, options, 8)
    assert result.keys() == {"exact", "prefix", "stopped", "exact_unseen", "dfa_equal", "dfa_undecided",
                             "cos_paired",
                             "cos_shuffled", "cos_gap", "retrieval_at_1", "rank_pred", "rank_enc", "n",
                             "seconds",
                             "dataset", "source"}
    assert result["n"] == len(answers) == 5 and json.dumps(result)
    again, _ = evaluate(tiny(1), tokenizer, data, options, 8, n=3)
    assert again["n"] == 3


def test_table():
    lines = table({"a": {"exact": 0.5, "n": 20, "cos_paired": 0.99994}}).splitlines()
    assert lines[0].split("|")[1].strip() == "run" and set(lines[1]) == {"|", "-"}
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["a", "50.00", "-", "-", "-", "-", "0.9999", "-", "-", "20"]
