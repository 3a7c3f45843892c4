"""eval.py: cached answers equal uncached ones, scores count what its docstring says, collapse is seen."""
import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from test_train import go, untimed

import eval
from data import ViewOptions, collate_fused, render_views
from eval import EvalOptions, analyse, answer_texts, collapse_report, embed_pairs, evaluate, score
from jepa_loss import dense_mask, gather
from model import KVCache
from support.distributed import pick_device
from support.files import BadInput, main_guard
from support.generation import Answer, generate, generate_slow
from support.geometry import alignment, linear_map_error, rank_me, uniformity
from support.tables import from_hex, table, to_hex
from tasks import datasets, nlrx, regexes
from tasks.datasets import Dataset, Example
from tasks.scorers import scorer_of

# ---- generation --------------------------------------------------------------------------------------------

def test_cached_answers_equal_uncached_ones(tiny, monkeypatch):
    """Float64; prompts of many lengths, answers that stop at many places. When more than half of a batch has
    stopped, its rows leave the cache, and the others go on as before. The cache grows, at 64 tokens."""
    model, g, dropped, keep = tiny(0), torch.Generator().manual_seed(1), [], KVCache.select
    monkeypatch.setattr(KVCache, "select", lambda cache, rows: dropped.append(len(rows)) or keep(cache, rows))
    prompts = [torch.randint(250, (n,), generator=g).tolist() for n in (1, 9, 2, 60, 17, 9, 4, 12, 5, 25)]
    free = [generate_slow(model, p, -1, 20).ids for p in prompts]
    # stops the most of them
    end = max({t for ids in free for t in ids}, key=lambda t: sum(t in ids for ids in free))
    slow = [generate_slow(model, prompt, end, 20) for prompt in prompts]
    assert len({len(answer.ids) for answer in slow}) > 2 and {a.stopped for a in slow} == {True, False}
    early = [i for i, answer in enumerate(slow) if answer.stopped] * 8
    prompts, slow = prompts + [prompts[i] for i in early], slow + [slow[i] for i in early]
    for batch_size in (3, 64):
        assert generate(model, prompts, end, 20, batch_size) == slow
    assert dropped


def test_limits_of_generation(tiny):
    """The model's context, what a prompt leaves of it, one limit for all, one for each."""
    model = tiny(0, max_seq_len=12)
    (answer,) = generate(model, [[1, 2, 3]], -1, 50)
    assert len(answer.ids) == 9 and not answer.stopped  # the context is full
    assert generate_slow(model, [1, 2, 3], -1, 50) == answer
    assert generate(model, [[1, 2, 3]], answer.ids[0], 5) == [Answer([], True)]  # empty, but an answer
    both = generate(model, [[1, 2, 3], list(range(10))], -1, 8)  # a long neighbour cuts no answer
    assert both[0].ids == answer.ids[:8] and both[1] == generate_slow(model, list(range(10)), -1, 2)
    prompts, limits = [[i, i + 1] for i in range(9)], [3, 1, 0, 7, 2, 1, 9, 4, 0]
    assert generate(model, prompts, -1, limits) == [
        generate_slow(model, p, -1, limit) for p, limit in zip(prompts, limits, strict=True)]


def test_a_prompt_that_fills_the_context_is_refused(tiny, tokenizer):
    with pytest.raises(BadInput, match="leaves no room"):
        answer_texts(tiny(0, max_seq_len=10), tokenizer, [Example("lines with a vowel and so on", "")], 5)


# ---- scores ------------------------------------------------------------------------------------------------

EXAMPLES = [Example("one", "(a)|(b)"), Example("two", "~(c)"), Example("three", "d{2,}"),
            Example("four", "e")]


def test_scores(monkeypatch):
    answers = ["(a)|(b)",  # exact
               "~(c) and more",  # prefix only
               "ddd*",  # the same language
               ""]  # empty: wrong
    scorer, leaked = scorer_of(Dataset("nlrx_synth", [], [], "file", {})), {("one", "(a)|(b)"), ("four", "x")}
    scores = score(EXAMPLES, answers, [True, False, True, True], leaked, scorer)
    items = {name: from_hex(flags, 4).tolist() for name, flags in scores.pop("items").items()}
    assert items == {"exact": [1, 0, 0, 0], "prefix": [1, 1, 0, 0], "stopped": [1, 0, 1, 1],
                     "dfa_equal": [1, 0, 1, 0]}
    assert scores == {"exact": 1 / 4, "prefix": 2 / 4, "stopped": 3 / 4, "exact_unseen": 0 / 3,
                      "dfa_equal": 2 / 4, "undecided": 0}
    assert "dfa_equal" not in score(EXAMPLES, answers, [True] * 4, set())
    assert score(EXAMPLES[:1], answers[:1], [True], {("one", "(a)|(b)")})["exact_unseen"] is None
    # undecided is wrong, and counted
    monkeypatch.setattr(regexes, "equal", lambda a, b: regexes.Verdict(None, None))
    scores = score(EXAMPLES[:2], ["a", "b"], [True] * 2, set(), scorer)
    assert scores["dfa_equal"] == 0 and scores["undecided"] == 2


def test_verdicts_survive_packing():
    for n in (1, 7, 8, 9, 2000):
        flags = (torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.5).int().tolist()
        assert from_hex(to_hex(flags), n).tolist() == flags


def test_evaluate(tiny, tokenizer, examples):
    split = Dataset("nlrx_turk", examples[:2], examples, "file", {})
    result, answers = evaluate(tiny(1), tokenizer, split, ViewOptions(), 8)
    assert result.keys() == {"exact", "prefix", "stopped", "exact_unseen", "dfa_equal", "undecided", "items",
                             "cos_paired", "cos_shuffled", "cos_gap", "retrieval_at_1", "rank_pred",
                             "rank_enc", "alignment", "uniformity_pred", "uniformity_enc", "p_end", "n",
                             "seconds", "test", "dataset", "source"}
    assert result["n"] == len(answers) == 5 and json.dumps(result)
    again, _ = evaluate(tiny(1), tokenizer, split, ViewOptions(), 8, n=3)
    assert again["n"] == 3 and again["test"] != result["test"]


def test_collapse_report_of_a_reversed_run(tiny, tokenizer):
    """What is predicted there is the text: pairs of one text are each other's hits, those of one code not."""
    split = Dataset("d", [], [Example("same", code) for code in ("a", "b", "c")], "file", {})
    hits = [evaluate(tiny(1), tokenizer, split, ViewOptions(reverse=reverse), 4)[0]["retrieval_at_1"]
            for reverse in (True, False)]
    assert hits[0] == 1 and hits[1] < 1


def test_table():
    lines = table({"a": {"exact": 0.5, "n": 20, "cos_paired": 0.99994}}).splitlines()
    assert lines[0].split("|")[1].strip() == "model" and set(lines[1]) == {"|", "-"}
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["a", "50.00", "0.9999", "20"]  # columns that nobody has are left out
    both = table({"a": {"exact": 0.5}, "b": {"ntp": 1.5}}).splitlines()[2:]
    assert [line.split() for line in both] == ["| a | 50.00 | - |".split(), "| b | - | 1.5000 |".split()]


# ---- embeddings --------------------------------------------------------------------------------------------

def test_embed_pairs(tiny, tokenizer, examples):
    """In chunks, and from three passes: what the fused pass embeds."""
    model, o = tiny(2), ViewOptions(2)
    batch = collate_fused([render_views(e, tokenizer, o) for e in examples], [True] * 5)
    hidden = model(batch.ids, batch.positions, dense_mask(batch.segment, batch.parent))
    for found, at in zip(embed_pairs(model, tokenizer, examples, o, chunk=2), (batch.pred_at, batch.enc_at),
                         strict=True):
        torch.testing.assert_close(found, gather(hidden, at), atol=1e-10, rtol=0)


@pytest.mark.parametrize("flags", ["--pool mean", "--predictor linear", "--pred_first", "--view_end",
                                   "--reverse"])
def test_enc_text_is_text_seen_alone(small_run, tmp_path, flags):
    """By one more forward, by hand: pooled as the run pools, without [PRED] and without a learned head."""
    go(small_run, *flags.split(), "--out", tmp_path / "run")
    o = EvalOptions(device="cpu")
    text, *_ = eval.embed_run(tmp_path / "run", o)
    model, tokenizer, _, c = eval.load_model(tmp_path / "run", o)
    role, said = ("assistant", "code") if c.reverse else ("user", "text")
    for e, found in zip(list(eval.load(c).test)[:3], text, strict=False):
        f = tokenizer.format
        hidden = model(torch.tensor([[*f.start, *f.opening[role], *tokenizer.encode(getattr(e, said))]]))[0]
        torch.testing.assert_close(found, hidden.mean(0) if c.pool == "mean" else hidden[-1])


def test_collapse_report():
    torch.manual_seed(0)
    x = torch.randn(60, 16, dtype=torch.float64)
    codes = [str(i) for i in range(60)]
    healthy = collapse_report(x, x + 0.01 * torch.randn_like(x), codes)
    assert healthy["cos_paired"] > 0.99 and abs(healthy["cos_shuffled"]) < 0.2
    assert healthy["retrieval_at_1"] == 1 and healthy["rank_pred"] > 14
    assert healthy["cos_gap"] == healthy["cos_paired"] - healthy["cos_shuffled"]
    line = torch.ones(60, 16) + 1e-4 * torch.randn(60, 16)
    dead = collapse_report(line, line.roll(7, 0), codes)
    assert dead["cos_paired"] > 0.999 and abs(dead["cos_gap"]) < 1e-3  # the cosine alone looks perfect
    assert dead["retrieval_at_1"] < 0.2 and dead["rank_pred"] < 1.1
    # an identical Code is a hit, and no mismatched pair
    assert collapse_report(line, line.roll(7, 0), ["same"] * 60)["retrieval_at_1"] == 1
    two = torch.eye(2)[torch.tensor([0, 0, 0, 1, 1])]
    classes = collapse_report(two, two, ["good", "good", "good", "bad", "bad"])
    assert (classes["cos_paired"], classes["cos_shuffled"], classes["retrieval_at_1"]) == (1, 0, 1)


def test_rank_me_by_hand():
    assert rank_me(torch.eye(5)) == pytest.approx(5, abs=1e-4)
    assert rank_me(torch.ones(5, 7)) == pytest.approx(1, abs=1e-4)


def test_uniformity_and_alignment_by_hand():
    x = torch.tensor([[1.0, 0], [0, 2], [-3, 0]])
    y = torch.tensor([[5.0, 0], [1, 0], [0, 1]])
    assert alignment(x, y) == pytest.approx((0 + 2 + 2) / 3)
    assert uniformity(x) == pytest.approx(math.log((math.exp(-4) * 2 + math.exp(-8)) / 3))
    assert uniformity(x[:1].repeat(4, 1)) == pytest.approx(0)


def test_error_of_a_linear_map():
    """Nothing for an affine function, little more than the noise's share with noise, 1 and more for
    mismatched pairs."""
    g = torch.Generator().manual_seed(0)
    x, matrix = torch.randn(2000, 16, generator=g), torch.randn(16, 16, generator=g)
    y = x @ matrix + 5
    assert linear_map_error(x, y) < 1e-9
    noise = torch.randn(2000, 16, generator=g) * y.std(0)
    assert linear_map_error(x, y + noise) == pytest.approx(0.5, abs=0.03)
    assert 1 < linear_map_error(x, y.roll(-1, 0)) < 1.1
    collapsed = x[:1] + 1e-3 * x[:, :2] @ torch.randn(2, 16, generator=g)  # two directions are left
    assert linear_map_error(collapsed, y) == pytest.approx(14 / 16, abs=0.15)


def test_analysis_of_a_constant_shift():
    """Enc(Code) = Enc(Text) + c: one singular value, rank 1, a perfect linear map."""
    g = torch.Generator().manual_seed(0)
    text = torch.randn(100, 8, generator=g)
    found = analyse(text, text, text + 2, [str(i) for i in range(100)])
    assert found["singular_values"][0] == pytest.approx(2 * (100 * 8) ** 0.5, rel=1e-5)
    assert found["singular_values"][1] < 1e-4 and found["rank_difference"] == pytest.approx(1, abs=1e-3)
    assert found["linear_error"] < 1e-9 and found["linear_error_shuffled"] > 0.9
    assert found["spread_text"] == pytest.approx(found["spread_enc"]) == pytest.approx(8**0.5, rel=0.1)
    few = analyse(text[:18], text[:18], text[:18] + 2, ["x"] * 18)  # to fit a map of width 8
    assert few["linear_error"] is few["linear_error_shuffled"] is None and few["rank_difference"] < 1.01


def test_centred_columns_see_through_a_constant():
    """A large vector that all share hides rank, cosine and neighbours from the plain columns alone."""
    g = torch.Generator().manual_seed(0)
    x, shared = torch.randn(100, 8, generator=g), torch.full((8,), 1e4)
    found = analyse(x, x + shared, x + shared, [str(i) for i in range(100)])
    assert found["rank_enc"] < 1.01 and found["rank_enc_centred"] > 7.5 and found["rank_text"] > 7.5
    assert found["cos_shuffled"] > 0.999 and abs(found["cos_shuffled_centred"]) < 0.2
    assert found["cos_paired_centred"] == pytest.approx(1, abs=1e-3) and found["retrieval_at_1_centred"] == 1


# ---- the program -------------------------------------------------------------------------------------------

@pytest.fixture
def program(monkeypatch, capsys):
    """A function (arguments) -> what eval.py prints; a mistake is SystemExit, as in the program."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
        capsys.readouterr()
        with main_guard():
            eval.main()
        return capsys.readouterr().out
    return run


def test_what_a_finished_run_is_asked(finished_run, program):
    """Its score again, its embeddings, an answer, another dataset."""
    own = json.loads((finished_run / "eval.json").read_text())
    shown = program(finished_run)
    assert untimed(json.loads((finished_run / "eval.json").read_text())) == untimed(own)
    assert shown.count("\n|") == 3 and "| exact |" in shown
    before = (finished_run / "eval.json").read_text()
    program(finished_run, "--max_new_tokens", 2)  # another limit's score is shown, not kept
    assert (finished_run / "eval.json").read_text() == before
    assert "| spread_enc |" in program(finished_run, "--embeddings")
    found = json.loads((finished_run / "embeddings.json").read_text())
    assert found["n"] == 12 and len(found["singular_values"]) == 12 and found["linear_error"] is None
    assert all(found[name] == pytest.approx(own[name]) for name in ("cos_paired", "rank_pred", "rank_enc"))
    assert found["rank_text"] != pytest.approx(found["rank_pred"])  # without a predictor
    with pytest.raises(BadInput, match="--data_dir has no effect with .*, a run on .*train.jsonl"):
        eval.score_run(finished_run, EvalOptions(data_dir="elsewhere"))
    answer = program(finished_run, "--prompt", "the number 3", "--max_new_tokens", 2)
    assert answer.endswith(" ... (did not stop)\n") and len(answer) < 100
    c = json.loads((finished_run / "run.json").read_text())["config"]
    other = program(finished_run, "--dataset", c["dataset"], "--test_file", c["test_file"], "--n_test", 3)
    assert other.rstrip().endswith("| 3 |")
    for arguments in (["--prompt", ""], ["--prompt", "a", "--system", "b"]):
        with pytest.raises(SystemExit):
            program(finished_run, *arguments)


def test_scores_in_bfloat16(finished_run, chat_folder):
    """Weights and cache are bfloat16, of models of transformers too; scores are close to float32's, and do
    not take their place in eval.json."""
    before, half = (finished_run / "eval.json").read_text(), EvalOptions(dtype="bfloat16", device="cpu")
    result = eval.score_run(finished_run, half)
    assert (finished_run / "eval.json").read_text() == before
    assert result["p_end"] == pytest.approx(json.loads(before)["p_end"], abs=1e-3)
    assert result["p_end"] != json.loads(before)["p_end"]
    for backend in ("ours", "transformers"):
        model, *_ = eval.load_model(chat_folder, replace(half, prompt="a", backend=backend, format="llama3"))
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        assert all(buffer.dtype == torch.float32 for buffer in model.buffers())
        prompts = [[5, 6, 7], [8, 9]]
        assert [len(answer.ids) for answer in generate(model, prompts, -1, 70)] == [70, 70]


def test_other_data_only_when_told(mirror, small_run, tmp_path, monkeypatch):
    """Generated and published data are never mixed up: a run is scored on its own files, unless told."""
    monkeypatch.setattr(nlrx, "generate", lambda n, seed: [(f"text {i}", f"code {i}") for i in range(60)])
    monkeypatch.setattr(datasets.generated_files, "__defaults__", (50, 10))
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    go(small_run[4:], "--data_dir", tmp_path / "mine", "--out", run)
    own = (run / "eval.json").read_text()
    result = eval.score_model(run, EvalOptions(dataset="nlrx_synth", max_new_tokens=4))
    assert result["test"] == json.loads(own)["test"]
    assert not (tmp_path / "data").exists()  # a run's own data_dir is the default
    with pytest.raises(BadInput, match="trained on generated data, but .*--other_data"):
        eval.score_run(run, EvalOptions(data_dir=str(mirror)))
    assert eval.score_run(run, EvalOptions(data_dir=str(mirror), other_data=True))["n"] == 1
    assert json.loads((run / "eval_on_published.json").read_text())["source"] == "published"
    assert (run / "eval.json").read_text() == own


@pytest.mark.parametrize("arguments,message", [
    ("nowhere", "run.json: no such file; --dataset scores a model that is no run"),
    ("nowhere --prompt a", "config.json: no such file"),
    ("", "required: MODEL"), ("x --prom a", "unrecognized arguments: --prom"),
    ("x --prompt a --data_dir b", "--data_dir has no effect with --prompt a"),
    ("x --dataset a.jsonl", "a dataset of your own needs --test_file"),
    ("x --dataset b --other_data --system c", "--system has no effect without --prompt; --other_data has no"),
    ("x --dataset gsm8k --scorer regex", "--scorer has no effect with --dataset gsm8k"),
    ("x --format plain", "--format has no effect without --dataset"),
    ("x --embeddings --max_new_tokens 5 --dataset b", "--max_new_tokens has no effect with --embeddings")])
def test_wrong_arguments(arguments, message, program, capsys):
    with pytest.raises(SystemExit) as status:
        program(*arguments.split())
    error = capsys.readouterr().err
    assert status.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there():
    with pytest.raises(BadInput, match="--device cuda: not available here"):
        pick_device("cuda")
