"""What an answer is worth, by the dataset that asked. Every scorer is `scorer(answer, example)`: True, False,
or None where that cannot be decided. The dataset decides which (SCORERS), never a file's name. An empty
answer is wrong everywhere.

Plain exact and prefix match, which every dataset has, are in eval.py.
"""
import re
import sqlite3
import string
import time
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path

from tasks import regexes as derivatives
from data import Dataset, Example
from support.files import BadInput, interrupts


def same_language(answer: str, example: Example) -> bool | None:
    """NL-RX: the two regexes describe the same set of strings, decided by derivatives.py. What does not parse
    is wrong; None: not decided within bounds."""
    try:
        return derivatives.equal(answer, example.code).equal
    except ValueError:
        return False


NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?"


def final_number(solution: str) -> Decimal | None:
    """The number behind the first "####", if it is the only one on that line."""
    found = re.match(rf"[ \t]*(-?)\$?[ \t]*({NUMBER})([^\n]*)", solution.partition("####")[2])
    if found is None or re.search("[0-9]", found[3]):
        return None
    return Decimal(found[1] + found[2].replace(",", ""))


def final_answer(answer: str, example: Example) -> bool:
    """GSM8K: the number behind the first "####" equals the target's. Commas between thousands, a dollar sign
    in front and a unit behind do not count, 18.0 is 18; a second number on the line is hedging, and wrong. So
    is an answer without the marker, even if the right number stands in it."""
    return (number := final_number(answer)) is not None and number == final_number(example.code)


def choice(answer: str, example: Example) -> bool:
    """rotten_tomatoes, yelp, hellaswag: the word or letter itself, whatever its case; white space around it
    and one mark of ")" or "." behind it do not count, anything else does ("Good film" is no answer)."""
    return re.sub(r"[.)]$", "", answer.strip()).casefold() == example.code.casefold()


def plain_words(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def any_of(answer: str, example: Example) -> bool:
    """nq_open: the answer is one of the target's, or several of them; "; " separates them. Case, punctuation
    and articles do not count (the usual rule of open question answering). A part that is none of the target's
    makes the answer wrong; so does one with nothing left, unless it is the target's as it stands."""
    def parts(text: str) -> set[str]:
        return {plain_words(part) or part.strip() for part in text.split("; ")}
    return bool(answer.strip()) and parts(answer) <= parts(example.code) - {""}


# ---- Spider: what the query returns ------------------------------------------------------------------------

MAX_STEPS, MAX_SECONDS = 50_000_000, 30  # of SQLite's machine; of the clock
MAX_ROWS, MAX_COLUMNS = 100_000, 200
MAX_BYTES, MAX_RESULT, MAX_MEMORY = 10_000, 50 << 20, 256 << 20  # of a value, a result, all of SQLite
LOOK = 100  # steps between two looks at the bounds: with values this short, none of them takes long
READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}


def run_query(database: Path, query: str) -> tuple[int, list[tuple]] | None:
    """(columns, rows) of a single SELECT, or None if it fails, is none, or is out of bounds.

    The file is opened read-only, and nothing but reading is authorized: no write, attach, pragma, extension
    or temporary file. What ends an endless query is nearly always MAX_STEPS, so that the verdict is the same
    on every machine; MAX_SECONDS is for steps that are slow by themselves.
    """
    try:
        connection = sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
    except sqlite3.Error as error:
        raise BadInput(f"{database}: {error}") from None
    try:
        connection.text_factory = bytes  # some of Spider's text is not UTF-8
        connection.execute(f"PRAGMA hard_heap_limit={MAX_MEMORY}")
        connection.execute("PRAGMA temp_store=MEMORY")
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_BYTES)
        connection.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, MAX_COLUMNS)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 100)
        connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in READS
                                  else sqlite3.SQLITE_DENY)
        looks, end = iter(range(MAX_STEPS // LOOK)), time.monotonic() + MAX_SECONDS
        connection.set_progress_handler(lambda: next(looks, None) is None or time.monotonic() > end, LOOK)
        cursor, rows, size = connection.execute(query), [], 0
        for row in cursor:
            rows.append(row)
            size += sum(len(value) for value in row if isinstance(value, bytes))
            if len(rows) > MAX_ROWS or size > MAX_RESULT:
                return None
        return (len(cursor.description), rows) if cursor.description else None  # an empty statement has none
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError):
        if interrupts.asked:  # SQLite made an error of its own of the KeyboardInterrupt
            raise KeyboardInterrupt from None
        return None
    finally:
        connection.close()


def database_of(example: Example, databases: Path) -> Path:
    """The file of an example's database; BadInput if it is missing or no database."""
    found = re.match(r"For db_id:\[(\w+)\]", example.text)
    if not found:
        raise BadInput(f"{example.where}: does not begin with For db_id:[...]")
    path = databases / found[1] / f"{found[1]}.sqlite"
    if not path.is_file():
        raise BadInput(f"{path}: no such database; run `python data.py download spider --data_dir ...`")
    with open(path, "rb") as file:
        if file.read(16) != b"SQLite format 3\0":
            raise BadInput(f"{path}: not a SQLite database; remove {databases.parent} and download it again")
    return path


def same_result(answer: str, example: Example, databases: Path) -> bool | None:
    """Spider: answer and target, run on the example's database, return the same rows with the same columns in
    the same order; the order of rows counts where the target has ORDER BY. A query that fails, writes, runs
    too long or returns too much is wrong, whatever the target returns; None if the target itself does."""
    database = database_of(example, databases)
    ours, theirs = run_query(database, answer), run_query(database, example.code)
    if ours is None or theirs is None:
        return False if theirs is not None else None
    if re.search(r"\border\s+by\b", example.code, re.IGNORECASE):
        return ours == theirs
    return ours[0] == theirs[0] and Counter(ours[1]) == Counter(theirs[1])


def databases_in(data_dir: str | Path) -> Path:
    return Path(data_dir) / "spider_data" / "database"


def check_databases(data: Dataset) -> None:
    """BadInput if a database is missing that scoring will need: to be called before any work."""
    if data.name == "spider":
        for example in data.test:
            database_of(example, databases_in(data.folder))


# ---- which is whose ----------------------------------------------------------------------------------------

SCORERS = {"nlrx_synth": ("dfa_equal", same_language), "nlrx_turk": ("dfa_equal", same_language),
           "gsm8k": ("correct", final_answer), "spider": ("correct", same_result),
           "rotten_tomatoes": ("correct", choice), "yelp": ("correct", choice),
           "hellaswag": ("correct", choice), "nq_open": ("correct", any_of)}


def scorer_of(dataset: str, data_dir: str | Path) -> tuple[str, Callable] | None:
    """(column, scorer) of a dataset; None: it has no more than exact and prefix."""
    column, scorer = SCORERS.get(dataset, (None, None))
    if scorer is same_result:
        scorer = partial(same_result, databases=databases_in(data_dir))
    return column and (column, scorer)
