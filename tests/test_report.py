"""report.py: seeds together, arms apart, differences with honest intervals; and --match_flops."""
import json
import sys

import numpy as np
import pytest
from test_train import argv  # noqa: F401 (a fixture)

import eval
import train
from eval import to_hex
from support.files import BadInput
from experiments.compare import compare, comparison, from_hex, paired_interval, read_result


def result(seed, exact, test="abc", files=("t", "u"), init=(), init_run="", **changed):
    """What an eval.json holds, as far as tables look at it."""
    return {"config": {"dataset": "d", "n_train": 0, "eval_split": "test", "lam": 1.0, "k": 1, "seed": seed,
                       "train_eos": True, "match_flops": "", "init_from": "", "device": "cpu", **changed},
            "init": list(init), "init_run": init_run, "dtype": "bfloat16", "n": len(exact), "test": test,
            "files": list(files), "exact": float(np.mean(exact)), "items": {"exact": to_hex(exact)},
            "trained": {"examples": 10, "flops": 2e15, "seconds": 1.0}}


def test_verdicts_survive_packing():
    for n in (1, 7, 8, 9, 2000):
        flags = np.random.default_rng(n).random(n) < 0.5
        assert from_hex(to_hex(flags.tolist()), n).tolist() == flags.tolist()


def test_interval_of_one_seed_is_that_of_its_items():
    """1.96 standard errors of the mean of the paired differences."""
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 1, 2000)) < 0.8
    mean, low, high = paired_interval(a, b)
    d = a.astype(float) - b
    error = d.std(ddof=1) / np.sqrt(2000)
    assert mean == pytest.approx(d.mean())
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error))
    assert paired_interval(a, a) == (0, 0, 0)
    assert paired_interval(a[:, :1], b[:, :1])[1:] == (-1, 1)  # a single item says nothing


def test_interval_grows_with_what_seeds_differ_in():
    """All items of a seed move together: Student's interval of four seeds, not of 8,000 items, decides."""
    plain = np.zeros((4, 2000), bool)
    ours = np.repeat([[True], [False], [True], [False]], 2000, axis=1)
    mean, low, high = paired_interval(ours, plain)
    assert (mean, low, high) == pytest.approx((0.5, 0.5 - 3.182 / 12**0.5, 0.5 + 3.182 / 12**0.5))


def draw_two_arms(rng, S, of_seeds, of_items, N=1000):
    """Verdicts of two arms that differ by nothing in the mean: items are easy or hard, to an arm and a seed
    of it a little more or less so, and every single answer has luck of its own."""
    easy, favour = rng.normal(2.5, 3, N), rng.normal(0, of_items, N)
    return [easy + sign * favour + rng.normal(0, of_seeds, (S, 1)) + rng.normal(0, 1, (S, N)) > 0
            for sign in (-1, 1)]


@pytest.mark.parametrize("S,of_seeds,of_items", [
    (1, 0, 0), (3, 0, 0), (3, 0.4, 0.5), (5, 0, 0), (5, 0, 0.5), (5, 0.1, 0), (5, 0.4, 0.5)])
def test_interval_holds_the_truth_as_often_as_it_says(S, of_seeds, of_items):
    rng, trials = np.random.default_rng(0), 500
    intervals = [paired_interval(*draw_two_arms(rng, S, of_seeds, of_items)) for _ in range(trials)]
    held = sum(low <= 0 <= high for _, low, high in intervals) / trials
    print(f"{held:.1%} of {trials}")
    assert 0.92 <= held <= 0.98


@pytest.mark.parametrize("S,of_seeds,least,most", [(3, 0.4, 0.6, 0.85), (5, 0.0, 0.98, 1)])
def test_why_it_is_no_bootstrap(S, of_seeds, least, most):
    """Over both seeds and items: too narrow where seeds differ, too wide where they do not."""
    rng, trials, held = np.random.default_rng(0), 200, 0
    for _ in range(trials):
        a, b = draw_two_arms(rng, S, of_seeds, 0)
        difference = a.astype(float) - b
        means = [difference[rng.integers(S, size=S)].mean(0)[rng.integers(1000, size=1000)].mean()
                 for _ in range(400)]
        low, high = np.quantile(means, [0.025, 0.975])
        held += low <= 0 <= high
    print(f"{held / trials:.1%} of {trials}")
    assert least <= held / trials <= most


def test_seeds_are_one_arm_and_differences_are_paired():
    a, b, c = [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]
    rows = compare({"p1": result(1, a, lam=0.0, k=0), "p2": result(2, b, lam=0.0, k=0),
                    "j1": result(1, c), "j2": result(2, c), "j3": result(3, a),
                    "n1": result(1, a, train_eos=False), "q1": result(1, c, match_flops="p1")})
    assert [row["seeds"] for row in rows] == [[1, 2], [1, 2, 3], [1], [1]]
    assert rows[0]["columns"]["exact"] == {"mean": 0.375, "std": pytest.approx(np.std([.5, .25], ddof=1))}
    assert rows[0]["minus"] == {}  # it is the plain one
    assert rows[1]["minus"]["exact"]["mean"] == pytest.approx(0.375)  # of seeds 1 and 2 alone
    assert rows[1]["minus"]["exact"]["seeds"] == [1, 2]
    assert rows[2]["minus"] == {}  # there is no plain arm whose end token is not trained
    assert rows[3]["minus"]["exact"]["mean"] == pytest.approx(0.25)
    assert rows[1]["arm"] == "lam 1.0, k 1, train_eos True, match_flops False" and json.dumps(rows)
    lines = comparison(rows).splitlines()
    assert "| 37.50 ± 17.68 |" in lines[2] and "| +37.50 [" in lines[3] and len(lines) == 6
    assert "(2 seeds)" in lines[3] and "seeds)" not in lines[5]  # three have run, two are paired


def test_a_baseline_of_equal_operations_if_there_is_no_other():
    """Whatever the order; its --epochs say nothing."""
    jepa = result(1, [1, 1, 1, 0], epochs=4)
    long = result(1, [1, 0, 0, 0], lam=0.0, epochs=3, match_flops="x")
    plain = result(1, [1, 1, 0, 0], lam=0.0, epochs=4, log_every=7)
    for runs, mean in (([jepa, long], 0.5), ([jepa, long, plain], 0.25), ([plain, long, jepa], 0.25)):
        rows = compare({str(i): run for i, run in enumerate(runs)})
        assert rows[-1]["minus"]["exact"]["mean"] == mean


def test_names_of_many_arms_leave_out_what_most_share():
    arms = {"p": {"lam": 0.0, "k": 0}, "j": {}, "l": {"lam": 0.1}, "e": {"train_eos": False}}
    rows = compare({name: result(1, [1, 0], **changed) for name, changed in arms.items()})
    assert [row["arm"] for row in rows] == [
        "lam 0.0, k 0", "lam 1.0", "lam 0.1", "lam 1.0, train_eos False"]  # k 1: three of four
    rows = compare({name: result(1, [1, 0], **changed) for name, changed in (arms | {"m": {"k": 2}}).items()}
                   | {str(i): result(1, [1, 0], gamma=i) for i in range(3)})
    assert rows[0]["arm"] == "lam 0.0, k 0" and len({row["arm"] for row in rows}) == len(rows) == 8


def test_equal_operations_need_no_equal_epochs():
    """A run of --match_flops ignores --epochs: they neither hide its baseline nor set it apart."""
    plain = result(1, [1, 1, 0, 0], lam=0.0, epochs=4, max_steps=0)
    jepa = result(1, [1, 1, 1, 0], epochs=3, max_steps=0, match_flops="plain")
    rows = compare({"p": plain, "j": jepa, "k": result(2, [1, 0, 0, 0], epochs=2, match_flops="q")})
    assert [row["seeds"] for row in rows] == [[1], [1, 2]] and "epochs" not in rows[1]["arm"]
    assert rows[1]["minus"]["exact"]["mean"] == 0.25
    two = compare({"p": plain, "p8": plain | {"config": plain["config"] | {"epochs": 8}}, "j": jepa})
    assert two[2]["minus"] == {}  # of which? --against says


def test_a_chosen_baseline_and_runs_for_bases():
    """Each seed begins with a run of its own; other weights in a folder of the same name are another arm."""
    runs = {"s": result(1, [0, 0, 0, 0], lam=0.0)}
    for seed in (1, 2):
        runs[f"p{seed}"] = result(seed, [1, 0, 0, 0], lam=0.0, init=[f"p{seed}"], init_run="p", init_from="p")
        runs[f"j{seed}"] = result(seed, [1, 1, 1, 0], lam=0.0, init=[f"j{seed}"], init_run="j", init_from="j")
    rows = compare(runs, "p2")
    assert [(row["arm"], row["seeds"], row["against"]) for row in rows] == [
        ("init_from ", [1], "init_from p"), ("init_from p", [1, 2], None),
        ("init_from j", [1, 2], "init_from p")]
    assert [row["minus"].get("exact", {}).get("mean") for row in rows] == [-0.25, None, 0.5]
    assert "exact - baseline" in comparison(rows, "baseline")
    assert len(compare({str(x): result(x, [1], init=[x], init_from="base") for x in (1, 2)})) == 2
    with pytest.raises(BadInput, match="--against x: not one of the runs"):
        compare(runs, "x")


@pytest.mark.parametrize("other,message", [
    (result(2, [1, 0], test="x"), "^b and a: not the same test set"),
    (result(2, [1, 0], files=("t", "v")), "^b and a: not the same training data"),
    (result(2, [1, 0], n_train=5), "^b and a: not the same training data"),
    (result(1, [1, 0]), "^b: seed 1 of these settings is there twice"),
])
def test_what_cannot_be_compared_is_refused(other, message):
    with pytest.raises(BadInput, match=message):
        compare({"a": result(1, [1, 0]), "b": other})


def test_results_of_older_versions_are_refused(tmp_path):
    (tmp_path / "eval.json").write_text('{"exact": 0.5}')
    with pytest.raises(BadInput, match="eval.json: not a run's, damaged, or an older version's"):
        read_result(tmp_path)


def test_equal_operations_and_the_table_of_runs(argv, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Plain training that may take as many operations as the JEPA run stops at the first step that reaches
    them; the table says what each took."""
    runs = {name: str(tmp_path / name) for name in ("jepa", "plain", "matched")}
    jepa = train.train(train.parse_config([*argv, "--out", runs["jepa"]]))
    plain = train.train(train.parse_config([*argv, "--lam", "0", "--out", runs["plain"]]))
    at = argv.index("--epochs")
    matched = train.train(train.parse_config([*argv[:at], *argv[at + 2:], "--lam", "0", "--match_flops",
                                              runs["jepa"], "--out", runs["matched"]]))
    took = jepa["trained"]["flops"]
    rows = [json.loads(line) for line in open(runs["matched"] + "/metrics.jsonl") if "loss" in line]
    assert plain["trained"]["flops"] < 0.9 * took and rows[-2]["flops"] < took <= rows[-1]["flops"]
    assert rows[-1]["flops"] == matched["trained"]["flops"] and rows[-1]["lr"] < 1e-5
    assert plain["trained"]["examples"] == jepa["trained"]["examples"] < matched["trained"]["examples"]
    budget = json.loads((tmp_path / "matched" / "run.json").read_text())["budget"]
    assert budget == took and matched["config"]["match_flops"] == "jepa"  # a name, no place
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["eval.py", *runs.values(), "--json", str(tmp_path / "t.json")])
    eval.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and lines[0].startswith(f"{argv[1]}, test, 12 items; one seed")
    rows = json.loads((tmp_path / "t.json").read_text())
    assert [len(row["minus"]) > 0 for row in rows] == [False, False, True]
    arms = [runs["jepa"], runs["matched"]]
    monkeypatch.setattr(sys, "argv", ["eval.py", *arms, "--against", arms[0] + "/"])
    eval.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{argv[1]}, test, 12 items; baseline: the arm of {arms[0]}; one seed")
    assert "exact - baseline" in lines[2]


def test_a_stored_score_can_be_shown_alone(tmp_path, monkeypatch, capsys):
    """As results/ has them: an eval.json without its run."""
    (tmp_path / "eval.json").write_text(json.dumps(result(1, [1, 0])))
    monkeypatch.setattr(sys, "argv", ["eval.py", str(tmp_path)])
    eval.main()
    assert "| all | 1     | 50.00 |" in capsys.readouterr().out
