"""What a stranger's folder can do: pipes, devices, links, and files and settings that fill memory or time. A
result or one clear line, in seconds."""
import json
import os
import re
import sqlite3
import time
from pathlib import Path

import pytest
import test_fuzz
import torch
from safetensors.torch import save_file
from test_fuzz import FILES, run_folder  # noqa: F401 (a fixture)

import eval
import train
from support.chat import cut_template
from support.files import BadInput, main_guard, parse_json, printable
from support.runs import read_metrics, read_score
from support.tables import markdown, table
from support.tokenizer import Tokenizer, byte_letters, read_tokenizer_json
from tasks.datasets import read_jsonl
from tasks.scorers import run_query


def refused(use, *arguments) -> str:
    """What use(...) is refused with: one line, in 5 s, that is no page."""
    began = time.monotonic()
    with pytest.raises(BadInput) as error:
        use(*arguments)
    message = str(error.value)
    assert time.monotonic() - began < test_fuzz.SECONDS
    assert message.isprintable() and len(message) < 600, message
    return message


def peak(use) -> int:
    """Bytes that use() takes at its peak, beyond what was held before."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak of memory cannot be measured here")
    before = test_fuzz.resident()
    use()
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024 - before


# ---- files that are none -----------------------------------------------------------------------------------

READERS = FILES | dict.fromkeys(
    ("tokenizer_config.json", "special_tokens_map.json", "vocab.json"), test_fuzz.tokens) | {
        "chat_template.jinja": cut_template}
NOT_WHOLE = {name for name in FILES if name.endswith((".safetensors", ".jsonl", ".pt"))}  # of any size
KINDS = {"a pipe": os.mkfifo, "endless": lambda path: path.symlink_to("/dev/zero"), "a folder": os.mkdir,
         "huge": lambda path: (path.touch(), os.truncate(path, 1 << 40))}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_named(name, kind, run_folder, monkeypatch):  # noqa: F811
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


# ---- settings of others ------------------------------------------------------------------------------------

def score(folder):
    eval.score_run(folder, eval.EvalOptions([str(folder)], device="cpu"))


def show(folder):
    """What train.py does with a finished run."""
    table({"a": read_score(folder)})


@pytest.mark.parametrize("value", [None, [], {}, "x", "\x1b[2J", True, 1.0, 1e9, 10**9, -5, float("nan"),
                                   10**400], ids=repr)
@pytest.mark.parametrize("name", ["k", "lam", "epochs", "layer", "distance", "n_train", "compile", "format",
                                  "dataset", "test_file", "seed", "pool"])
def test_settings_of_others(name, value, run_folder, monkeypatch):  # noqa: F811
    """Resumed, scored, begun with or compared: a result or a line, and never memory for 10**9 tokens."""
    monkeypatch.setattr(train, "git_commit", lambda: None)
    for file, uses in (("run.json", (test_fuzz.summarize_and_begin_with_it, test_fuzz.resume, score)),
                       ("eval.json", (FILES["eval.json"], show))):
        stored = json.loads((run_folder / file).read_text())
        original = (run_folder / file).read_text()
        stored["config"][name] = value
        (run_folder / file).write_text(json.dumps(stored))
        for use in uses:
            try:
                use(run_folder)
            except (BadInput, OSError) as error:
                assert "\n" not in str(error)
        (run_folder / file).write_text(original)


@pytest.mark.parametrize("change", [{"epoch": "1"}, {"jepa": [1]}, {"look": 3}, {"look": {"exact": "x"}}])
def test_metrics_of_others(change, run_folder):  # noqa: F811
    """Pictures are drawn from them."""
    path = run_folder / "metrics.jsonl"
    path.write_text(path.read_text() + json.dumps({"step": 9, "epoch": 1.0} | change) + "\n")
    assert "damaged" in refused(lambda: list(read_metrics(path)))


@pytest.mark.filterwarnings("error")
def test_no_items(run_folder):  # noqa: F811
    path = run_folder / "eval.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n": 0, "items": {"exact": ""}}))
    assert "damaged" in refused(read_score, run_folder)


def test_no_escape_sequence_reaches_the_terminal(capsys):
    text = "a\x1b]52;c;cm0=\x07\x9b2J\u202eb\r\n\tc 語\u3000e"
    assert printable(text, keep="\t\n") == r"a\x1b]52;c;cm0=\x07\x9b2J\u202eb\r" + "\n\tc 語\u3000e"
    with pytest.raises(SystemExit), main_guard():
        raise BadInput(text)
    shown = capsys.readouterr().err + markdown([("model", "n"), (text, "1")])
    assert not set("\x1b\x07\x9b\u202e\r\t") & set(shown) and shown.count("\n") == 3


# ---- work without bound ------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["a b" * 10 + "word" * 100_000, " " * 40_000])
def test_long_words(text, tokenizer):
    """A long word took a minute and a half for a megabyte."""
    assert "has words so long" in refused(tokenizer.encode, text)
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
def test_a_hundred_thousand_tensors(name, run_folder):  # noqa: F811
    save_file({name % i: torch.zeros(0) for i in range(100_000)}, run_folder / "model.safetensors")
    config = json.loads((run_folder / "config.json").read_text())
    for layers, what in ((1, "too many tensors"), (99_999, "num_hidden_layers is 99999")):
        (run_folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        assert what in refused(test_fuzz.load, run_folder)


@pytest.mark.parametrize("query", [
    "SELECT printf('%.*c', 2147483647, 'x')", "SELECT FORMAT('%2147483647d', 1)",
    "SELECT zeroblob(2147483647)", "SELECT randomblob(1000000000)",
    "SELECT count(*) FROM t a, t b, t c, t d", "SELECT a FROM t a, t b, t c",
    f"SELECT {', '.join(['1.5'] * 199)} FROM t a, t b LIMIT 100000",
    "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"])
def test_queries_without_end(query, tmp_path):
    """printf wrote 2**31 letters in one step of SQLite's machine, which nothing interrupts; numbers took no
    place in the size of a result."""
    path = tmp_path / "d.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t(a)")
        connection.executemany("INSERT INTO t VALUES (?)", [(i,) for i in range(1000)])
    connection.close()
    began = time.monotonic()
    assert peak(lambda: run_query(path, query) and 1 / 0) < 300 << 20
    assert time.monotonic() - began < test_fuzz.SECONDS


# ---- links where a run writes ------------------------------------------------------------------------------

@pytest.mark.parametrize("name,use", [
    ("metrics.jsonl", test_fuzz.resume), ("state.pt", test_fuzz.resume), ("run.json", test_fuzz.resume),
    ("config.json", test_fuzz.resume), ("eval.json", score),
    ("tokenizer.json", lambda folder: Tokenizer.load(folder).save(folder))])
def test_nothing_is_written_through_a_link(name, use, run_folder, tmp_path, monkeypatch):  # noqa: F811
    """metrics.jsonl was appended to and cut where it led. No run begins in a folder with a link; what scoring
    replaces takes the link's place."""
    monkeypatch.setattr(train, "git_commit", lambda: None)
    victim = run_folder / "victim"
    (run_folder / name).rename(victim)
    before = victim.read_bytes()
    (run_folder / name).symlink_to(victim)
    if use is test_fuzz.resume:
        assert f"{name}: a link" in refused(use, run_folder)
    else:
        use(run_folder)
        assert not (run_folder / name).is_symlink()
    assert victim.read_bytes() == before
