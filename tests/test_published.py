"""published.py: the sums, and downloads from a server of our own: whole, cut off, wrong, hostile."""
import functools
import hashlib
import http.server
import json
import threading
import zipfile

import pytest
from conftest import SHARED_DATA

from tasks import datasets as published
from support.files import BadInput
from tasks.datasets import PUBLISHED, download


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder of two small files that stands for the published one."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    files = {}
    for split in ("train", "test"):
        content = json.dumps({"text": split, "code": "c"}).encode() * 3
        (folder / f"small_{split}.jsonl").write_bytes(content)
        files[split] = (f"small_{split}.jsonl", blob_id(content))
    monkeypatch.setitem(PUBLISHED, "small", files)
    return folder


def test_git_blob_id(tmp_path):
    (tmp_path / "a").write_bytes(b"hello\n")  # printf 'hello\n' | git hash-object --stdin
    assert published.git_blob_id(tmp_path / "a") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_download_from_a_file_address_and_a_server(mirror, tmp_path, capsys):
    download("small", tmp_path / "a", mirror.as_uri())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=mirror)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        download("small", tmp_path / "b", f"http://127.0.0.1:{server.server_port}/")
        server.shutdown()
    for folder in ("a", "b"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == ["small_test.jsonl",
                                                                               "small_train.jsonl"]
        fetched = (tmp_path / folder / "small_test.jsonl").read_bytes()
        assert fetched == (mirror / "small_test.jsonl").read_bytes()
    download("small", tmp_path / "a", "file:///nowhere")  # what is here and right is not fetched again
    assert "already here" in capsys.readouterr().out


def test_a_bad_download_leaves_nothing(mirror, tmp_path):
    (mirror / "small_test.jsonl").write_bytes(b"cut")
    with pytest.raises(BadInput, match="small_test.jsonl: 3 bytes that are not the published file"):
        download("small", tmp_path / "a", mirror.as_uri())
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["small_train.jsonl"]
    with pytest.raises(BadInput, match="nowhere"):
        download("small", tmp_path / "b", "file:///nowhere")


def test_the_sums_are_those_of_the_files():
    if not SHARED_DATA.exists():
        pytest.skip("the published files are not here")
    here = [(name, wanted) for splits in PUBLISHED.values() for name, wanted in splits.values()
            if (SHARED_DATA / name).exists()]
    assert len(here) > 10
    for name, wanted in here:
        assert published.git_blob_id(SHARED_DATA / name) == wanted, name


class Cutting(http.server.SimpleHTTPRequestHandler):
    """Sends at most `self.server.cut` bytes of what it announces, knows ranges if `self.server.ranges`."""

    def do_GET(self):
        content = open(self.translate_path(self.path), "rb").read()
        start = 0
        if self.server.ranges and self.headers["Range"]:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.server.asked.append((self.path, start))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:start + self.server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(mirror):
    """A function (cut, ranges) -> a running server of the mirror, and its address."""
    running = []

    def start(cut, ranges):
        s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Cutting, directory=mirror))
        s.cut, s.ranges, s.asked = cut, ranges, []
        threading.Thread(target=s.serve_forever, daemon=True).start()
        running.append(s)
        return s, f"http://127.0.0.1:{s.server_port}"
    yield start
    for s in running:
        s.shutdown()
        s.server_close()


def test_a_cut_download_goes_on_where_it_was_cut(mirror, server, tmp_path):
    s, address = server(40, True)
    download("small", tmp_path / "a", address)
    assert (tmp_path / "a" / "small_test.jsonl").read_bytes() == (mirror / "small_test.jsonl").read_bytes()
    assert s.asked[:3] == [("/small_train.jsonl", 0), ("/small_train.jsonl", 40), ("/small_train.jsonl", 80)]


@pytest.mark.parametrize("cut,ranges", [(0, True), (40, False), (0, False)])
def test_a_download_that_comes_no_further_ends(server, tmp_path, cut, ranges):
    _, address = server(cut, ranges)
    with pytest.raises(BadInput, match=f"small_train.jsonl: cut off after {cut} of .* bytes; nothing was wr"):
        download("small", tmp_path / "a", address)
    assert not list((tmp_path / "a").iterdir())


def test_a_missing_file_and_no_server(server, tmp_path, mirror):
    (mirror / "small_test.jsonl").unlink()
    with pytest.raises(BadInput, match="small_test.jsonl: HTTP Error 404"):
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=mirror)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as s:
            threading.Thread(target=s.serve_forever, daemon=True).start()
            try:
                download("small", tmp_path / "a", f"http://127.0.0.1:{s.server_port}")
            finally:
                s.shutdown()
    with pytest.raises(BadInput, match="small_train.jsonl: .*refused"):
        download("small", tmp_path / "b", "http://127.0.0.1:9")
    assert not list(tmp_path.glob("**/*.tmp"))


# ---- Spider's databases ------------------------------------------------------------------------------------

@pytest.fixture
def spider(mirror, monkeypatch):
    """The mirror stands for Spider, too; a function (members) makes its archive."""
    monkeypatch.setitem(PUBLISHED, "spider", PUBLISHED["small"])

    def make(members, damage=lambda content: content):
        with zipfile.ZipFile(mirror / "spider_data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        content = damage((mirror / "spider_data.zip").read_bytes())
        (mirror / "spider_data.zip").write_bytes(content)
        monkeypatch.setattr(published, "SPIDER_ZIP", ("spider_data.zip", hashlib.sha256(content).hexdigest()))
    return make


def test_databases_are_unpacked(mirror, spider, tmp_path, capsys):
    spider({"database/pets/pets.sqlite": b"x" * 1000, "tables.json": b"{}"})
    download("spider", tmp_path / "a", mirror.as_uri())
    assert (tmp_path / "a/spider_data/database/pets/pets.sqlite").read_bytes() == b"x" * 1000
    assert not (tmp_path / "a" / "spider_data.zip").exists() and not list(tmp_path.glob("**/*.tmp"))
    download("spider", tmp_path / "a", "file:///nowhere")
    assert "spider_data: already here" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../evil", "/evil", "database/../../evil", "a\\..\\..\\evil", "C:evil"])
def test_an_archive_that_leaves_its_folder(mirror, spider, tmp_path, name):
    spider({"database/a/a.sqlite": b"x", name: b"evil"})
    with pytest.raises(BadInput, match="would leave .*; nothing was unpacked"):
        download("spider", tmp_path / "a", mirror.as_uri())
    assert not list(tmp_path.glob("**/*evil*")) and not (tmp_path / "a" / "spider_data").exists()


def test_a_damaged_archive(mirror, spider, tmp_path, monkeypatch):
    members = {"database/a/a.sqlite": bytes(range(256)) * 99}
    spider(members, damage=lambda content: content[:-30])
    with pytest.raises(BadInput, match="not a zip file that can be read"):
        download("spider", tmp_path / "a", mirror.as_uri())
    spider(members, damage=lambda content: content[:60] + b"\xff" * 20 + content[80:])
    (tmp_path / "a" / "spider_data.zip").unlink()
    with pytest.raises(BadInput, match="not a zip file that can be read"):
        download("spider", tmp_path / "a", mirror.as_uri())
    monkeypatch.setattr(published, "SPIDER_ZIP", ("spider_data.zip", "0" * 64))
    with pytest.raises(BadInput, match="spider_data.zip: .* bytes that are not the published file"):
        download("spider", tmp_path / "b", mirror.as_uri())
    for folder in ("a", "b"):
        assert not (tmp_path / folder / "spider_data").exists() and not list(tmp_path.glob("**/*.tmp"))
