"""What a stranger's folder can do: pipes, devices, links, and files and settings that fill memory or time. A
result or one clear line, in seconds."""
import os
import re
import time
from pathlib import Path

import pytest
import test_fuzz
from test_fuzz import FILES, run_folder  # noqa: F401 (a fixture)

import train
from support.chat import cut_template
from support.files import BadInput, parse_json
from support.tokenizer import Tokenizer
from tasks.datasets import read_jsonl


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
    if name == "tokenizer.model":
        (run_folder / "tokenizer.json").unlink()
    KINDS[kind](run_folder / name)
    message = refused(READERS[name], run_folder)
    assert message.startswith(str(run_folder / name)) or "metrics.jsonl" in message and name == "state.pt"
    if kind != "huge" or name not in NOT_WHOLE:
        assert re.search({"huge": "bytes; at most", "endless": "regular file|a link out"}.get(
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
