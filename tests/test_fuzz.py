"""Files and answers of strangers: mutated ones of every kind, pipes, devices, links, and files and settings
that fill memory or time. A result or one clear line, in bounded time and memory. 15 kinds have 150 mutated
cases each, and with `pytest -m slow` 2,500."""
import json
import os
import re
import sqlite3
import time
from copy import deepcopy
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from conftest import json_tokenizer, jsonl, peak, resident
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import eval
import train
from data import fit
from experiments.compare import comparison, read_result
from model import Transformer
from support.chat import cut_template
from support.files import BadInput, main_guard, parse_json, printable
from support.runs import Run, read_metrics, read_score, run_summary
from support.tables import markdown, table, to_hex
from support.tokenizer import Tokenizer, byte_letters, read_tokenizer_json
from tasks import regexes
from tasks.datasets import read_jsonl
from tasks.scorers import run_query

SECONDS = 5  # of one case, on a busy machine
HOSTILE = [None, True, -1, 0, 1, 2, 3.5, 1e308, 10**9, 2**31, 2**63, 2**200, -(2**200), float("nan"), "", "x",
           "\n", "\ud800", "a/../b", "/etc/passwd", [], {}, [[]], {"": {}}, [1, "a", None], "9" * 30]
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


FILES = {"x.jsonl": lambda folder: list(read_jsonl(folder / "x.jsonl")), "metrics.jsonl": run_summary,
         "eval.json": lambda folder: comparison({"a": read_result(folder)}), "state.pt": resume,
         "run.json": summarize_and_begin_with_it, "tokenizer.json": tokens,
         **dict.fromkeys(("config.json", "model.safetensors", "model.safetensors.index.json",
                          "predictor.safetensors", "pred_embedding.safetensors"), load)}


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
        json_tokenizer("smollm2", run_folder)
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
    for setting in ("k", "layer", "n_train", "distance", "dataset", "test_file", "compile"):
        for value in HOSTILE:
            check(({setting: value}, {}, [True]))
    changes = st.dictionaries(st.sampled_from(SETTINGS), NUMBERS, max_size=3)
    fuzz(st.tuples(changes, st.dictionaries(st.sampled_from(sorted(original)), NUMBERS, max_size=1),
                   st.lists(st.booleans(), min_size=1, max_size=30)), check, n)
    assert taken


@N
def test_regexes(n):
    """Parsed or refused; compared within the seconds that are given, or not decided; never unlike itself."""
    def check(pair):
        for other in pair:
            try:
                assert regexes.equal(pair[0], other, seconds=0.5).equal is not False or other != pair[0]
            except ValueError as error:
                assert "\n" not in str(error).replace(pair[0], "").replace(other, "")
    fuzz(st.tuples(regex_like(), regex_like()), check, n)


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


# ---- work and memory without bound -------------------------------------------------------------------------

def refused(use, *arguments) -> str:
    """What use(...) is refused with: one line, in 5 s, that is no page."""
    began = time.monotonic()
    with pytest.raises(BadInput) as error:
        use(*arguments)
    message = str(error.value)
    assert time.monotonic() - began < SECONDS
    assert message.isprintable() and len(message) < 600, message
    return message


# ---- files that are none -----------------------------------------------------------------------------------

READERS = FILES | dict.fromkeys(
    ("tokenizer_config.json", "special_tokens_map.json", "vocab.json"), tokens) | {
        "chat_template.jinja": cut_template}
NOT_WHOLE = {name for name in FILES if name.endswith((".safetensors", ".jsonl", ".pt"))}  # of any size
KINDS = {"a pipe": os.mkfifo, "endless": lambda path: path.symlink_to("/dev/zero"), "a folder": os.mkdir,
         "huge": lambda path: (path.touch(), os.truncate(path, 1 << 40))}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_named(name, kind, run_folder, monkeypatch):
    """A pipe hung, an endless device filled the memory, and so did a huge file."""
    monkeypatch.setattr(train, "git_commit", lambda: None)
    (run_folder / name).unlink(missing_ok=True)
    if name == "model.safetensors.index.json":
        (run_folder / "model.safetensors").unlink()
    KINDS[kind](run_folder / name)
    message = refused(READERS[name], run_folder)
    assert message.startswith(str(run_folder / name)) or "metrics.jsonl" in message and name == "state.pt"
    if kind != "huge" or name not in NOT_WHOLE:
        assert re.search({"huge": "bytes; at most", "endless": "regular file|a link"}.get(
            kind, "not a regular file"), message)


def test_a_link_brings_no_secret_into_a_run(chat_folder, tmp_path):
    """A tokenizer's side files are copied: a link that leads elsewhere brought its target along. In Hugging
    Face's cache, files are links to blobs."""
    base, blobs = tmp_path / "models--x" / "snapshots" / "1", tmp_path / "models--x" / "blobs"
    base.mkdir(parents=True), blobs.mkdir()
    for number, path in enumerate(sorted(chat_folder.iterdir())):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (base / path.name).symlink_to(f"../../blobs/{number}")
    Tokenizer.load(base, format="llama3").save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (chat_folder / "tokenizer.json").read_bytes()
    (tmp_path / "secret").write_text("mine")
    (base / "vocab.json").symlink_to(tmp_path / "secret")
    assert "vocab.json: a link out of its folder" in refused(Tokenizer.load, base)


@pytest.mark.parametrize("content,what", [
    (b'{"text": "' + b"a" * (100 << 20) + b'", "code": "c"}', "longer than"),
    (b'{"text": [' + b"[]," * (2 << 20) + b'[]], "code": "c"}', "more than 1,500,000 values")])
def test_a_long_line(content, what, tmp_path):
    """It took 36 times its size before it was refused."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a", "code": "c"}\n' + content)
    assert peak(lambda: what in refused(read_jsonl, path) or 1 / 0) < 300 << 20


@pytest.mark.parametrize("value", [b"[]", b"{}", b'"ab"', b"9.5", b'{"a": 1}', b'"k%d": 999'])
def test_json_that_fills_the_memory(value):
    """Whatever the values are, and though one letter makes all take four bytes."""
    n = min((23 << 20) // (len(value) + 4), 1_490_000 // (1 + sum(map(value.count, b":[{"))))
    many = b",".join([value] * n) if b"%" not in value else b",".join(value % i for i in range(n))
    content = (b'{"x": {%s}, "y": "%s"}' if b"%" in value else b'{"x": [%s], "y": "%s"}') % (
        many, "\N{OLD PERSIAN SIGN A}".encode())
    assert peak(lambda: parse_json(content.ljust(24 << 20), "x")) < 300 << 20


@pytest.mark.parametrize("change", [{"epoch": "1"}, {"jepa": [1]}, {"look": 3}, {"look": {"exact": "x"}}])
def test_metrics_of_others(change, run_folder):
    """Pictures are drawn from them."""
    path = run_folder / "metrics.jsonl"
    path.write_text(path.read_text() + json.dumps({"step": 9, "epoch": 1.0} | change) + "\n")
    assert "damaged" in refused(lambda: list(read_metrics(path)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [0, 12])
def test_no_verdicts(run_folder, n):
    path = run_folder / "eval.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n": n, "items": {"exact": ""}}))
    assert "damaged" in refused(read_score, run_folder)


def test_no_escape_sequence_reaches_the_terminal(capsys):
    text = "a\x1b]52;c;cm0=\x07\x9b2J\u202eb\r\n\tc 語\u3000e"
    assert printable(text, keep="\t\n") == r"a\x1b]52;c;cm0=\x07\x9b2J\u202eb\r" + "\n\tc 語\u3000e"
    with pytest.raises(SystemExit), main_guard():
        raise BadInput(text)
    shown = capsys.readouterr().err + markdown([("model", "n"), (text, "1")])
    assert not set("\x1b\x07\x9b\u202e\r\t") & set(shown) and shown.count("\n") == 3


# ---- work without bound ------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["a b" * 10 + "word" * 100_000, " " * 1_000_000, "[" * 9_000])
def test_long_words(text, tokenizer, tmp_path):
    """One took a minute and a half for a megabyte, and tiktoken's regex panicked at a million blanks."""
    assert "has words so long" in refused(tokenizer.encode, text)
    assert "f.jsonl:1: " in refused(fit, jsonl(tmp_path / "f.jsonl", [("a" + text, "b")]), tokenizer, 10)
    many = "lines with 2 dogs, \N{BLACK HEART SUIT} " * 20_000 + "word" * 5_000
    assert tokenizer.decode(tokenizer.encode(many)) == many


def test_tokens_of_many_letters(tmp_path):
    """Merged one by one, in the square of their letters."""
    vocab = {letter: i for i, letter in enumerate(byte_letters())}
    powers = ["a" * 2**i for i in range(15)]
    vocab |= {token: 256 + i for i, token in enumerate(powers[1:])}
    content = {"model": {"vocab": vocab, "merges": [[half, half] for half in powers[:-1]]},
               "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert "its tokens are too long" in refused(read_tokenizer_json, tmp_path / "tokenizer.json")


@pytest.mark.parametrize("name", ["x%d", "model.layers.%d.input_layernorm.weight"])
def test_a_hundred_thousand_tensors(name, run_folder):
    save_file({name % i: torch.zeros(0) for i in range(100_000)}, run_folder / "model.safetensors")
    config = json.loads((run_folder / "config.json").read_text())
    for layers, what in ((1, "too many tensors"), (99_999, "num_hidden_layers is 99999")):
        (run_folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        assert what in refused(load, run_folder)


# ---- links where a run writes ------------------------------------------------------------------------------

@pytest.mark.parametrize("name,use", [
    *((name, resume) for name in ("metrics.jsonl", "state.pt", "run.json", "config.json")),
    ("eval.json", score),
    ("tokenizer.json", lambda folder: Tokenizer.load(folder).save(folder))])
def test_nothing_is_written_through_a_link(name, use, run_folder, tmp_path, monkeypatch):
    """metrics.jsonl was appended to and cut where it led. No run begins in a folder with a link; what scoring
    replaces takes the link's place."""
    monkeypatch.setattr(train, "git_commit", lambda: None)
    victim = run_folder / "victim"
    (run_folder / name).rename(victim)
    before = victim.read_bytes()
    (run_folder / name).symlink_to(victim)
    if use is resume:
        assert f"{name}: a link" in refused(use, run_folder)
    else:
        use(run_folder)
        assert not (run_folder / name).is_symlink()
    assert victim.read_bytes() == before
