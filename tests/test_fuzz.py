"""Files and answers of strangers: mutated ones of every kind end in a result or one clear line, in bounded
time and memory. 17 kinds of 150 cases each, and with `pytest -m slow` of 2,500."""
import json
import os
import sqlite3
import time
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import eval
import train
from experiments.compare import comparison, read_result
from model import Transformer
from support.files import BadInput
from support.runs import Run, read_score, run_summary
from support.tables import table, to_hex
from support.tokenizer import Tokenizer
from tasks import regexes
from tasks.datasets import read_jsonl
from tasks.scorers import final_answer, run_query

SECONDS = 5  # of one case, on a busy machine
HOSTILE = [None, True, -1, 0, 1, 2, 3.5, 1e308, 2**31, 2**63, 2**200, -(2**200), float("nan"), "", "x", "\n",
           "\ud800", "a/../b", "/etc/passwd", [], {}, [[]], {"": {}}, [1, "a", None], "9" * 30]
NOISE = [b"\x00", b"\xff" * 8, b"[" * 3000, b"9" * 5000, b"\n", b'"', b"\\ud800"]


@st.composite
def bytes_like(draw, samples: list[bytes]):
    """A sample with a few bytes changed, cut out, doubled or put in."""
    content = bytearray(draw(st.sampled_from(samples)))
    for _ in range(draw(st.integers(1, 4))):
        at, n = draw(st.integers(0, len(content))), draw(st.integers(0, 9))
        kind = draw(st.sampled_from(("put", "cut", "double", "end", "flip")))
        if kind == "put":
            content[at:at] = draw(st.binary(max_size=n) | st.sampled_from(NOISE))
        elif kind == "double":
            content[at:at] = content[at:at + 40 * n]
        elif kind == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        else:
            del content[at:at + n if kind == "cut" else None]
    return bytes(content)


@st.composite
def json_like(draw, samples: list):
    """A sample with a few values, at any depth, replaced, removed or renamed."""
    value = json.loads(json.dumps(draw(st.sampled_from(samples))))
    for _ in range(draw(st.integers(1, 3))):
        node = value
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if not isinstance(node[key], (dict, list)) or draw(st.integers(0, 3)) == 0:
                kind = draw(st.sampled_from(("replace", "replace", "remove", "rename")))
                if kind == "replace":
                    node[key] = deepcopy(draw(st.sampled_from(HOSTILE)))
                else:
                    old = node.pop(key)
                    if kind == "rename" and isinstance(node, dict):
                        node[draw(st.sampled_from(["", "x", "model_type", "\n"]))] = old
                break
            node = node[key]
    return value


def regex_like():
    pieces = st.sampled_from([*"ab.*+?|&~()[]{}^-\\,0129", "{7,}", "{0,9999}", "[a-z]", "[^a]", ".*", "\\b",
                              "(a|b)", "~(", "((a{7,}){7,}){7,}", "~" * 20, "(.*)(dog)(.*)", "\U0001f600"])
    return st.lists(pieces, max_size=14).map("".join)


def queries():
    words = ["SELECT", "*", "FROM", "t", "a", "b", ",", "WHERE", "1", "'x'", "(", ")", ";", "UNION", "ALL",
             "JOIN", "WITH RECURSIVE c(x) AS", "c", "x+1", "ORDER BY", "LIMIT",
             "ATTACH DATABASE 'other.db' AS o",
             "PRAGMA", "user_version", "= 5", "DROP TABLE", "DELETE", "INSERT INTO t VALUES (1,2)",
             "UPDATE t SET a = 1", "load_extension('m')", "randomblob(1000000000)", "zeroblob(9999)",
             "group_concat(a)", "printf('%999999d', 1)", "\x00", "é", "--", "/*", "VACUUM INTO 'v.db'",
             "CREATE TABLE z(a)", "SELECT x FROM c", "replace('aaaa', 'a', hex(zeroblob(9000)))"]
    return st.lists(st.sampled_from(words), min_size=1, max_size=14).map(" ".join) | st.text(max_size=30)


# ---- files -------------------------------------------------------------------------------------------------

JSONL = [b'{"text": "a dog", "code": "(dog)"}\n{"text": "b", "code": "c"}\n',
         b'{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},'
         b' {"role": "assistant", "content": "v"}]}\n'] * 2


@pytest.fixture
def run_folder(finished_run):
    """A whole run, with every file that one can have; tokenizer.json and an index are the others' ways."""
    model = Transformer.from_pretrained(finished_run)
    model.add_predictor("mlp", seed=0)
    model.save_pretrained(finished_run)
    (finished_run / "x.jsonl").write_bytes(JSONL[0])
    return finished_run


def write_tokenizer_json(folder):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(["lines with a dog"] * 3, trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.save(str(folder / "tokenizer.json"))


def read_examples(folder):
    return [(e.text, e.code) for e in read_jsonl(folder / "x.jsonl")]


def load(folder):
    return Transformer.from_pretrained(folder)


def tokens(folder):
    return Tokenizer.load(folder).encode("lines with a dog 9")


def summarize_and_begin_with_it(folder):
    """What a score and --init_from read of run.json."""
    data = SimpleNamespace(source="", files={}, train=[SimpleNamespace(system="")])
    run_summary(folder)
    train.describe_run(train.Config(init_from=str(folder)), data, torch.device("cpu"), 1)


def resume(folder):
    """From its checkpoint, as a process that opens the folder anew."""
    record = json.loads((folder / "run.json").read_text())
    with Run(folder, record, train.Config, train.FORMER) as run:
        model = Transformer.from_pretrained(folder)
        model.predictor = None
        run.restore(model, train.make_optimizer(model, train.Config()), 2)


FILES = {"x.jsonl": read_examples, "run.json": summarize_and_begin_with_it, "metrics.jsonl": run_summary,
         "state.pt": resume, "eval.json": lambda folder: comparison({"a": read_result(folder)}),
         **dict.fromkeys(("config.json", "model.safetensors", "model.safetensors.index.json",
                          "predictor.safetensors", "pred_embedding.safetensors"), load),
         "tokenizer.json": tokens}


def resident() -> int:
    """Bytes of memory that this process holds; 0 where /proc does not say."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if path.exists() else 0


def fuzz(strategy, check, n: int) -> None:
    """n cases; a case that raises, lasts, or takes more than 300 MiB for good, fails."""
    before = resident()

    @settings(max_examples=n, deadline=None, derandomize=n < 1000, database=None,
              suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(case):
        began = time.monotonic()
        check(case)
        assert time.monotonic() - began < SECONDS, case
    run()
    assert resident() - before < 300 << 20


N = pytest.mark.parametrize("n", [150, pytest.param(2500, marks=pytest.mark.slow)])


@N
@pytest.mark.parametrize("name", FILES)
def test_files(name, n, run_folder, monkeypatch):
    """Of data, of checkpoints, of runs."""
    monkeypatch.setattr(train, "git_commit", lambda: None)  # a process of its own
    if name == "tokenizer.json":
        pytest.importorskip("tokenizers")
        write_tokenizer_json(run_folder)
    if name == "model.safetensors.index.json":
        index = dict.fromkeys(train.trainable(Transformer.from_pretrained(run_folder)), "one.safetensors")
        (run_folder / "model.safetensors").rename(run_folder / "one.safetensors")
        (run_folder / name).write_text(json.dumps({"weight_map": {"model." + w: f for w, f in index.items()
                                                                  if not w.startswith("pred")}}))
    original, seen = (run_folder / name).read_bytes(), set()
    metrics = (run_folder / "metrics.jsonl").read_bytes()
    strategy = bytes_like(JSONL if name == "x.jsonl" else [original])
    if name.endswith(".json"):
        strategy |= json_like([json.loads(original)])

    def check(case):
        (run_folder / "metrics.jsonl").write_bytes(metrics)
        (run_folder / name).write_bytes(case if isinstance(case, bytes) else json.dumps(case).encode())
        try:
            FILES[name](run_folder)
            seen.add("taken")
        except BadInput as error:
            seen.add("refused")
            assert "\n" not in str(error), str(error)
    (run_folder / name).write_bytes(original)
    FILES[name](run_folder)  # as it is, it is taken
    fuzz(strategy, check, n)
    assert "refused" in seen, seen


def score(folder):
    eval.score_run(folder, eval.EvalOptions([str(folder)], device="cpu"))


SETTINGS = [f.name for f in fields(train.Config)]
NUMBERS = st.sampled_from([*HOSTILE, "mean", "three", "infonce"]) | st.integers() | st.floats()


@N
@pytest.mark.parametrize("name", ["run.json", "eval.json"])
def test_settings_and_verdicts(name, n, run_folder, monkeypatch):
    """Edited where nothing else gives it away: eval.json with as many verdicts as it has items."""
    monkeypatch.setattr(train, "git_commit", lambda: None)
    original, result = (json.loads((run_folder / file).read_text()) for file in (name, "eval.json"))
    metrics, taken = (run_folder / "metrics.jsonl").read_bytes(), []
    if n < 1000:
        monkeypatch.setattr(eval, "evaluate", lambda *_, **__: (dict(result), []))

    def check(case):
        config, rest, flags = case
        stored = original | rest | {"config": original["config"] | config}
        if name == "eval.json":
            stored |= {"n": len(flags), "items": dict.fromkeys(original["items"], to_hex(flags))}
        (run_folder / name).write_text(json.dumps(stored))
        for use in (summarize_and_begin_with_it, resume, score) if name == "run.json" else (
                lambda folder: table({"a": read_score(folder)}),
                lambda folder: comparison({"a": read_result(folder), "b": other | {"n": len(flags)}})):
            try:
                use(run_folder)
                taken.append(1)
            except (BadInput, OSError) as error:
                assert "\n" not in str(error), str(error)
            (run_folder / "metrics.jsonl").write_bytes(metrics)
            (run_folder / "eval.json").write_text(json.dumps(result)) if name == "run.json" else None
    other = read_result(run_folder)
    changes = st.dictionaries(st.sampled_from(SETTINGS), NUMBERS, max_size=3)
    fuzz(st.tuples(changes, st.dictionaries(st.sampled_from(sorted(original)), NUMBERS, max_size=1),
                   st.lists(st.booleans(), min_size=1, max_size=30)), check, n)
    assert taken


@N
def test_regexes(n):
    """Parsed or refused; compared within the seconds that are given, or not decided."""
    def check(pair):
        for regex in pair:
            try:
                regexes.parse(regex)
            except ValueError as error:
                assert "\n" not in str(error)
        try:
            regexes.equal(*pair, seconds=0.5)
        except ValueError:
            pass
    fuzz(st.tuples(regex_like(), regex_like()), check, n)


@pytest.mark.parametrize("regex", [
    "((a{7,}){7,}){7,}", "~" * 20 + "a", "~(" * 20 + "a" + ")" * 20, "((a|b)*a(a|b){30})&((a|b)*b(a|b){30})",
    "(" * 400 + "a" + ")" * 400, "((((.{0,999}){0,999}){0,999}){0,999})", "a{9999}" * 100])
def test_regexes_that_explode(regex):
    began = time.monotonic()
    try:
        regexes.equal(regex, regex + "a", seconds=1)
    except ValueError:
        pass
    assert time.monotonic() - began < 3


@N
def test_numbers_of_gsm8k(n):
    words = st.sampled_from(["####", "#", " ", "-", "$", "1", "18", "1,000", ".5", "9" * 300, "1e9", "\n",
                             "²", "٣", "NaN", ","])
    texts = st.lists(words, max_size=9).map("".join)

    def check(pair):
        assert final_answer(pair[0], "q", pair[1]) in (True, False)
    fuzz(st.tuples(texts, texts), check, n)


@N
def test_queries(n, tmp_path):
    """Read or refused; the database and its folder stay as they are."""
    path = tmp_path / "d.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t(a, b)")
        connection.executemany("INSERT INTO t VALUES (?, ?)", [(i, str(i)) for i in range(50)])
    connection.close()
    before = path.read_bytes()

    def check(query):
        found = run_query(path, query)
        assert found is None or isinstance(found[1], list)
    fuzz(queries(), check, n)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["d.sqlite"]
