"""Files and answers of strangers: mutated ones of every kind end in a result or one clear line, in bounded
time and memory. 11 kinds of 150 cases each, and with `pytest -m slow` of 2,500: 27,500."""

import json
import os
import shutil
import sqlite3
import time
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config import Config
from support.files import BadInput, sha256
from model import ModelConfig, Transformer
from tasks import regexes
from tasks.datasets import read_jsonl
from experiments.compare import compare, comparison, read_result
from support.runs import RECORDED, VERSION, read_run, verify
from tasks.scorers import final_answer, run_query
from support.tokenizer import Tokenizer, train_bpe

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


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny checkpoint and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(train_bpe(["lines with a dog", "(dog){3,}"], 270))
    shape = {"dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 4, "ffn_dim": 8}
    model = Transformer(ModelConfig(tokenizer.vocab_size, **shape), k=1, seed=0)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def read_examples(folder):
    return [(e.text, e.code) for e in read_jsonl(folder / "x.jsonl")]


def load(folder):
    return Transformer.from_pretrained(folder)


def tokens(folder):
    return Tokenizer.load(folder).encode("lines with a dog 9")


def results(folder):
    table = comparison(compare({"a": read_result(folder)}))
    verify(folder)
    return table


@cache
def samples(name: str, folder) -> list:
    if name == "x.jsonl":
        return [
            b'{"text": "a dog", "code": "(dog)"}\n{"text": "b", "code": "c"}\n',
            b'{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},'
            b' {"role": "assistant", "content": "v"}]}\n',
        ] * 2
    if name == "run.json":
        return [{"version": VERSION, "config": asdict(Config()), "files": {"a": "b"}, "init": {},
                 **{field: "x" for field in RECORDED}}]
    if name == "eval.json":
        config = {"seed": 1, "lam": 1.0, "dataset": "d", "n_train": 0, "eval_split": "test"}
        return [{"config": config | {"match_flops": ""}, "test": "t", "n": 8,
                 "trained": {"examples": 1, "flops": 2, "seconds": 3.0}, "files": ["f"], "exact": 0.5,
                 "items": {"exact": "ff"}, "init": [], "dtype": "float32",
                 "sha256": {"config.json": sha256(folder / "config.json")}}]
    content = (folder / name).read_bytes()
    return [json.loads(content)] if name.endswith(".json") else [content]


FILES = [("x.jsonl", read_examples), ("config.json", load), ("model.safetensors", load),
         ("tokenizer.model", tokens), ("tokenizer.json", tokens), ("model.safetensors.index.json", load),
         ("run.json", read_run), ("eval.json", results)]


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
@pytest.mark.parametrize("name,use", FILES, ids=[name for name, _ in FILES])
def test_files(name, use, n, model_folder, tmp_path):
    """Of data, of checkpoints, of runs."""
    folder = tmp_path / "folder"
    shutil.copytree(model_folder, folder)
    if name == "tokenizer.json":
        pytest.importorskip("tokenizers")
        write_tokenizer_json(folder)
    if name == "model.safetensors.index.json":
        weights = list(Transformer.from_pretrained(folder).state_dict())
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        (folder / name).write_text(json.dumps({"weight_map": {w: "one.safetensors" for w in weights}}))
    if name in ("run.json", "eval.json"):
        for other in ("run.json", "eval.json"):
            (folder / other).write_text(json.dumps(samples(other, folder)[0]))
    given_samples, seen = samples(name, folder), set()
    is_json = not isinstance(given_samples[0], bytes)
    encoded = [json.dumps(s).encode() for s in given_samples] if is_json else given_samples
    strategy = bytes_like(encoded) | json_like(given_samples) if is_json else bytes_like(encoded)

    def check(case):
        (folder / name).write_bytes(case if isinstance(case, bytes) else json.dumps(case).encode())
        try:
            use(folder)
            seen.add("taken")
        except BadInput as error:
            seen.add("refused")
            assert "\n" not in str(error), str(error)
    fuzz(strategy, check, n)
    assert "refused" in seen, seen


def write_tokenizer_json(folder):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(["lines with a dog"] * 3, trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    (folder / "tokenizer.model").unlink()
    tokenizer.save(str(folder / "tokenizer.json"))


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
