"""Is an answer right? A scorer is `scorer(answer, text, code)`: True, False, or None where that cannot be
decided. `text` is the question and `code` the target. An empty answer is wrong everywhere.

The dataset's name decides which scorer is used (OF_DATASET), or, for a file of one's own, --scorer. Exact and
prefix match, which need none, are in eval.py.
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

from support.files import BadInput, interrupts, refuse_other_kinds
from tasks import regexes
from tasks.datasets import Dataset


def same_language(answer: str, text: str, code: str) -> bool | None:
    """NL-RX: do both regexes describe the same strings? None if regexes.py cannot tell within its bounds, or
    cannot read the target. An answer that does not parse is wrong."""
    try:
        equal = regexes.equal(answer, code).equal
        return answer != "" and equal
    except ValueError:
        pass  # one of the two does not parse
    try:
        regexes.parse(code)
        return False
    except ValueError:
        return None


NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?"


def final_number(solution: str) -> Decimal | None:
    """The number after the first "####", if it is the only one on that line."""
    found = re.match(rf"[ \t]*(-?)\$?[ \t]*({NUMBER})([^\n]*)", solution.partition("####")[2])
    if found is None or re.search("[0-9]", found[3]):
        return None
    return Decimal(found[1] + found[2].replace(",", ""))


def final_answer(answer: str, text: str, code: str) -> bool:
    """GSM8K: the number after the first "####" is the target's. Thousands separators, a dollar sign before it
    and a unit after it are ignored, and 18.0 is 18. A second number on the line is hedging, so wrong."""
    return (number := final_number(answer)) is not None and number == final_number(code)


def choice(answer: str, text: str, code: str) -> bool:
    """rotten_tomatoes, yelp, hellaswag: the word or letter itself. Case, white space around it and one ")" or
    "." after it are ignored, and nothing else is."""
    def word(said: str) -> str:
        return re.sub(r"[.)]$", "", said.strip()).casefold()

    return word(answer) == word(code) != ""


def any_of(answer: str, text: str, code: str) -> bool:
    """nq_open: one of the target's answers, or several of them, separated by "; ", and nothing else. Case,
    punctuation and articles are ignored, but for a part of these alone."""
    def words(part: str) -> str:
        plain = "".join(c for c in part.lower() if c not in string.punctuation)
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split()) or part.strip().lower()

    def parts(answers: str) -> set[str]:
        return {words(part) for part in answers.split("; ")}

    return bool(answer.strip()) and parts(answer) <= parts(code) - {""}


# ---- Spider: what the query returns ------------------------------------------------------------------------

MAX_STEPS, MAX_SECONDS = 50_000_000, 30  # of SQLite's virtual machine; for steps that are slow by themselves
MAX_ROWS, MAX_COLUMNS = 100_000, 200
MAX_BYTES, MAX_RESULT, MAX_MEMORY = 10_000, 50 << 20, 256 << 20  # of a value, of a result, of SQLite
CHECK_EVERY = 100  # steps; with values this short, none of them takes long
VALUE = 32  # bytes that a value takes in Python, beside its text
WIDE = {"printf", "format"}  # functions that write 2**31 letters before they see that MAX_BYTES is exceeded
READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}


def run_query(database: Path, query: str) -> tuple[int, list[tuple]] | None:
    """(number of columns, rows) of one statement that only reads; None if it fails or exceeds a bound above.

    The authorizer allows reading alone: no write, attach, pragma, extension or temporary file. An endless
    query nearly always ends by MAX_STEPS, so the verdict does not depend on the machine's speed.
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
        connection.set_authorizer(lambda action, _, name, *__: sqlite3.SQLITE_OK if action in READS
                                  and str(name).lower() not in WIDE else sqlite3.SQLITE_DENY)
        checks, end = iter(range(MAX_STEPS // CHECK_EVERY)), time.monotonic() + MAX_SECONDS
        connection.set_progress_handler(lambda: next(checks, None) is None or time.monotonic() > end,
                                        CHECK_EVERY)
        cursor, rows, size = connection.execute(query), [], 0
        for row in cursor:
            rows.append(row)
            size += sum(VALUE + (len(value) if isinstance(value, bytes) else 0) for value in row)
            if len(rows) > MAX_ROWS or size > MAX_RESULT:
                return None
        return (len(cursor.description), rows) if cursor.description else None  # an empty statement has none
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError):
        if interrupts.raised:  # SQLite turns the KeyboardInterrupt in a callback into an error of its own
            raise KeyboardInterrupt from None
        return None
    finally:
        connection.close()


def database_of(text: str, databases: str | Path) -> Path:
    """The database that a question is about, DB_ID/DB_ID.sqlite in the folder `databases`; BadInput if its
    file is missing or not SQLite's."""
    found = re.match(r"For db_id:\[(\w+)\]", text)
    if not found:
        raise BadInput(f"{text[:40]!r}: does not begin with For db_id:[...]")
    path = Path(databases, found[1], f"{found[1]}.sqlite")
    if not path.is_file():
        raise BadInput(f"{path}: no such database; --databases must be the folder of DB_ID/DB_ID.sqlite, and "
                       "`python data.py download spider --data_dir ...` fetches Spider's")
    refuse_other_kinds(path)
    with open(path, "rb") as file:
        if file.read(16) != b"SQLite format 3\0":
            raise BadInput(f"{path}: not a SQLite database; remove it and put a whole one there")
    return path


def same_result(answer: str, text: str, code: str, databases: str | Path) -> bool | None:
    """Spider: run on the question's database, answer and target return the same columns and rows, in the same
    order if the target has ORDER BY. Wrong if run_query refuses the answer; None if it refuses the target."""
    database = database_of(text, databases)
    ours, theirs = run_query(database, answer), run_query(database, code)
    if ours is None or theirs is None:
        return False if theirs is not None else None
    if re.search(r"\border\s+by\b", code, re.IGNORECASE):
        return ours == theirs
    return ours[0] == theirs[0] and Counter(ours[1]) == Counter(theirs[1])


# ---- which dataset has which -------------------------------------------------------------------------------

SCORERS = {  # --scorer -> (column, scorer)
    "regex": ("dfa_equal", same_language), "gsm8k": ("correct", final_answer),
    "sql": ("correct", same_result), "choice": ("correct", choice), "any_of": ("correct", any_of)}
OF_DATASET = {"nlrx_synth": "regex", "nlrx_turk": "regex", "gsm8k": "gsm8k", "spider": "sql",
              "nq_open": "any_of", "rotten_tomatoes": "choice", "yelp": "choice", "hellaswag": "choice"}


def scorer_of(data: Dataset) -> tuple[str, Callable] | None:
    """(column, scorer) of a dataset; None if exact and prefix match are all it has."""
    column, scorer = SCORERS.get(data.scorer or OF_DATASET.get(data.name), (None, None))
    if scorer is same_result:
        scorer = partial(same_result, databases=databases_of(data))
    return column and (column, scorer)


def databases_of(data: Dataset) -> Path:
    return Path(data.databases) if data.databases else data.folder / "spider_data" / "database"


def check_databases(data: Dataset) -> None:
    """BadInput if a database is missing that scoring will need; call it before any work."""
    if (data.scorer or OF_DATASET.get(data.name)) == "sql":
        if data.scorer and not data.databases:
            raise BadInput("--scorer sql needs --databases, a folder of DB_ID/DB_ID.sqlite")
        for example in data.test:
            database_of(example.text, databases_of(data))
