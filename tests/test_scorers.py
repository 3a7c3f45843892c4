"""tasks/scorers.py: every scorer against answers that try to look right."""
import sqlite3
import time

import pytest
from conftest import SHARED_DATA, peak

import eval
from eval import EvalOptions
from support.files import BadInput
from support.settings import run_name
from tasks import scorers
from tasks.datasets import Dataset, Example, read_jsonl
from tasks.scorers import MAX_ROWS, OF_DATASET, SCORERS, any_of, check_databases, choice, final_answer
from tasks.scorers import run_query, same_language, same_result, scorer_of
from train import parse_config, train


@pytest.mark.parametrize("scorer,target,right,wrong", [
    (same_language, "(a)|(b)", ["(b)|(a)", "a|b", "(a)|(b)|(a)", "~(~((a)|(b)))"],
     [" (a)|(b)", "(a)|(b", "(a)|(b)(a)|(b)", ")(" * 2000, "(" * 10**5]),  # what does not parse is wrong
    (final_answer, "She has <<16-3=13>>13 eggs and 1,200 hens.\n#### 1,450",
     ["She has <<16-3=13>>13 eggs and 1,200 hens.\n#### 1,450", "#### 1450", "so it is\n#### 1450.00",
      "#### $1,450", "#### 1450 eggs", "####1450", "#### $ 1450", "#### 1450\nAnother question: 3"],
     ["which?", "1450", "The answer is 1,450.", "#### 1451", "#### -1450", "#### 14500", "#### 1450 or 1451",
      "#### 1451\n#### 1450", "#### ", "#### eggs", "####\n1450", "#### 1,45,0", "#### 1 450", "#### 1450/2",
      "#### 1e450", "#### \u0661\u0664\u0665\u0660", "#### " + "9" * 100_000, "####" * 100_000,
      "#### " + "1,111" * 50_000]),
    (final_answer, "#### -3", ["#### -3 degrees", "#### -$3"], ["#### 3"]),
    (choice, "Good", ["Good", "good", " Good\n", "Good."], [
        "Bad", "Good film", "Very Good", "GoodBad", "Good or Bad", "Good\nBad", ".", "Is it Good?", "Goo"]),
    (choice, "Bad", ["Bad"], ["Very Bad", "Not Bad"]), (choice, "Very Good", ["Very Good"], ["Good", "Very"]),
    (choice, "A", ["A", "A)", "a.", " A "],
     ["B", "AB", "A B C D", "A) or B)", "A))", "Likewise", "A) Likewise"]),
    (any_of, "July 2012; July 28, 2012; mortarboard",
     ["July 2012", "july 28 2012", "The Mortar-Board", "  July\u00a02012 ", "July 2012; July 28, 2012",
      "July 28, 2012; the mortarboard"],
     ["the", "...", "; ", "2012", "July 2012; 1999", "July 2012; ", "July 2012 and more", "which?"]),
    (choice, "positive.", ["positive.", "Positive"], ["positive.."]),
    (same_language, "()", ["()", "(())"], ["a"]),  # the empty string, but no empty answer
    (any_of, "a; an; ", ["a", "A", "an; a"], ["the", "..."])])
def test_answers(scorer, target, right, wrong):
    """An empty answer is wrong: the official scorer of nq_open counts it as right."""
    began = time.perf_counter()
    for answer in right:
        assert scorer(answer, "which?", target) is True, answer
    for answer in ["", " ", "  \n ", *wrong]:
        assert scorer(answer, "which?", target) is False, answer
    assert time.perf_counter() - began < 2


def test_a_target_that_is_no_regex_decides_nothing():
    assert same_language("(?:a)", "", "(?:a)") is same_language("a", "", "a" * 1001) is None


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the published files are not here")
def test_every_published_target_is_right():
    """By its own scorer; a sign alone, "/", too."""
    for name in ("gsm8k", "nq_open", "rotten_tomatoes", "yelp", "hellaswag"):
        _, scorer = scorer_of(Dataset(name, [], [], "published", {}))
        assert all(scorer(e.code, e.text, e.code) is True
                   for e in read_jsonl(SHARED_DATA / f"{name}_test.jsonl")), name


# ---- Spider ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """With a database of four pets."""
    folder = tmp_path_factory.mktemp("data")
    path = folder / "spider_data" / "database" / "pets" / "pets.sqlite"
    path.parent.mkdir(parents=True)
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE pet (id INTEGER, name TEXT, age REAL)")
        connection.executemany("INSERT INTO pet VALUES (?, ?, ?)",
                               [(1, "Rex", 3.0), (2, "Tom", 5.5), (3, "Rex", 1.0), (4, b"\xff\xfe", None)])
    connection.close()
    return folder


@pytest.fixture(scope="module")
def databases(data_dir):
    return data_dir / "spider_data" / "database"


ASKED = "For db_id:[pets]\n\nWhich?"
COUNT, NAMES, OLD = "SELECT count(*) FROM pet", "SELECT name FROM pet", "SELECT name FROM pet WHERE age > 100"
BROKEN = "SELECT x FROM none"


@pytest.mark.parametrize("target,answer,right", [
    (NAMES, "select name from pet order by age", True),  # order counts if the target has one
    (NAMES + " ORDER BY age", NAMES + " ORDER BY age", True),
    (NAMES + " ORDER BY age", NAMES + " ORDER BY age DESC", False),
    (NAMES, "SELECT DISTINCT name FROM pet", False),  # rows are counted
    ("SELECT name, age FROM pet", "SELECT age, name FROM pet", False),
    (COUNT, "SELECT 4", True), (COUNT, "SELECT 4;", True),
    ("SELECT avg(age) FROM pet", "SELECT sum(age) / count(age) FROM pet", True),
    ("WITH p AS (SELECT * FROM pet) SELECT id FROM p", "SELECT id FROM pet", True),
    (COUNT, "", False), (COUNT, " \n", False), (COUNT, COUNT + " and more", False),
    (COUNT, COUNT + "; SELECT 4", False), (COUNT, ASKED, False), (COUNT, "SELECT 4 \x00", False),
    (COUNT, "SELECT '\ud800'", False), (OLD, "EXPLAIN " + OLD, False),
    (OLD, OLD, True), (OLD, "SELECT 1, 2 WHERE 0", False),  # other columns
    (BROKEN, BROKEN, None), (BROKEN, "SELECT 1", None)])  # a broken target is not the model's mistake
def test_spider(databases, target, answer, right):
    assert same_result(answer, ASKED, target, databases) is right


@pytest.mark.parametrize("answer", [
    "SELEC name", "SELECT nothing FROM pet", "SELECT 1 FROM none", "", "  ", ";", "-- nothing",
    "INSERT INTO pet VALUES (9, 'x', 1)", "UPDATE pet SET age = 0", "DELETE FROM pet", "DROP TABLE pet",
    "CREATE TABLE evil (x)", "CREATE TEMP TABLE evil (x)", "ATTACH DATABASE '/tmp/evil.sqlite' AS evil",
    "VACUUM", "VACUUM INTO '/tmp/evil.sqlite'", "PRAGMA writable_schema = 1", "PRAGMA table_info(none)",
    "SELECT load_extension('evil')", "SELECT writefile('/tmp/evil', 'x')", "BEGIN", "REINDEX", "ANALYZE",
    "SELECT * FROM pragma_table_info('pet') WHERE 0"])
def test_broken_sql_is_wrong_where_the_target_returns_nothing(databases, answer):
    """The official scorer ignores errors: two empty outputs are equal there. Nothing is ever written."""
    path = databases / "pets" / "pets.sqlite"
    before = path.read_bytes()
    assert run_query(path, answer) is None and same_result(answer, ASKED, OLD, databases) is False
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["pets.sqlite"]


FOR_EVER = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT %s FROM n"


@pytest.mark.parametrize("answer", [
    FOR_EVER % "count(*)", FOR_EVER % "i", FOR_EVER % "i" + " ORDER BY -i",
    FOR_EVER % "hex(randomblob(40000))", FOR_EVER % "group_concat(i)",
    FOR_EVER % "randomblob(90000)" + " ORDER BY 1",
    "SELECT zeroblob(2000000000)", "SELECT replace(hex(zeroblob(49000)), '0', hex(zeroblob(49000)))",
    f"SELECT a.id FROM {', '.join(f'pet {c}' for c in 'abcdefghijklmno')}",  # a billion rows
    "SELECT printf('%.*c', 2147483647, 'x')", "SELECT FORMAT('%2147483647d', 1)",
    f"{FOR_EVER % ', '.join(['1.5'] * 199)} LIMIT 100000",
    "SELECT 'a' LIKE '" + "%a" * 400_000 + "'",
    "SELECT hex(zeroblob(4900)) LIKE '" + "%0" * 4_000 + "1'",
    "SELECT length(trim(hex(zeroblob(900000)), replace(hex(zeroblob(900000)), '0', 'z')))",
    "SELECT " + "+".join(["length(trim(hex(zeroblob(4900)), replace(hex(zeroblob(2000)),'0','z')))"] * 25),
    FOR_EVER % "sum(length(trim(hex(zeroblob(4900)), replace(hex(zeroblob(2000)),'0','z'))))",
    "SELECT " + "(" * 100_000 + "1" + ")" * 100_000,
    "SELECT " + ", ".join(["randomblob(100000)"] * 2000)])
def test_sql_without_bound_ends(databases, monkeypatch, answer):
    """By the steps or by the clock, with a tenth of either: a step that takes long would be noticed, as
    printf's was, which wrote 2**31 letters; and in 300 MiB."""
    monkeypatch.setattr(scorers, "MAX_STEPS", scorers.MAX_STEPS // 10)
    monkeypatch.setattr(scorers, "MAX_SECONDS", scorers.MAX_SECONDS // 10)
    began = time.perf_counter()
    assert peak(lambda: same_result(answer, ASKED, "SELECT 1", databases) and 1 / 0) < 300 << 20
    assert time.perf_counter() - began < 10  # seconds, on a busy machine


def test_the_bounds_on_rows_and_seconds(databases, monkeypatch):
    query = FOR_EVER % "i" + " LIMIT %d"
    assert same_result(query % MAX_ROWS, ASKED, query % MAX_ROWS, databases) is True
    assert same_result(query % (MAX_ROWS + 1), ASKED, query % (MAX_ROWS + 1), databases) is None
    monkeypatch.setattr(scorers, "MAX_STEPS", 10**12)
    monkeypatch.setattr(scorers, "MAX_SECONDS", 0.1)
    assert same_result(FOR_EVER % "count(*)", ASKED, COUNT, databases) is False


def test_missing_databases_are_found_before_any_work(data_dir, tmp_path):
    """Where the official scorer finds no database, both outputs are empty, and everything is right."""
    questions = [Example(ASKED, "SELECT 1")]
    check_databases(Dataset("spider", [], questions, "file", {}, data_dir))
    check_databases(Dataset("gsm8k", [], questions, "file", {}, tmp_path))  # which needs none
    data = Dataset("spider", [], questions, "file", {}, tmp_path)
    with pytest.raises(BadInput, match="pets.sqlite: no such database; .*`python data.py download spider"):
        check_databases(data)
    assert not list(tmp_path.iterdir())  # nor is an empty one made
    path = tmp_path / "pets" / "pets.sqlite"
    path.parent.mkdir(parents=True)
    for content, message in (("version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
                             ("hello", "not a SQLite database; remove it")):
        path.write_text(content)
        with pytest.raises(BadInput, match=f"pets.sqlite: {message}"):
            same_result("SELECT 1", ASKED, "SELECT 1", tmp_path)
    with pytest.raises(BadInput, match=r"^'For db_id:\[../pets\].*: does not begin with For db_id"):
        same_result("SELECT 1", ASKED.replace("pets", "../pets"), "SELECT 1", databases)


def test_every_dataset_has_its_scorer(data_dir, databases):
    def data(name, **options):
        return Dataset(name, [], [Example(ASKED, COUNT)], "file", {}, data_dir, **options)

    for spider in (data("spider"), data("my.jsonl", scorer="sql", databases=str(databases))):
        check_databases(spider)
        column, scorer = scorer_of(spider)
        assert column == "correct" and scorer("SELECT 4", ASKED, COUNT) is True
    assert scorer_of(data("my.jsonl")) is None and scorer_of(data("paraphrase")) is None
    assert scorer_of(data("my.jsonl", scorer="regex")) == ("dfa_equal", same_language)
    with pytest.raises(BadInput, match="^--scorer sql needs --databases"):
        check_databases(data("my.jsonl", scorer="sql"))
    assert {name: SCORERS[scorer][1] for name, scorer in OF_DATASET.items()} == {
        "nlrx_synth": same_language, "nlrx_turk": same_language, "gsm8k": final_answer, "spider": same_result,
        "rotten_tomatoes": choice, "yelp": choice, "hellaswag": choice, "nq_open": any_of}


def test_a_file_of_ones_own_with_a_scorer(pairs, small_run, tmp_path):
    """In training, in scoring the run again, and for a model and a file; and the run's name says it."""
    run = tmp_path / "run"
    c = parse_config([*small_run, "--scorer", "regex", "--max_steps", "1", "--out", str(run)])
    assert "scorerregex" in run_name(c, {}) and "scorer" not in run_name(parse_config(small_run), {})
    score = train(c)["dfa_equal"]
    assert eval.score_run(run, EvalOptions())["dfa_equal"] == score
    own = {"dataset": str(pairs / "train.jsonl"), "test_file": str(pairs / "test.jsonl")}
    assert "dfa_equal" not in eval.score_model(run, EvalOptions(**own))
    assert eval.score_model(run, EvalOptions(**own, scorer="regex", max_new_tokens=4))["dfa_equal"] == score
