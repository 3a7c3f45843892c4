"""tasks/datasets.py: JSONL lines, splits, published and generated files, downloads that are cut or wrong."""
import hashlib
import json
import os
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from conftest import SHARED_DATA, contents, jsonl, serving

from support.files import BadInput
from tasks import datasets, nlrx
from tasks.datasets import PUBLISHED, Dataset, Example, download, git_blob_id, load_dataset, read_jsonl

needs_published = pytest.mark.skipif(not SHARED_DATA.exists(), reason="the published files are not here")


# ---- lines -------------------------------------------------------------------------------------------------

TALK = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'


@pytest.mark.parametrize("line,message", [
    (b"{", "not valid JSON"), (b"[1]", "expected a JSON object, found list"),
    (b'"\xff"', "not valid JSON .*utf-8"),
    (b"[" * 5000, "not valid JSON"), (b'{"text": ' + b"1" * 5000 + b"}", "not valid JSON"),
    (b'{"text": "a"}', "code must be a non-empty string"), (b'{"text": "a", "code": ""}', "code must be"),
    (b'{"text": 1, "code": "b"}', "text must be"), (b'{"text": "\\ud800", "code": "b"}', "half a surrogate"),
    (b'{"text": "a", "code": "b", "code_view": ""}', "code_view must be a non-empty"),
    (b'{"messages": 3}', "messages must be a list"), (TALK + b', "text": [{}]}', "messages must be a list"),
    (TALK + b', "text": []}', "text_view must be a non-empty"),
    (TALK.replace(b"[{", b'[{"role": "user"}, {') + b"}", "needs one user and one assistant message"),
    (TALK.replace(b"user", b"x").replace(b"assistant", b"user").replace(b"x", b"assistant") + b"}",
     "in this order; found assistant, user: put them"),
    (TALK.replace(b"[{", b'[{"role": "tool"}, {') + b"}", "message 1: the role 'tool' is not known here"),
    (TALK.replace(b"}]", b'}, {"role": "user", "content": "c"}]') + b"}", "message 3 is a second user turn"),
    (TALK.replace(b'"a"', b'[{"type": "image_url"}]') + b"}", "a part of type 'image_url'; only"),
    (b'{"prompt": "a"}', "completion must be a non-empty"), (b'{"instruction": "a"}', "output must be"),
    (b'{"instruction": "a", "input": 3, "output": "b"}', "instruction must be a non-empty"),
    (b'{"instruction": "a", "output": "b", "history": [["c", "d"]]}', "history: only one exchange"),
    (b'{"conversations": [{"from": "human", "value": "a"}]}', "found user$")])
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "t", "code": "c"}\n' + line + b"\n")
    with pytest.raises(BadInput, match=message) as error:
        read_jsonl(path)
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


def test_every_form_of_a_line(tmp_path):
    """Ours, TRL's, Alpaca's, ShareGPT's, content in parts; null is as no entry; a byte order mark is none."""
    system, user, assistant = ({"role": role, "content": content} for role, content in
                               (("system", "s"), ("user", "tü"), ("assistant", "c")))
    parts = {"role": "user", "content": [{"type": "text", "text": "t"}, {"type": "text", "text": "ü"}]}
    talk, plain, instructed = [user, assistant], Example("tü", "c"), Example("tü", "c", system="s")
    forms = [
        ({"text": "tü", "code": "c", "other": 1, "messages": None, "text_view": None}, plain),
        ({"text": "tü", "code": "c", "code_view": "w"}, replace(plain, code_view="w")),
        ({"text": "tü", "code": "c", "text_view": "v", "code_view": "w"},
         replace(plain, text_view="v", code_view="w")),
        ({"messages": [system, *talk]}, instructed), ({"messages": [system, parts, assistant]}, instructed),
        ({"messages": talk, "text": [{"role": "user", "content": "v"}], "code": talk},
         replace(plain, text_view="v", code_view="c")),
        ({"messages": talk, "text": "not a list: ignored"}, plain),
        ({"prompt": "tü", "completion": "c"}, plain), ({"prompt": [user], "completion": [assistant]}, plain),
        ({"prompt": [system, parts], "completion": [assistant]}, instructed),
        ({"instruction": "tü", "output": "c"}, plain),
        ({"instruction": "tü", "input": "", "output": "c"}, plain),
        ({"instruction": "t", "input": "ü", "output": "c", "system": "s"}, replace(instructed, text="t\nü")),
        ({"conversations": [{"from": "human", "value": "tü"}, {"from": "gpt", "value": "c"}]}, plain)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(line) for line, _ in forms), encoding="utf-8-sig")
    wanted = [replace(example, where=f"{path}:{i}") for i, (_, example) in enumerate(forms, 1)]
    assert list(read_jsonl(path)) == wanted


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"


@pytest.mark.parametrize("name,content,message", [
    ("a.jsonl", POINTER, "a Git LFS pointer, not the file; run git lfs pull"),
    ("a.json", b'[{"text": "t", "code": "c"}]', "a JSON array, .*jq -c"),
    ("a.jsonl", b"\n [\n", "a JSON array"), ("a.parquet", b"PAR1\x15", "a Parquet file; pandas"),
    ("a.jsonl.gz", b"\x1f\x8b\x08", "compressed; gunzip"), ("a.txt", b"hello", "1: not valid"),
    ("a.jsonl", "{}".encode("utf-16"), "UTF-16; save it as UTF-8")])
def test_files_of_another_kind(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=f"{name}.*{message}"):
        load_dataset(str(tmp_path / name))


def test_examples_behave_like_a_list(tmp_path):
    """Numbers, slices, arrays of indices, iteration, and from many threads; a blank line has a number."""
    path = tmp_path / "a.jsonl"
    path.write_bytes("".join(f'{{"text": "tü{i}", "code": "c{i}"}}\n{chr(10) * (i % 3)}' for i in range(99))
                     .encode())
    read = read_jsonl(path)
    assert [e.text for e in read] == [f"tü{i}" for i in range(99)] and len(read) == 99
    assert [e.code for e in read[96:]] == ["c96", "c97", "c98"] and read[-1].code == "c98"
    assert [e.code for e in read[2:8][np.array([0, 5])]] == ["c2", "c7"] and read[np.int64(4)].code == "c4"
    assert read[2].where == f"{path}:4" and read.lines.nbytes == 24 * 99
    with pytest.raises(IndexError):
        read[99]
    with ThreadPoolExecutor(8) as threads:
        assert [*threads.map(lambda i: read[i % 99].code, range(990))] == [f"c{i % 99}" for i in range(990)]


def test_a_file_that_is_cut_while_it_is_open(tmp_path):
    """Reading a memory map past the end of its file would kill the process: SIGBUS, without a message."""
    read = jsonl(tmp_path / "a.jsonl", [("t" * 5000, "c")] * 3)
    os.truncate(tmp_path / "a.jsonl", 6000)
    assert read[0].code == "c"
    with pytest.raises(BadInput, match="a.jsonl:3: the file has become shorter"):
        read[2]


# ---- splits ------------------------------------------------------------------------------------------------

def test_splits(tmp_path):
    """n_train takes the first; the held-out tenth is the last, is not trained on, replaces the test file."""
    pairs = [(f"t{i}", f"c{i}") for i in range(40)]
    jsonl(tmp_path / "a.jsonl", pairs[:30]), jsonl(tmp_path / "b.jsonl", pairs[30:])
    name, test_file = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")

    def numbers(**options):
        data = load_dataset(name, **options)
        return [[int(e.text[1:]) for e in split] for split in (data.train, data.test)]
    assert numbers(test_file=test_file) == [[*range(30)], [*range(30, 40)]]
    assert numbers(test_file=test_file, n_train=4, n_test=2) == [[*range(4)], [30, 31]]
    assert numbers(eval_split="valid") == [[*range(27)], [27, 28, 29]]
    assert numbers(eval_split="valid", n_train=5) == [[*range(5)], [27, 28, 29]]
    data = load_dataset(name, test_file=test_file)
    assert (data.source, data.files) == ("file", {path: hashlib.sha256(open(path, "rb").read()).hexdigest()
                                                  for path in (name, test_file)})
    jsonl(tmp_path / "short.jsonl", pairs[:9]), (tmp_path / "empty.jsonl").write_text("\n")
    for options, message in (
            ({"eval_split": "valid", "n_train": 28}, "--n_train 28: .* has only 27 training examples"),
            ({"test_file": test_file, "n_test": 11}, "--n_test 11: .* has only 10 test examples"),
            ({}, "has no test split"), ({"test_file": "none.jsonl"}, "none.jsonl: no such file"),
            ({"name": str(tmp_path / "empty.jsonl")}, "empty.jsonl: holds no example"),
            ({"name": str(tmp_path / "short.jsonl"), "eval_split": "valid"}, "too short to hold a tenth out"),
            ({"name": "nlrx_sinth"}, "not a known dataset"),
            ({"name": "nlrx_turk", "data_dir": tmp_path}, "turk_train.jsonl: .*data.py download nlrx_turk")):
        with pytest.raises(BadInput, match=message):
            load_dataset(**{"name": name, **options})


def test_leaked():
    one, two, three = Example("a", "b"), Example("a", "c"), Example("b", "a")
    assert Dataset("d", [two, three, two], [one, two], "file", {}).leaked == {("a", "c")}


@needs_published
def test_published_splits():
    synth, turk = (load_dataset(name, SHARED_DATA) for name in ("nlrx_synth", "nlrx_turk"))
    assert (len(synth.train), len(synth.test), synth.source) == (8000, 2000, "published")
    assert len(synth.leaked) == 39 and [e.code for e in turk.test] == [e.code for e in synth.test]


@needs_published
def test_published_files_are_pinned():
    here = [(SHARED_DATA / name, wanted) for splits in PUBLISHED.values() for name, wanted in splits.values()
            if (SHARED_DATA / name).exists()]
    assert len(here) > 10 and all(git_blob_id(path) == wanted for path, wanted in here)


def test_generated_files(tmp_path, monkeypatch, capsys):
    """Written where no published file is, once for each version of the grammar."""
    calls = []
    monkeypatch.setattr(nlrx, "generate", lambda n, seed: calls.append((n, seed)) or [
        (f"t{i}", "c") for i in range(n)])
    data = [load_dataset("nlrx_synth", tmp_path) for _ in range(2)][1]
    assert (len(data.train), len(data.test), data.source, calls) == (8000, 2000, "generated", [(10_000, 0)])
    assert data.train[-1].text == "t7999" and data.test[0].text == "t8000"
    datasets.announce(data)
    assert "GENERATED" in capsys.readouterr().out
    other = tmp_path / "other_nlrx.py"
    other.write_text("")
    monkeypatch.setattr(nlrx, "__file__", str(other))
    assert len(load_dataset("nlrx_synth", tmp_path).test) == 2000 and len(calls) == 2


def test_two_starts_in_one_folder_of_generated_data(tmp_path, monkeypatch):
    """On a slow disk; one of the two renamed the other's half file, or found none to rename."""
    pairs, replace, wrong = nlrx.generate(30, seed=0), os.replace, []
    monkeypatch.setattr(nlrx, "generate", lambda n, seed: pairs)
    monkeypatch.setattr(os, "replace", lambda a, b: time.sleep(0.2) or replace(a, b))

    def start():
        try:
            assert len(datasets.read_jsonl(datasets.generated_files(tmp_path, 20, 10)["train"])) == 20
        except Exception as error:
            wrong.append(error)
    threads = [threading.Thread(target=start) for _ in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert not wrong and len(list(tmp_path.iterdir())) == 2


# ---- downloads ---------------------------------------------------------------------------------------------

def test_git_blob_id(tmp_path):
    (tmp_path / "a").write_bytes(b"hello\n")  # printf 'hello\n' | git hash-object --stdin
    assert git_blob_id(tmp_path / "a") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_download(mirror, tmp_path, capsys):
    with serving(mirror) as address:
        download("nlrx_synth", tmp_path / "a", address + "/")
    assert contents(tmp_path / "a") == contents(mirror)
    download("nlrx_synth", tmp_path / "a", "file:///nowhere")  # what is here and right is not fetched again
    assert "already here" in capsys.readouterr().out
    download("nlrx_synth", tmp_path / "b", mirror.as_uri())
    assert contents(tmp_path / "b") == contents(mirror)


def test_a_bad_download_leaves_nothing(mirror, tmp_path):
    with pytest.raises(BadInput, match="foo: not a published dataset .*nlrx_synth, "):
        download("foo", tmp_path / "a")
    assert not (tmp_path / "a").exists()

    def refused(address, message):
        with pytest.raises(BadInput, match=message):
            download("nlrx_synth", tmp_path / "a", address)
    with serving(mirror, cut=40) as address:
        refused(address, "small_train.jsonl: 40 bytes that are not the published file")
    refused("http://127.0.0.1:9", "small_train.jsonl: .*refused")
    assert contents(tmp_path / "a") == {}
    (mirror / "small_test.jsonl").write_bytes(b"cut")
    refused(mirror.as_uri(), "small_test.jsonl: 3 bytes that are not the published file")
    (mirror / "small_test.jsonl").unlink()
    with serving(mirror) as address:
        refused(address, "small_test.jsonl: HTTP Error 404")
    refused("file:///nowhere", "nowhere")
    assert [*contents(tmp_path / "a")] == ["small_train.jsonl"]


def test_published_and_generated_files_are_never_mixed_up(mirror, tmp_path):
    """Neither half of each, nor a file that was changed."""
    download("nlrx_synth", tmp_path, mirror.as_uri())
    assert load_dataset("nlrx_synth", tmp_path).source == "published"
    (tmp_path / "small_train.jsonl").unlink()
    with pytest.raises(BadInput, match="small_train.jsonl: no such file; run `python data.py download"):
        load_dataset("nlrx_synth", tmp_path)
    os.truncate(tmp_path / "small_test.jsonl", 50)
    with pytest.raises(BadInput, match="small_test.jsonl: not the published file; move it away"):
        load_dataset("nlrx_synth", tmp_path)


# ---- Spider's databases ------------------------------------------------------------------------------------

def zipped(path, *names) -> bytes:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in names:
            file.writestr(name, bytes(range(256)) * 99)
    return path.read_bytes()


def test_databases_are_unpacked(mirror, tmp_path, monkeypatch, capsys):
    """Of the published archive. No other is unpacked: one that is cut or damaged, or that has a member which
    would be written outside the folder."""
    path, member = mirror / "spider_data.zip", "database/pets/pets.sqlite"
    right = zipped(path, member)
    monkeypatch.setattr(datasets, "SPIDER_ZIP", (path.name, hashlib.sha256(right).hexdigest()))
    download("spider", tmp_path / "a", mirror.as_uri())
    assert (tmp_path / "a" / "spider_data" / member).read_bytes() == bytes(range(256)) * 99
    here = {"small_train.jsonl", "small_test.jsonl"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == {*here, "spider_data"}
    download("spider", tmp_path / "a", "file:///nowhere")
    assert "spider_data: already here" in capsys.readouterr().out
    for wrong in (zipped(path, member, "../evil"), right[:-30], right[:60] + b"\xff" * 20 + right[80:]):
        path.write_bytes(wrong)
        with pytest.raises(BadInput, match="spider_data.zip: .* bytes that are not the published file"):
            download("spider", tmp_path / "b", mirror.as_uri())
        assert contents(tmp_path / "b").keys() == here and not list(tmp_path.glob("**/evil"))
    path.write_bytes(right)
    (tmp_path / "b" / path.name).write_bytes(right[:-30])  # of a download that was cut
    (tmp_path / "b" / "spider_data.tmp").mkdir()  # of a process that was killed while it unpacked
    download("spider", tmp_path / "b", mirror.as_uri())
    assert {path.name for path in (tmp_path / "b").iterdir()} == {*here, "spider_data"}
