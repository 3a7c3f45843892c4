"""scores.py: every scorer against answers that try to look right."""
import sqlite3
import time

import pytest

from conftest import SHARED_DATA

from data import Dataset, Example, read_jsonl
from support.files import BadInput
from tasks.scorers import MAX_ROWS, SCORERS, any_of, check_databases, choice, final_answer, same_language
from tasks.scorers import same_result, scorer_of

@pytest.mark.parametrize("answer,same", [
    ("(b)|(a)", True), ("a|b", True), ("(a)|(b)|(a)", True), ("~(~((a)|(b)))", True), (" (a)|(b)", False),
    ("(a)|(b", False), ("", False), ("(a)|(b)(a)|(b)", False), (")(" * 2000, False), ("(" * 10**5, False)])
def test_same_language(answer, same):
    """An answer that does not parse is wrong, never an error."""
    assert same_language(answer, Example("t", "(a)|(b)")) is same



GSM = Example("How much?", "She has <<16-3=13>>13 eggs and 1,200 hens.\n#### 1,450")


@pytest.mark.parametrize("answer,right", [
    ("#### 1450", True), ("#### 1,450", True), ("so it is\n#### 1450.00", True), ("#### $1,450", True),
    ("#### 1450 eggs", True), ("####1450", True),
    ("#### $ 1450", True), ("#### 1450\nAnother question: 3", True),
    (GSM.code, True),
    ("", False), ("  \n ", False), (GSM.text, False), ("1450", False), ("The answer is 1,450.", False),
    ("#### 1451", False), ("#### -1450", False), ("#### 14500", False), ("#### 1450 or 1451", False),
    ("#### 1451\n#### 1450", False), ("#### ", False), ("#### eggs", False), ("####\n1450", False),
    ("#### 1,45,0", False), ("#### 1 450", False), ("#### 1450/2", False), ("#### 1e450", False),
    ("#### \u0661\u0664\u0665\u0660", False), ("#### " + "9" * 100_000, False), ("####" * 100_000, False),
    ("#### " + "1,111" * 50_000, False)])
def test_gsm8k(answer, right):
    began = time.perf_counter()
    assert final_answer(answer, GSM) is right
    assert time.perf_counter() - began < 1


def test_gsm8k_negative():
    assert final_answer("#### -3 degrees", Example("t", "#### -3")) is True
    assert final_answer("#### -$3", Example("t", "#### -3")) is True
    assert final_answer("#### 3", Example("t", "#### -3")) is False


@pytest.mark.parametrize("target,right,wrong", [
    ("Good", ["Good", "good", " Good\n", "Good."], ["", " ", "Bad", "Good film", "Very Good", "GoodBad",
                                                    "Good or Bad", "Good\nBad", ".", "Is it Good?", "Goo"]),
    ("Bad", ["Bad"], ["Very Bad", "Not Bad"]), ("Very Good", ["Very Good"], ["Good", "Very"]),
    ("A", ["A", "A)", "a.", " A "], ["", "B", "AB", "A B C D", "A) or B)", "A))", "Likewise",
                                                "A) Likewise"])])
def test_choice(target, right, wrong):
    example = Example("which?", target)
    assert all(choice(answer, example) is True for answer in right)
    assert not any(choice(answer, example) for answer in wrong)


@pytest.mark.parametrize("answer,right", [
    ("July 2012", True), ("july 28 2012", True), ("The Mortar-Board", True), ("  July\u00a02012 ", True),
    ("", False), (" ", False), ("the", False), ("...", False), ("; ", False), ("2012", False),
    ("July 2012; July 28, 2012", True), ("July 28, 2012; the mortarboard", True), ("July 2012; 1999", False),
    ("July 2012; ", False), ("July 2012 and more", False), ("when?", False)])
def test_nq_open(answer, right):
    """An empty answer is wrong: the official scorer counts it as right."""
    assert any_of(answer, Example("when?", "July 2012; July 28, 2012; mortarboard")) is right
    assert any_of(answer, Example("when?", "a; an; ")) is False  # nor does it match an empty target


def test_every_target_is_right(tmp_path):
    """What stands in the published files is right by its own scorer; a sign alone, "/", too."""
    if not SHARED_DATA.exists():
        pytest.skip("the published files are not here")
    for name, (column, _) in SCORERS.items():
        if column == "correct" and name != "spider":
            examples = read_jsonl(SHARED_DATA / f"{name}_test.jsonl")
            _, scorer = scorer_of(name, tmp_path)
            assert all(scorer(e.code, e) is True for e in examples), name


# ---- Spider ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def databases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("databases")
    (folder / "pets").mkdir()
    connection = sqlite3.connect(folder / "pets" / "pets.sqlite")
    connection.execute("CREATE TABLE pet (id INTEGER, name TEXT, age REAL)")
    connection.executemany("INSERT INTO pet VALUES (?, ?, ?)",
                           [(1, "Rex", 3.0), (2, "Tom", 5.5), (3, "Rex", 1.0), (4, b"\xff\xfe", None)])
    connection.commit()
    connection.close()
    return folder


def ask(query):
    return Example("For db_id:[pets]\n\nWhich?", query, "spider_test.jsonl:1")


@pytest.mark.parametrize("target,answer,right", [
    ("SELECT name FROM pet", "select name from pet order by age", True),  # order counts if the target has one
    ("SELECT name FROM pet ORDER BY age", "SELECT name FROM pet ORDER BY age", True),
    ("SELECT name FROM pet ORDER BY age", "SELECT name FROM pet ORDER BY age DESC", False),
    ("SELECT name FROM pet", "SELECT DISTINCT name FROM pet", False),  # rows are counted
    ("SELECT name, age FROM pet", "SELECT age, name FROM pet", False),
    ("SELECT count(*) FROM pet", "SELECT 4", True),
    ("SELECT count(*) FROM pet", "SELECT 4;", True),
    ("SELECT avg(age) FROM pet", "SELECT sum(age) / count(age) FROM pet", True),
    ("WITH p AS (SELECT * FROM pet) SELECT id FROM p", "SELECT id FROM pet", True),
    ("SELECT count(*) FROM pet", "", False), ("SELECT count(*) FROM pet", " \n", False),
    ("SELECT count(*) FROM pet", "SELECT count(*) FROM pet and more", False),
    ("SELECT count(*) FROM pet", "SELECT count(*) FROM pet; SELECT 4", False),  # one statement only
    ("SELECT count(*) FROM pet", "For db_id:[pets]\n\nWhich?", False),
    ("SELECT count(*) FROM pet", "SELECT 4 \x00", False),
    ("SELECT count(*) FROM pet", "SELECT '\ud800'", False)])
def test_spider(databases, target, answer, right):
    assert same_result(answer, ask(target), databases) is right


EMPTY = "SELECT name FROM pet WHERE age > 100"


@pytest.mark.parametrize("answer", [
    "SELEC name", "SELECT nothing FROM pet", "SELECT 1 FROM none", "", "  ", ";", "-- nothing",
    "EXPLAIN SELECT 1",
    "INSERT INTO pet VALUES (9, 'x', 1)", "UPDATE pet SET age = 0", "DELETE FROM pet", "DROP TABLE pet",
    "CREATE TABLE evil (x)", "CREATE TEMP TABLE evil (x)", "ATTACH DATABASE '/tmp/evil.sqlite' AS evil",
    "VACUUM", "VACUUM INTO '/tmp/evil.sqlite'", "PRAGMA writable_schema = 1", "PRAGMA table_info(none)",
    "SELECT load_extension('evil')", "SELECT writefile('/tmp/evil', 'x')", "BEGIN", "REINDEX", "ANALYZE",
    "SELECT * FROM pragma_table_info('pet') WHERE 0"])
def test_broken_sql_is_wrong_where_the_target_returns_nothing(databases, answer):
    """The official scorer ignores errors: two empty outputs are equal there."""
    before = (databases / "pets" / "pets.sqlite").read_bytes()
    assert same_result(EMPTY, ask(EMPTY), databases) is True
    assert same_result("SELECT 1, 2 WHERE 0", ask(EMPTY), databases) is False  # other columns
    assert same_result(answer, ask(EMPTY), databases) is False
    assert (databases / "pets" / "pets.sqlite").read_bytes() == before
    assert [path.name for path in (databases / "pets").iterdir()] == ["pets.sqlite"]


def test_a_broken_target_is_nobody_s(databases):
    """It is counted as undecided, and not as the model's mistake alone."""
    assert same_result("SELECT x FROM none", ask("SELECT x FROM none"), databases) is None
    assert same_result("SELECT 1", ask("SELECT x FROM none"), databases) is None


FOR_EVER = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT %s FROM n"


@pytest.mark.parametrize("answer", [
    FOR_EVER % "count(*)", FOR_EVER % "i", FOR_EVER % "i" + " ORDER BY -i",
    FOR_EVER % "hex(randomblob(40000))", FOR_EVER % "group_concat(i)",
    FOR_EVER % "randomblob(90000)" + " ORDER BY 1",
    "SELECT zeroblob(2000000000)", "SELECT replace(hex(zeroblob(49000)), '0', hex(zeroblob(49000)))",
    f"SELECT a.id FROM {', '.join(f'pet {c}' for c in 'abcdefghijklmno')}",  # a billion rows
    "SELECT printf('%.*c', 200000000, 'x')", "SELECT 'a' LIKE '" + "%a" * 400_000 + "'",
    "SELECT " + "+".join(["length(trim(hex(zeroblob(4900)), replace(hex(zeroblob(2000)),'0','z')))"] * 25),
    FOR_EVER % "sum(length(trim(hex(zeroblob(4900)), replace(hex(zeroblob(2000)),'0','z'))))",
    "SELECT " + "(" * 100_000 + "1" + ")" * 100_000,
    "SELECT " + ", ".join(["randomblob(100000)"] * 2000)])
def test_sql_without_bound_ends(databases, answer):
    began = time.perf_counter()
    assert not same_result(answer, ask("SELECT 1"), databases)
    assert time.perf_counter() - began < 60  # seconds, on a busy machine


def test_the_bound_on_rows(databases):
    query = FOR_EVER % "i" + " LIMIT %d"
    assert same_result(query % MAX_ROWS, ask(query % MAX_ROWS), databases) is True
    assert same_result(query % (MAX_ROWS + 1), ask(query % (MAX_ROWS + 1)), databases) is None


def test_a_wrong_database_path(databases, tmp_path):
    """Where the official scorer finds no database, both outputs are empty, and everything is right."""
    with pytest.raises(BadInput, match="pets.sqlite: no such database; run `python data.py download spider"):
        same_result("SELECT 1", ask("SELECT 1"), tmp_path)
    with pytest.raises(BadInput, match="spider_test.jsonl:1: does not begin with"):
        same_result("SELECT 1", Example("For db_id:[../pets]\n\nWhich?", "SELECT 1", "spider_test.jsonl:1"),
                    databases)
    assert not list(tmp_path.iterdir())  # nor is an empty one made
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets" / "pets.sqlite").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(BadInput, match="pets.sqlite: not a SQLite database; remove .* and download it again"):
        same_result("SELECT 1", ask("SELECT 1"), tmp_path)


def test_databases_are_looked_for_before_any_work(tmp_path):
    with pytest.raises(BadInput, match="no such database"):
        check_databases(Dataset("spider", [], [ask("SELECT 1")], "file", {}, tmp_path))
    check_databases(Dataset("gsm8k", [], [ask("SELECT 1")], "file", {}, tmp_path))


def test_every_dataset_has_its_scorer(databases, tmp_path):
    folder = databases.parent / "spider_data"
    if not folder.exists():
        folder.mkdir()
        databases.rename(folder / "database")
    column, scorer = scorer_of("spider", databases.parent)
    assert column == "correct" and scorer("SELECT 4", ask("SELECT count(*) FROM pet")) is True
    assert scorer_of("my.jsonl", tmp_path) is None and scorer_of("paraphrase", tmp_path) is None
    assert set(SCORERS) == {"nlrx_synth", "nlrx_turk", "gsm8k", "spider", "rotten_tomatoes", "yelp",
                            "hellaswag", "nq_open"}
