"""eval.py: cached answers equal uncached ones, and every score counts what its docstring says."""
import hashlib
import json

import pytest
import torch

import data
from tasks import regexes as derivatives
import eval
from tasks import nlrx
import train
from data import Dataset, Example
from eval import Answer, answer_texts, evaluate, generate, generate_slow, score, table
from support.files import BadInput, main_guard
from model import KVCache
from tasks.datasets import PUBLISHED
from experiments.compare import from_hex
from tasks.scorers import scorer_of


@pytest.mark.parametrize("batch_size", [3, 64])
def test_cached_answers_equal_uncached_ones(tiny, batch_size):
    """Float64; prompts of many lengths, answers that stop at many places."""
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
        answer_texts(tiny(0, max_seq_len=10), tokenizer, [Example("lines with a vowel and so on", "")], 5)


EXAMPLES = [Example("one", "(a)|(b)"), Example("two", "~(c)"), Example("three", "d{2,}"),
            Example("four", "e")]


def test_scores():
    answers = ["(a)|(b)",  # exact
               "~(c) and more",  # prefix only
               "ddd*",  # the same language
               ""]  # empty: wrong
    scores = score(EXAMPLES, answers, [True, False, True, True], {("one", "(a)|(b)"), ("four", "x")},
                   scorer_of("nlrx_synth", "data"))
    items = {name: from_hex(flags, 4).tolist() for name, flags in scores.pop("items").items()}
    assert items == {"exact": [1, 0, 0, 0], "prefix": [1, 1, 0, 0], "stopped": [1, 0, 1, 1],
                     "dfa_equal": [1, 0, 1, 0]}
    assert scores == {"exact": 1 / 4, "prefix": 2 / 4, "stopped": 3 / 4, "exact_unseen": 0 / 3,
                      "dfa_equal": 2 / 4, "undecided": 0}
    assert "dfa_equal" not in score(EXAMPLES, answers, [True] * 4, set())
    assert score(EXAMPLES[:1], answers[:1], [True], {("one", "(a)|(b)")})["exact_unseen"] is None


def test_evaluate(tiny, tokenizer, examples):
    split = Dataset("nlrx_turk", examples[:2], examples, "file", {})
    options = dict(k=1, ntp_on="all", train_eos=True, pred_first=False, reverse=False)
    result, answers = evaluate(tiny(1), tokenizer, split, options, 8)
    assert result.keys() == {"exact", "prefix", "stopped", "exact_unseen", "dfa_equal", "undecided",
                             "cos_paired",
                             "cos_shuffled", "cos_gap", "retrieval_at_1", "rank_pred", "rank_enc", "n",
                             "seconds", "items", "test",
                             "dataset", "source"}
    assert result["n"] == len(answers) == 5 and json.dumps(result)
    again, _ = evaluate(tiny(1), tokenizer, split, options, 8, n=3)
    assert again["n"] == 3


def test_table():
    lines = table({"a": {"exact": 0.5, "n": 20, "cos_paired": 0.99994}}).splitlines()
    assert lines[0].split("|")[1].strip() == "model" and set(lines[1]) == {"|", "-"}
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["a", "50.00", "0.9999", "20"]  # columns that nobody has are left out
    both = table({"a": {"exact": 0.5}, "b": {"ntp": 1.5}}).splitlines()[2:]
    assert [line.split() for line in both] == ["| a | 50.00 | - |".split(), "| b | - | 1.5000 |".split()]


def test_rows_are_dropped_on_the_way(tiny, monkeypatch):
    """More than half of the answers are short: their rows leave the cache, and the others go on as before."""
    model, dropped = tiny(0), []
    select = KVCache.select
    monkeypatch.setattr(KVCache, "select", lambda self, rows: dropped.append(len(rows)) or select(self, rows))
    prompts = [[i, i + 1] for i in range(40)]
    free = [generate_slow(model, p, -1, 20).ids for p in prompts]
    ends = [(sum(end in ids[:5] for ids in free), end) for end in range(250)]
    end = next(e for n, e in sorted(ends, reverse=True) if n < 40)
    chosen = [p for p, ids in zip(prompts, free, strict=True) if end in ids[:5]]
    chosen += [p for p in prompts if p not in chosen][:max(1, len(chosen) - 2)]
    assert generate(model, chosen, end, 20) == [generate_slow(model, p, end, 20) for p in chosen]
    assert dropped


def test_a_long_neighbour_cuts_no_answer(tiny):
    """Each row has the room that its own prompt leaves in the context."""
    model = tiny(0, max_seq_len=32)
    prompts = [[1, 2, 3], list(range(30))]
    assert generate(model, prompts, -1, 20) == [generate_slow(model, p, -1, 20) for p in prompts]
    assert [len(answer.ids) for answer in generate(model, prompts, -1, 20)] == [20, 2]


def test_each_prompt_may_have_its_own_limit(tiny):
    """Rows that are done leave the batch, the others go on."""
    model, prompts, limits = tiny(0), [[i, i + 1] for i in range(9)], [3, 1, 0, 7, 2, 1, 20, 4, 0]
    assert generate(model, prompts, -1, limits) == [
        generate_slow(model, p, -1, limit) for p, limit in zip(prompts, limits, strict=True)]


def test_undecided_is_wrong_and_counted(monkeypatch):
    monkeypatch.setattr(derivatives, "equal", lambda a, b: derivatives.Verdict(None, None))
    scores = score(EXAMPLES[:2], ["a", "b"], [True] * 2, set(), scorer_of("nlrx_synth", "data"))
    assert scores["dfa_equal"] == 0 and scores["undecided"] == 2


def test_collapse_report_of_a_reversed_run(tiny, tokenizer):
    """What is predicted there is the text: pairs of one text are each other's hits, those of one code not."""
    options = dict(k=1, ntp_on="all", train_eos=True, pred_first=False)
    split = Dataset("d", [], [Example("same", code) for code in ("a", "b", "c")], "file", {})
    hits = [evaluate(tiny(1), tokenizer, split, options | dict(reverse=reverse), 4)[0]["retrieval_at_1"]
            for reverse in (True, False)]
    assert hits[0] == 1 and hits[1] < 1


def run_folder(tmp_path, data_dir):
    """A finished run of three steps on the generated nlrx_synth."""
    c = train.parse_config(["--data_dir", str(data_dir), "--dim", "16", "--n_layers", "1", "--n_heads", "1",
                            "--ffn_dim", "16", "--max_steps", "3", "--max_new_tokens", "3", "--n_train", "50",
                            "--out", str(tmp_path / "run")])
    train.train(c)
    return tmp_path / "run"


def test_other_data_only_when_told(tmp_path, monkeypatch, capsys):
    """Generated and published data are never mixed up: a run is scored on its own files, unless told."""
    monkeypatch.setattr(nlrx, "generate", lambda n, seed: [(f"text {i}", f"code {i}") for i in range(60)])
    monkeypatch.setattr(data.generated_files, "__defaults__", (50, 10))
    run = run_folder(tmp_path, tmp_path / "data")
    own = (run / "eval.json").read_text()
    result = eval.score_checkpoint(run, "nlrx_synth", max_new_tokens=3)  # its own data_dir, not "data"
    assert result["test"] == json.loads(own)["test"]
    other = tmp_path / "other"
    other.mkdir()
    files = {}
    for split in ("train", "test"):
        content = "\n".join(json.dumps({"text": f"{split} {i}", "code": "x"}) for i in range(60)).encode()
        (other / f"{split}.jsonl").write_bytes(content)
        files[split] = (f"{split}.jsonl", hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())
    monkeypatch.setitem(PUBLISHED, "nlrx_synth", files)
    with pytest.raises(BadInput, match="trained on generated data, but .*--other_data"):
        eval.score_run(run, str(other))
    assert eval.score_run(run, str(other), other_data=True)["n"] == 60
    assert json.loads((run / "eval_on_published.json").read_text())["source"] == "published"
    assert (run / "eval.json").read_text() == own


@pytest.mark.parametrize("arguments,message", [
    (["nowhere"], "run.json: no such file"), ([], "required: MODEL"), (["x", "--prom", "a"], "unrecognized"),
    (["x", "--max_new_tokens", "0"], "must be at least 1"),
    (["x", "--prompt", "a", "--data_dir", "b"], "--data_dir: no effect with --prompt a"),
    (["x", "--prompt", "a", "--dataset", "b"], "--dataset: no effect with --prompt a"),
    (["x", "--dataset", "nlrx_synth", "--test_file", "b"], "--test_file: no effect with --data"),
    (["x", "--dataset", "a.jsonl", "--data_dir", "b"], "--data_dir: no effect with --dataset a.jsonl"),
    (["x", "--dataset", "a.jsonl"], "a dataset of your own needs --test_file"),
    (["nowhere"], "run.json: no such file; --dataset scores a model that is no run"),
    (["x", "--dataset", "b", "--other_data", "--system", "c"], "--other_data, --system: no effect"),
    (["x", "--n_test", "5"], "--n_test: no effect without --dataset"),
    (["x", "y", "--device", "cpu", "--other_data"], "--other_data, --device: no effect with stored scores"),
    (["x", "--embeddings", "--max_new_tokens", "5"], "--max_new_tokens: no effect with --embeddings"),
    (["x", "--plot", "y"], "--plot: no effect without"),
    (["x", "--dataset", "nlrx_synth", "--n_test", "0"], "--n_test 0: must be at least 1"),
    (["nowhere", "--prompt", "a"], "config.json: no such file")])
def test_wrong_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["eval.py", *arguments])
    with pytest.raises(SystemExit) as status, main_guard():
        eval.main()
    error = capsys.readouterr().err
    assert status.value.code == 2 and message in error and error.count("\n") == 1


def test_damaged_run_folders(tmp_path):
    (tmp_path / "run.json").write_text('{"config": {}}')
    with pytest.raises(BadInput, match="not written by this program"):
        eval.load_run(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there():
    with pytest.raises(BadInput, match="--device cuda: not available here"):
        eval.pick_device("cuda")
