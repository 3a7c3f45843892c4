"""Pairs of text and code: JSONL files, the published datasets, and how those are fetched.

A line is {"text": ..., "code": ...} or {"messages": [...]}, where the user's message is the text and the
assistant's is the code, or one of the other layouts of FORMS. It may also carry "text_view" and "code_view":
what the views show instead.
"""
import codecs
import hashlib
import http.client
import json
import mmap
import re
import shutil
import urllib.request
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from support.files import BadInput, atomic, digest_of, parse_json, printable, refuse_other_kinds, regular
from support.files import sha256, write_text
from tasks import nlrx

# ---- examples ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    text: str
    code: str
    where: str = ""  # file:line, for messages
    system: str = ""  # the instruction of a conversation
    text_view: str = ""  # what the views show instead of text and code; empty: text and code themselves
    code_view: str = ""
    text_only: bool = False  # code does not continue text, it is only its other view (paraphrase)


MAX_LINE = 8 << 20  # bytes
FORMS = ('{"text", "code"}, {"messages": [user, assistant]}, {"prompt", "completion"}, {"instruction", '
         '"output"} or {"conversations": [human, gpt]}')
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user",
         "assistant": "assistant", "gpt": "assistant"}


def read_line(line: bytes, where: str) -> Example:
    """The example on a line of a JSONL file; BadInput, which begins with `where`, if it is none."""
    row = parse_json(line, where)
    row = {key: value for key, value in row.items() if value is not None}  # null: a table's empty cell
    try:
        parts = parts_of(row)
        for key, value in parts.values():
            if not isinstance(value, str) or not value:
                raise BadInput(f"{key} must be a non-empty string; a line is {FORMS}")
            if re.search("[\ud800-\udfff]", value):
                raise BadInput(f"{key} holds half a surrogate pair, which is no text")
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
    return Example(**{name: value for name, (_, value) in parts.items()}, where=where)


def parts_of(row: dict) -> dict[str, tuple[str, Any]]:
    """Field of an Example -> (the key that it stands under, its value), by the layout of the row."""
    views = {name: (name, row[name]) for name in ("text_view", "code_view") if name in row}
    if "messages" in row:
        for name, role in (("text", "user"), ("code", "assistant")):
            if isinstance(row.get(name), list):  # hellaswag: the views are conversations of their own
                views[name + "_view"] = (f"{name}_view", dict(turns(row[name])).get(role))
        return views | one_exchange(turns(row["messages"]))
    if {"text", "code"} <= row.keys():
        return {name: (name, row.get(name)) for name in ("text", "code")} | views
    system = {"system": ("system", row["system"])} if row.get("system") else {}
    if "conversations" in row:  # ShareGPT
        return system | one_exchange(turns(row["conversations"])) | views
    if isinstance(row.get("prompt"), list):  # TRL, conversational
        return one_exchange(turns(row["prompt"]) + turns(row.get("completion"))) | views
    if "prompt" in row:
        return {"text": ("prompt", row["prompt"]), "code": ("completion", row.get("completion"))} | views
    if "instruction" in row:  # Alpaca
        if row.get("history"):
            raise BadInput("history: only one exchange is learned from a line; write a line for each")
        asked = row["instruction"]
        if row.get("input"):
            asked = f"{asked}\n{row['input']}" if isinstance(row["input"], str) else None
        return {"text": ("instruction", asked), "code": ("output", row.get("output"))} | system | views
    return {name: (name, row.get(name)) for name in ("text", "code")}


def turns(messages) -> list[tuple[str, Any]]:
    """(role, content) of each of a list of messages; BadInput if it is none or says a thing twice."""
    if not isinstance(messages, list) or not all(
            isinstance(m, dict) and isinstance(m.get("role", m.get("from")), str) for m in messages):
        raise BadInput('messages must be a list of {"role": ..., "content": ...}, conversations one of '
                       '{"from": ..., "value": ...}')
    said = []
    for number, message in enumerate(messages, 1):
        role = message.get("role", message.get("from"))
        if role not in ROLES:
            raise BadInput(f"message {number}: the role {role!r} is not known here ({', '.join(ROLES)})")
        if ROLES[role] in dict(said):
            raise BadInput("needs one user and one assistant message, and at most a system one before; "
                           f"message {number} is a second {role} turn: write a line for each exchange")
        said.append((ROLES[role], joined(message.get("content", message.get("value")))))
    return said


def joined(content):
    """The content of a message; where it is a list of parts, their text. BadInput names a part without."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise BadInput(f"content has a part of type {kind!r}; only parts of type text are read here")
    return "".join(part["text"] for part in content)


def one_exchange(said: list[tuple[str, Any]]) -> dict[str, tuple[str, Any]]:
    """text, code and system of a conversation of one exchange; BadInput if it is another."""
    roles = [role for role, _ in said]
    if roles[-2:] != ["user", "assistant"] or roles[:-2] not in ([], ["system"]):
        found = f"found {', '.join(roles) or 'none'}"
        if "user" in roles and "assistant" in roles:
            found += ": put them in this order, or leave the line out"
        raise BadInput("needs one user and one assistant message, and at most a system one before, in this "
                       f"order; {found}")
    names = {"user": "text", "assistant": "code", "system": "system"}
    return {names[role]: (f"the {role}'s content", content) for role, content in said
            if role != "system" or content}


class Examples(Sequence):
    """The examples of a JSONL file, parsed each time they are asked for; 24 bytes per line stay in memory.

    `content` is the file's memory map, `lines` (N, 3) the offset, length and number (from 1) of each line.
    Any thread may read. A slice or an array of indices gives Examples again.
    """

    def __init__(self, path: Path, content: mmap.mmap, lines: np.ndarray, text_only: bool = False):
        self.path, self.content, self.lines, self.text_only = path, content, lines, text_only

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int | slice | np.ndarray):
        if not isinstance(i, (int, np.integer)):
            return Examples(self.path, self.content, self.lines[i], self.text_only)
        offset, length, number = self.lines[i].tolist()
        if self.content.size() < offset + length:  # reading on would kill the process (SIGBUS)
            raise BadInput(f"{self.path}:{number}: the file has become shorter since it was opened")
        example = read_line(self.content[offset:offset + length], f"{self.path}:{number}")
        return replace(example, text_only=self.text_only)


def read_jsonl(path: str | Path) -> Examples:
    """The examples of a JSONL file; blank lines are skipped. Every line is checked here: BadInput names the
    file and the line."""
    path, lines, offset = Path(path), array("q"), 0
    try:
        refuse_other_kinds(path)
        with open(path, "rb") as file:
            if file.read(100).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                raise BadInput(f"{path}: a JSON array, not an object a line; "
                               f"`jq -c '.[]' {path} > NEW.jsonl` writes one")
            file.seek(0)
        with open(path, "rb") as file:
            for number, line in enumerate(iter(partial(file.readline, MAX_LINE + 1), b""), 1):
                if len(line) > MAX_LINE:
                    raise BadInput(f"{path}:{number}: longer than {MAX_LINE:,} bytes; shorten the line or "
                                   "leave it out")
                if line.strip():
                    read_line(line, f"{path}:{number}")
                    lines.extend((offset, len(line), number))
                offset += len(line)
            if not lines:
                raise BadInput(f"{path}: holds no example")
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    return Examples(path, content, np.array(lines).reshape(-1, 3))


# ---- datasets ----------------------------------------------------------------------------------------------

# The files of `datasets/` in the authors' repository at one commit
COMMIT = "6d7d0d1f296441beff39a95c801db7f683e3b353"
BASE_URL = f"https://raw.githubusercontent.com/galilai-group/llm-jepa/{COMMIT}/datasets"
PUBLISHED = {  # dataset -> split -> (file, its git blob id)
    "nlrx_synth": {"train": ("synth_train.jsonl", "cbe45f8f9fbb126e09763d5062b01319285ce045"),
                   "test": ("synth_test.jsonl", "e9a539bf83c933ab8d347d49a067aa527f118853")},
    "nlrx_turk": {"train": ("turk_train.jsonl", "8ceb7cba7476cc73259d17239be798a98b4ded93"),
                  "test": ("turk_test.jsonl", "a139f00a37699a9fa4f8e0921f833208932d956b")},
    "gsm8k": {"train": ("gsm8k_train.jsonl", "f9b00a73bd5f61064b76faba80dbd1277139914d"),
              "test": ("gsm8k_test.jsonl", "4fa1a98ff47ef43b041b21410f9f32d913cc8f6e")},
    "spider": {"train": ("spider_train.jsonl", "4d4453e4fd5667a535d131f5e4d55a4bca3f65f2"),
               "test": ("spider_test.jsonl", "7fe5982be65417ab9783573e1f78dc6e9d2e5847")},
    "rotten_tomatoes": {"train": ("rotten_tomatoes_train.jsonl", "3c78fd92d32095d3601760045670b9a1a667604e"),
                        "test": ("rotten_tomatoes_test.jsonl", "205840bbe7a40cb081be1c416cf191ad43da788c")},
    "yelp": {"train": ("yelp_train.jsonl", "80dfafcf24aa9cff0dd98acea5bf24e1b3ffce86"),
             "test": ("yelp_test.jsonl", "350da2d18a7fe2d5320b59be3d5497cd0769d7e3")},
    "nq_open": {"train": ("nq_open_train.jsonl", "de280d6519663bf213a9b31db79beba8ab7135d4"),
                "test": ("nq_open_test.jsonl", "826adcca5934f58f92f0192b6a2e5cc42590877d")},
    "hellaswag": {"train": ("hellaswag_train.jsonl", "127b4e84b5034838573e295150eabb6355bca002"),
                  "test": ("hellaswag_test.jsonl", "013306d4b981bd0a860f8d2a7d7a18624f3cb8a0")},
    "paraphrase": {"train": ("paraphrase_train.jsonl", "b223c762dca836132e29faee27f76c30dafba714")},
}


def git_blob_id(path: Path) -> str:
    """What `git hash-object` prints."""
    return digest_of(path, hashlib.sha1(b"blob %d\0" % regular(path).stat().st_size))


def generated_files(data_dir: Path, n_train: int = 8000, n_test: int = 2000) -> dict[str, Path]:
    """split -> file of the embedded nlrx_synth, written once. The names carry a hash of nlrx.py, so that a
    changed grammar never meets old files."""
    version = sha256(Path(nlrx.__file__))[:8]
    paths = {split: data_dir / f"generated_{version}_{split}.jsonl" for split in ("train", "test")}
    if not all(path.exists() for path in paths.values()):
        pairs = nlrx.generate(n_train + n_test, seed=0)
        data_dir.mkdir(parents=True, exist_ok=True)
        for path, part in zip(paths.values(), (pairs[:n_train], pairs[n_train:]), strict=True):
            write_text(path, "".join(json.dumps({"text": text, "code": code}) + "\n" for text, code in part))
    return paths


def dataset_paths(name: str, data_dir: Path, test_file: str) -> tuple[dict[str, Path], str]:
    """({split: file}, source) of a dataset. Published files are checked; where nlrx_synth has none at all,
    the embedded grammar writes its own."""
    if name.endswith(".jsonl"):
        return {"train": Path(name)} | ({"test": Path(test_file)} if test_file else {}), "file"
    if name not in PUBLISHED:
        if Path(name).is_file():
            read_jsonl(name)  # says what kind of file it is, if it is another
        raise BadInput(f"--dataset {name}: not a known dataset ({', '.join(PUBLISHED)}), nor a .jsonl file")
    paths = {split: data_dir / file_name for split, (file_name, _) in PUBLISHED[name].items()}
    if name == "nlrx_synth" and not any(path.exists() for path in paths.values()):
        return generated_files(data_dir), "generated"
    advice = f"run `python data.py download {name} --data_dir {data_dir}`"
    for split, path in paths.items():
        if path.exists() and git_blob_id(path) != PUBLISHED[name][split][1]:
            raise BadInput(f"{path}: not the published file; move it away and {advice}")
    for path in paths.values():
        if not path.exists():
            raise BadInput(f"{path}: no such file; {advice}")
    return paths, "published"


@dataclass
class Dataset:
    name: str
    train: Sequence[Example]
    test: Sequence[Example]
    source: str  # published | generated | file
    files: dict[str, str]  # path -> sha256
    folder: Path = Path("data")  # where published files are
    scorer: str = ""  # of a file of one's own, see tasks/scorers.py
    databases: str = ""  # of the scorer sql

    @cached_property
    def leaked(self) -> set[tuple[str, str]]:
        """The (text, code) of test that also stand in train."""
        test = {(e.text, e.code) for e in self.test}
        return {pair for e in self.train if (pair := (e.text, e.code)) in test}


def load_dataset(name: str, data_dir: str | Path = "data", test_file: str = "", n_train: int = 0,
                 eval_split: str = "test", n_test: int = 0, scorer: str = "", databases: str = "") -> Dataset:
    """The train and test pairs of a published dataset or of your own files.

    name             a key of PUBLISHED, or the path of a .jsonl file, whose test split is test_file
    n_train, n_test  use only the first so many examples; 0: all
    eval_split       "valid": the last tenth of train is held out and takes the place of the test split
    scorer           how answers to a file of your own are judged; databases: see tasks/scorers.py
    """
    paths, source = dataset_paths(name, Path(data_dir), test_file)
    train = read_jsonl(paths["train"])
    if eval_split == "valid":
        cut = len(train) - len(train) // 10
        train, test = train[:cut], train[cut:]
    elif "test" in paths:
        test = read_jsonl(paths["test"])
    else:
        raise BadInput(f"{name} has no test split: --eval_split valid")
    if not test:
        raise BadInput(f"{paths['train']}: too short to hold a tenth out for --eval_split valid")
    for flag, wanted, split, examples in (("n_train", n_train, "training", train),
                                          ("n_test", n_test, eval_split, test)):
        if wanted > len(examples):
            raise BadInput(f"--{flag} {wanted}: {name} has only {len(examples)} {split} examples")
    train, test = train[:n_train or None], test[:n_test or None]
    train.text_only = test.text_only = name == "paraphrase"
    files = {str(path): sha256(path) for path in paths.values()}
    return Dataset(name, train, test, source, files, Path(data_dir), scorer, databases)


def announce(data: Dataset) -> None:
    """Print where the data comes from."""
    print(f"data: {data.source}" if data.source != "generated" else
          f"data: GENERATED by the embedded NL-RX grammar (`python data.py download {data.name}` fetches the "
          "published files)")
    for path, digest in data.files.items():
        print(f"  {printable(path)} sha256 {digest[:12]}")


# ---- downloads ---------------------------------------------------------------------------------------------

# Spider's databases are kept in Git LFS, at another address; a mirror (--base_url) has them beside the rest
SPIDER_URL = f"https://media.githubusercontent.com/media/galilai-group/llm-jepa/{COMMIT}"
SPIDER_ZIP = ("spider_data.zip", "00636695dabed6b5f4b8328a16b13e069a2f16591d5efcce57660669c85b121b")  # sha256


def fetch(url: str, path: Path, digest: Callable[[Path], str], wanted: str) -> None:
    """Download a file, unless it is here, whole and checked or not at all: BadInput if digest(file) is not
    the one wanted."""
    if path.exists() and digest(path) == wanted:
        print(f"{path}: already here")
        return
    with atomic(path) as temporary:
        try:
            with (urllib.request.urlopen(url, timeout=60) as reply, open(temporary, "wb") as file,
                  tqdm(total=int(reply.headers.get("Content-Length") or 0) or None, unit="B",
                       unit_scale=True, desc=path.name) as bar):
                while chunk := reply.read(1 << 16):
                    bar.update(file.write(chunk))
        except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
            raise BadInput(f"{url}: {error}; nothing was written, try again") from None
        if digest(temporary) != wanted:
            raise BadInput(f"{url}: {temporary.stat().st_size} bytes that are not the published file; "
                           "nothing was written, try again")
    print(f"{path}: {path.stat().st_size} bytes, checked")


def download(name: str, data_dir: str | Path, base_url: str = "") -> None:
    """Fetch what is missing of a published dataset into data_dir; base_url is the address of a mirror."""
    if name not in PUBLISHED:
        raise BadInput(f"{name}: not a published dataset ({', '.join(PUBLISHED)})")
    data_dir = Path(data_dir)
    data_dir.mkdir(parents=True, exist_ok=True)
    for file_name, blob_id in PUBLISHED[name].values():
        fetch(f"{(base_url or BASE_URL).rstrip('/')}/{file_name}", data_dir / file_name, git_blob_id, blob_id)
    databases, temporary = data_dir / "spider_data", data_dir / "spider_data.tmp"
    if name == "spider" and databases.exists():
        print(f"{databases}: already here")
    elif name == "spider":
        file_name, digest = SPIDER_ZIP
        archive = data_dir / file_name
        fetch(f"{(base_url or SPIDER_URL).rstrip('/')}/{file_name}", archive, sha256, digest)
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process
        temporary.mkdir()  # where a link stands, it is not followed
        try:  # the archive is the pinned one, so neither damaged nor hostile
            shutil.unpack_archive(archive, temporary)
            temporary.rename(databases)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        archive.unlink()
