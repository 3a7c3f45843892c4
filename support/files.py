"""Faults in one place: what a user did wrong, how a file is written, and what a signal does.

Every mistake that a user can make (a flag, a file, a line, a tensor) is raised as `BadInput` with one line
that names it and says what to do; `main_guard` prints that line and exits with status 2. Every file is
written through `atomic`: a reader sees the old file or the new one, never a half (but for metrics.jsonl,
which grows, and what transformers and TensorBoard write). Every file is read as `regular` allows: a
stranger's folder may hold pipes, devices, and files that fill the memory.
"""
import codecs
import contextlib
import glob
import hashlib
import json
import os
import re
import secrets
import signal
import stat
import sys
import time
from pathlib import Path


class BadInput(ValueError):
    """The user's mistake; the message is one line that names it and says what to do."""

    def __init__(self, message: str):
        super().__init__(printable(message))  # it may quote a stranger's file


@contextlib.contextmanager
def atomic(path: str | Path):
    """Yield a temporary path beside `path`. It becomes `path` when the block ends, and vanishes when it
    raises; an OSError (full disk, read-only folder) leaves `path` as it was.

    The temporary file is created exclusively, under a random name: no two processes write into one, and no
    link is followed. One that is an hour old is a killed process's, and is removed.
    """
    path = Path(path)
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):  # its process is quicker
            if time.time() - left.lstat().st_mtime > 3600:
                left.unlink()
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())  # or the rename could reach the disk before the content does
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def append(path: Path):
    """Open a file to read it and to append to it, but through no link: its target would be written to."""
    if path.exists():
        regular(path)
    flags = os.O_CREAT | os.O_RDWR | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    return open(path, "ab+", opener=lambda name, _: os.open(name, flags, 0o666))


def write_text(path: str | Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


KINDS = {  # how files of other kinds begin -> what they are, and what to do
    b"version https://git-lfs": "a Git LFS pointer, not the file; run git lfs pull",
    b"PAR1": "a Parquet file; pandas.read_parquet(...).to_json(..., orient='records', lines=True) makes a "
             ".jsonl of it",
    b"\x1f\x8b": "compressed; gunzip it first", b"PK\3\4": "a zip archive; unzip it first",
    b"\x28\xb5\x2f\xfd": "compressed; unzstd it first", b"BZh": "compressed; bunzip2 it first",
    codecs.BOM_UTF16_LE: "UTF-16; save it as UTF-8", codecs.BOM_UTF16_BE: "UTF-16; save it as UTF-8"}


# What is read whole: Llama-3's tokenizer.json has 17 MB and a million values in its larger spelling. A value
# takes up to 150 bytes of memory.
MAX_BYTES, MAX_VALUES = 24 << 20, 1_500_000


def regular(path: str | Path, most: int | None = None) -> Path:
    """The path, of a file with at most so many bytes. BadInput if it has more or if it, or what it links to,
    is no regular file: to read a pipe or a device may never end."""
    path = Path(path)
    try:
        status = path.stat()
    except ValueError as error:  # "\0" in it, or half of a surrogate pair
        raise BadInput(f"{path}: no name of a file ({error})") from None
    if not stat.S_ISREG(status.st_mode):
        raise BadInput(f"{path}: not a regular file; put one in its place, or remove it")
    if most is not None and status.st_size > most:
        raise BadInput(f"{path}: {status.st_size:,} bytes; at most {most:,} are read of such a file")
    return path


def refuse_other_kinds(path: str | Path) -> None:
    """BadInput if a file is not regular, or begins as one that is never read here, like a Git LFS pointer."""
    with open(regular(path), "rb") as file:
        start = file.read(32)
    for magic, what in KINDS.items():
        if start.startswith(magic):
            raise BadInput(f"{path}: {what}")


def parse_json(content: bytes, where: str | Path) -> dict:
    """A JSON object; BadInput, which begins with `where`, if it is none, or one that fills the memory."""
    if sum(content.count(mark) for mark in b",:[{") > MAX_VALUES:  # it has no more than these
        raise BadInput(f"{where}: more than {MAX_VALUES:,} values; so many are not read")
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or a number of 5,000 digits
        raise BadInput(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json(path: str | Path) -> dict:
    """A JSON object from a file; BadInput names the file if it is none."""
    try:
        refuse_other_kinds(path)
        return parse_json(regular(path, MAX_BYTES).read_bytes(), path)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None


def read_text(path: str | Path, most: int) -> str:
    """The text of a file; BadInput if it is not UTF-8 or has more than so many bytes."""
    try:
        return regular(path, most).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 ({error})") from None


def digest_of(path: str | Path, digest) -> str:
    """A file's content, added to one of hashlib's digests, in hex."""
    with open(regular(path), "rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest()


def sha256(path: str | Path) -> str:
    return digest_of(path, hashlib.sha256())


def library(name: str, why: str, file: str = "requirements-hf.txt"):
    """A module of an optional extra; BadInput if it is not installed."""
    try:
        return __import__(name)
    except ImportError:
        raise BadInput(f"{why} needs {name}: pip install -r {file}") from None


def printable(text: object, keep: str = "") -> str:
    """A text of others as a terminal can be given it: control characters, which may move its cursor or write
    to its clipboard, what turns the direction of reading, and halves of surrogate pairs stand there as
    escapes. keep: but for these."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
                  lambda found: found[0] if found[0] in keep else repr(found[0])[1:-1], str(text))


class Interrupts:
    """A handler of signals: KeyboardInterrupt at once, or, in a block `with interrupts.deferred()`, nothing
    but `asked`, the signal's number, for the block to look at. There, a second signal a second later does not
    wait (launchers send the first one twice)."""
    asked, since, waits, raised = 0, 0.0, False, False

    def __call__(self, number: int, _) -> None:
        if not self.asked:
            self.asked, self.since = number, time.monotonic()
        if not self.waits or time.monotonic() - self.since > 1:
            self.raised = True
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def deferred(self):
        self.waits = True
        try:
            yield
        finally:
            self.waits = False


interrupts = Interrupts()
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
           if hasattr(signal, name)]


@contextlib.contextmanager
def main_guard():
    """Around a program's main(): a mistake of the user or of the disk is one line on stderr and exit status
    2; a signal is one line and, as shells have it, 128 + its number."""
    old = {number: signal.signal(number, interrupts) for number in SIGNALS
           if signal.getsignal(number) != signal.SIG_IGN}  # nohup and a script's `&` ignore some on purpose
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it is closed (`>&-`)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # where a letter cannot be shown, its number is
            stream.reconfigure(errors="backslashreplace")
    try:
        if sys.version_info < (3, 11):  # noqa: UP036  who has an older one is told so
            raise BadInput(f"needs Python 3.11 or newer; this is {sys.version.split()[0]}")
        yield
        sys.stdout.flush()  # here, where a closed pipe is caught
    except BrokenPipeError:  # `| head` has seen enough; Python would flush again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)  # as shells have it of SIGPIPE
    except (BadInput, OSError) as error:
        print(f"error: {printable(error):.2000}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"interrupted{str(error) and ': '}{error}", file=sys.stderr)
        sys.exit(128 + (interrupts.asked or signal.SIGINT))
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
