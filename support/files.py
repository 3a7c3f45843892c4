"""Faults in one place: what a user did wrong, and how a file is written.

Every mistake that a user can make (a flag, a file, a line, a tensor) is raised as `BadInput` with one line
that names it and says what to do; `main_guard` prints that line and exits with status 2. Every file is
written through `atomic`: a reader sees the old file or the new one, never a half.
"""
import argparse
import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path


class BadInput(ValueError):
    """The user's mistake; the message is one line that names it and says what to do."""


@contextlib.contextmanager
def atomic(path: str | Path):
    """Yield a temporary path beside `path`; it becomes `path` when the block ends, and vanishes when it
    raises.

    The temporary name is fixed, so what a killed process left behind is overwritten by the next one.
    Raises OSError (full disk, read-only folder); `path` is untouched then.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # or the rename could reach the disk before the content does
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256(path: str | Path) -> str:
    """The digest of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: str | Path) -> dict:
    """A JSON object from a file; BadInput names the file if it is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or a number of 5,000 digits
        raise BadInput(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class Parser(argparse.ArgumentParser):
    """A parser that guesses at no abbreviation and whose errors are BadInput."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        raise BadInput(f"{message}; see --help")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, at a moment at which all is consistent."""


class Interrupts:
    """A handler of Ctrl-C and SIGTERM: KeyboardInterrupt at once. While `waits` is set, only `asked` is set,
    and a second one a second later is raised (launchers send the first one twice)."""
    asked, since, waits = 0, 0.0, False

    def __call__(self, number: int, _) -> None:
        if not self.asked:
            self.since = time.monotonic()
        self.asked = number
        if not self.waits or time.monotonic() - self.since > 1:
            raise KeyboardInterrupt

    def look(self) -> None:
        if self.asked:
            raise Interrupted

    @contextlib.contextmanager
    def now(self):
        """While others wait: a block that can be left anywhere."""
        self.waits = False
        try:
            self.look()
            yield
        except KeyboardInterrupt:
            raise Interrupted from None
        finally:
            self.waits = True


interrupts = Interrupts()


@contextlib.contextmanager
def main_guard():
    """Around a program's main(): a mistake of the user or of the disk is one line on stderr and exit status
    2; SIGTERM and Ctrl-C are one line and, as shells have it, 128 + the signal."""
    old = {number: signal.signal(number, interrupts) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"interrupted{str(error) and ': '}{error}", file=sys.stderr)
        sys.exit(128 + (interrupts.asked or signal.SIGINT))
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
