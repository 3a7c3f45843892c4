"""experiments/compare.py: seeds together, variants apart, differences with honest intervals."""
import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
from conftest import ROOT
from test_settings import NewConfig
from test_train import go

import train
from experiments import compare as program
from experiments.compare import baseline_of, compare, comparison, paired_interval, read_result, variants_of
from support.files import BadInput
from support.settings import fill
from support.tables import to_hex

RESULTS = ROOT / "experiments" / "results"


def result(seed, exact, test="abc", files=("t", "u"), init=(), init_run="", **changed):
    """What read_result returns, as far as tables look at it."""
    config = fill(train.Config, {"seed": seed, **changed}, train.FORMER)
    return {"config": config, "init": list(init), "init_run": init_run, "dtype": "bfloat16", "n": len(exact),
            "test": test, "files": list(files), "exact": float(np.mean(exact)),
            "items": {"exact": to_hex(exact)}, "trained": {"examples": 10, "flops": 2e15, "seconds": 1.0}}


def plain(seed, exact, **changed):
    return result(seed, exact, **{"lam": 0.0, "k": 0, **changed})


def means(rows):
    return [row["minus"].get("exact", {}).get("mean") for row in rows]


# ---- intervals ---------------------------------------------------------------------------------------------

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
    ours = np.repeat([[True], [False], [True], [False]], 2000, axis=1)
    mean, low, high = paired_interval(ours, np.zeros((4, 2000), bool))
    assert (mean, low, high) == pytest.approx((0.5, 0.5 - 3.182 / 12**0.5, 0.5 + 3.182 / 12**0.5))


def draw_two_variants(rng, S, of_seeds, of_items, N=1000):
    """Verdicts of two variants of the same accuracy: items are easy or hard, a little more or less so for a
    variant and for a seed of it, and every single answer has luck of its own."""
    easy, favour = rng.normal(2.5, 3, N), rng.normal(0, of_items, N)
    return [easy + sign * favour + rng.normal(0, of_seeds, (S, 1)) + rng.normal(0, 1, (S, N)) > 0
            for sign in (-1, 1)]


@pytest.mark.parametrize("S,of_seeds,of_items", [
    (1, 0, 0), (3, 0, 0), (3, 0.4, 0.5), (5, 0, 0), (5, 0, 0.5), (5, 0.1, 0), (5, 0.4, 0.5)])
def test_interval_holds_the_truth_as_often_as_it_says(S, of_seeds, of_items):
    rng, trials = np.random.default_rng(0), 500
    intervals = [paired_interval(*draw_two_variants(rng, S, of_seeds, of_items)) for _ in range(trials)]
    held = sum(low <= 0 <= high for _, low, high in intervals) / trials
    print(f"{held:.1%} of {trials}")
    assert 0.92 <= held <= 0.98


# ---- variants and their baselines --------------------------------------------------------------------------

def test_seeds_are_one_variant_and_differences_are_paired():
    a, b, c = [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]
    results = {"p1": plain(1, a), "p2": plain(2, b), "j1": result(1, c), "j2": result(2, c),
               "j3": result(3, a), "n1": result(1, a, train_eos=False), "i1": result(1, a, alpha=0.5)}
    rows = compare(results)
    assert [row["seeds"] for row in rows] == [[1, 2], [1, 2, 3], [1], [1]]
    assert rows[0]["columns"]["exact"] == [0.375, pytest.approx(np.std([.5, .25], ddof=1))]
    # of seeds 1 and 2 alone; no plain variant has the labels of the third
    assert means(rows) == [None, pytest.approx(0.375), None, 0]
    assert rows[1]["minus"]["exact"]["seeds"] == [1, 2] and json.dumps(rows)
    lines = comparison(results).splitlines()[2:]
    assert "| 37.50 ± 17.68 |" in lines[2] and "| +37.50 [" in lines[3] and len(lines) == 6
    assert "(2 seeds)" in lines[3]  # three have run, two are paired
    assert lines[5].startswith("| alpha 0.5 ") and "| identical " in lines[5]
    assert comparison(results, narrow=True).splitlines()[2].split() == (
        "| variant | seeds | exact | exact - plain |").split()
    goes_on = {"p": plain(1, a) | {"stopped": 0.2, "prefix": 0.5, "p_end": 0.1}}
    assert comparison(goes_on, narrow=True).splitlines()[2].split() == (
        "| variant | seeds | exact | prefix | stopped | p_end |").split()
    two = compare({"p": plain(1, a), "r": plain(1, b, k=1, reg_weight=1.0)})
    assert [row["variant"] for row in two] == ["reg_weight 0.0", "reg_weight 1.0"]
    for weight, shown in ((1.0, "| exact | rank_enc |"), (0.0, "| exact |")):
        spread = {"p": plain(1, a, reg="vicreg", reg_weight=weight) | {"rank_enc": 60.0}}
        assert comparison(spread, narrow=True).splitlines()[2].split() == f"| variant | seeds {shown}".split()
    equal_means = compare({"p": plain(1, [1, 0]), "j": result(1, [0, 1])})[1]["minus"]["exact"]
    assert equal_means["mean"] == 0 and not equal_means["identical"]


def test_what_changes_no_result_makes_no_variant():
    """Places, devices, the number format that auto stands for, and settings that have no effect."""
    rows = compare({"a": plain(1, [1, 0], out="x", device="cpu", compile=True, log_every=7, micro_batch=4),
                    "b": plain(2, [1, 0], out="y", data_dir="z", dtype="bfloat16", test_file="w",
                          distance="mse", reg="sigreg", stp_form="released") | {"dtype": "bfloat16"}})
    assert [row["seeds"] for row in rows] == [[1, 2]]


def test_the_same_files_under_other_names_are_the_same(pairs, chat_folder, tmp_path, monkeypatch):
    """Two seeds are one variant, where data and base model lie elsewhere by now. (That a run goes on from
    there: test_a_run_that_dies_goes_on, test_other_weights_under_the_same_name.)"""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pairs, "data"), shutil.copytree(chat_folder, "base")
    rest = ["--test_file", str(pairs / "test.jsonl"), "--batch_size", "8", "--max_steps", "1", "--device",
            "cpu", "--max_new_tokens", "4", "--format", "llama3"]
    for seed, data, base in ((1, "data", "base"), (2, "./data", "./base/"), (3, pairs, chat_folder),
                             (4, "data", "base/../base/.")):
        go(["--dataset", f"{data}/train.jsonl", "--init_from", str(base), *rest],
           "--seed", seed, "--out", seed)
    variant, = variants_of({seed: read_result(seed) for seed in "1234"})
    assert sorted(variant.seeds) == [1, 2, 3, 4]
    monkeypatch.chdir("base")  # its name was taken for empty, and so the run for one from scratch
    assert train.parse_config(["--init_from", ".", "--lora_rank", "4"]).out.startswith(
        "runs/nlrx_synth-from-base-lora_rank4")


def test_names_leave_out_what_most_variants_share():
    variants = {"p": {"lam": 0.0, "k": 0}, "j": {}, "l": {"lam": 0.1}, "e": {"train_eos": False}}
    rows = compare({name: result(1, [1, 0], **changed) for name, changed in variants.items()})
    assert [row["variant"] for row in rows] == [
        "lam 0.0", "lam 1.0", "lam 0.1", "lam 1.0, train_eos False"]  # k has no effect in the first
    variants |= {"m": {"k": 2}} | {str(i): {"gamma": i} for i in (2, 3, 4)}
    rows = compare({name: result(1, [1, 0], **changed) for name, changed in variants.items()})
    assert rows[0]["variant"] == "lam 0.0, gamma 1.0"
    assert len({row["variant"] for row in rows}) == len(rows) == 8
    variants = {"p": {"lam": 0.0}, "i": {"distance": "infonce"}, "l": {"lam": 0.1}, "e": {"epochs": 4}}
    rows = compare({name: result(1, [1, 0], **changed) for name, changed in variants.items()})
    assert [row["variant"] for row in rows] == [
        "lam 0.0", "lam 1.0, distance infonce", "lam 0.1, distance cosine",  # no distance in the first
        "lam 1.0, distance cosine, epochs 4"]
    rows = compare({name: result(1, [1, 0], **variants[name]) for name in "pi"})
    assert [row["variant"] for row in rows] == ["lam 0.0", "lam 1.0, distance infonce"]


@pytest.mark.parametrize("budget", [{"max_flops": 2e15}, {"match_flops": "x"}])
def test_baselines_of_equal_flops(budget):
    """A budget of FLOPs (--match_flops in older versions) makes epochs say nothing: they neither set runs
    apart nor hide a baseline. Which one, where several would do, only --against can say."""
    jepa, long_jepa = result(1, [1, 1, 1, 0], epochs=4), result(1, [1, 1, 1, 1], epochs=2, **budget)
    p4, long_plain = plain(1, [1, 1, 0, 0], epochs=4), plain(1, [1, 0, 0, 0], epochs=3, **budget)
    p8 = plain(1, [1, 1, 0, 0], epochs=8)
    for runs, expected in (([jepa, long_plain], [None, 0.5]), ([jepa, long_plain, p4], [None, None, 0.25]),
                           ([p4, long_plain, jepa], [None, None, 0.25]), ([p8, jepa], [None, None]),
                           ([p4, long_jepa], [None, 0.5]), ([p4, p8, long_jepa], [None, None, None]),
                           ([p4, long_plain, long_jepa], [None, None, 0.75])):
        assert means(compare({str(i): run for i, run in enumerate(runs)})) == expected
    budget = {name: "y" if name == "match_flops" else x for name, x in budget.items()}
    rows = compare({"p": p4, "j": long_jepa, "k": result(2, [1, 0, 0, 0], epochs=7, **budget)})
    assert [row["seeds"] for row in rows] == [[1], [1, 2]] and "epochs" not in rows[1]["variant"]


def test_a_chosen_baseline_and_runs_for_bases():
    """Each seed begins with a run of its own; other weights in a folder of the same name are another variant.
    """
    runs = {"s": plain(1, [0, 0, 0, 0])}
    for seed in (1, 2):
        runs[f"p{seed}"] = plain(seed, [1, 0, 0, 0], init=[f"p{seed}"], init_run="p", init_from="p")
        runs[f"j{seed}"] = plain(seed, [1, 1, 1, 0], init=[f"j{seed}"], init_run="j", init_from="j")
    rows = compare(runs, "p2")
    assert [(row["variant"], row["seeds"], row["against"]) for row in rows] == [
        ("init_from ", [1], "init_from p"), ("init_from p", [1, 2], None),
        ("init_from j", [1, 2], "init_from p")]
    assert means(rows) == [-0.25, None, 0.5]
    assert "exact - baseline" in comparison(runs, "p2")
    assert "PyTorch None" in comparison(runs, "p2", for_paper=True)  # it was not recorded
    assert comparison(runs, "p2").startswith("nlrx_synth, test, 4 items; baseline: the variant of p2; one")
    rows = compare({str(x): result(x, [1], init=[x], init_from="base") for x in (1, 2)})
    assert len({row["variant"] for row in rows}) == 2
    assert all(row["variant"].startswith("init_from base (") for row in rows)
    with pytest.raises(BadInput, match="--against x: not one of the runs"):
        compare(runs, "x")


@pytest.mark.parametrize("other,message", [
    (result(2, [1, 0], test="x"), "^b and a: trained or scored on different data"),
    (result(2, [1, 0], files=("t", "v")), "^b and a: trained or scored on different data"),
    (result(2, [1, 0], n_train=5), "^b and a: trained or scored on different data"),
    (result(1, [1, 0]), "^b: seed 1 of these settings is there twice"),
])
def test_what_cannot_be_compared_is_refused(other, message):
    with pytest.raises(BadInput, match=message):
        compare({"a": result(1, [1, 0]), "b": other})


# ---- eval.json of any version ------------------------------------------------------------------------------

def committed(*patterns):
    return {path.parent.name: read_result(path.parent) for pattern in patterns
            for path in sorted(RESULTS.glob(f"{pattern}/eval.json"))}


@pytest.mark.parametrize("config", [train.Config, NewConfig])
@pytest.mark.parametrize("patterns,variants,baselines", [
    (["stopping/*"], 6, 4), (["equal/*", "stopping/jepa-train_eos-*"], 3, 2), (["search_synth/*"], 10, 9),
    (["search_turk/*", "turk_choice/epochs8"], 12, 11), (["chosen/turk-*", "turk/*"], 3, 2),
    (["chosen/synth-*", "stopping/plain-train_eos-*"], 2, 1), (["overfit/*"], 2, 1), (["transfer/*"], 2, 0)])
def test_committed_results_find_their_baselines(patterns, variants, baselines, config, monkeypatch):
    """They are of older versions (view2, match_flops, objective), and a new flag at its default changes
    nothing: an old run and one of today are one variant."""
    monkeypatch.setattr(train, "Config", config)
    results = committed(*patterns)
    found = variants_of(results)
    assert len(found) == variants and sum(baseline_of(v, found) is not None for v in found) == baselines
    for name, old in list(results.items()):
        if not old["config"].keys() & train.FORMER.keys():  # of those that are no more, it has defaults
            config = asdict(train.Config(**old["config"])) | {"seed": name}
            results[f"{name} today"] = old | {"config": config}
    assert len(variants_of(results)) == variants < len(results)


def test_semantic_tube_prediction_of_an_older_run():
    """--objective stp --lam X was what --lam 0 --stp X is."""
    old, new = result(1, [1], objective="stp", lam=0.5, k=0), plain(2, [1], stp=0.5)
    assert [row["seeds"] for row in compare({"old": old, "new": new})] == [[1, 2]]
    assert compare({"p": plain(1, [1]), "old": old})[1]["against"] == "stp 0.0"


def test_any_other_term_of_the_loss_has_the_plain_baseline():
    runs = {"p": plain(1, [0]), "s": plain(1, [1], stp=0.5), "r": plain(1, [1], k=1, reg_weight=0.1),
            "old": result(1, [1], stop_gradient=True), "new": result(2, [1], target="stopgrad")}
    rows = compare(runs)
    assert means(rows) == [None, 1, 1, 1] and rows[3]["seeds"] == [1, 2]


def stored(folder, **changed):
    folder.mkdir()
    (folder / "eval.json").write_text(json.dumps(result(1, [1, 0, 0, 0, 0, 0, 0, 0, 1]) | changed))
    return folder


def test_shares_are_counted_from_the_items(tmp_path):
    """Not believed."""
    assert read_result(stored(tmp_path / "run", exact=0.9, n=9))["exact"] == 2 / 9


@pytest.mark.parametrize("changed", [
    {"n": 20}, {"n": "9"}, {"items": {"exact": "0g00"}}, {"items": []}, {"config": {}},
    {"config": {"seed": 1, "lam_warmup": "x"}}, {"trained": {}}, {"rank_enc": 10**400}])
def test_damaged_results_are_refused(tmp_path, changed):
    with pytest.raises(BadInput, match="run/eval.json: damaged, or not written by"):
        read_result(stored(tmp_path / "run", **changed))
    with pytest.raises(BadInput, match="none/eval.json: no such file"):
        read_result(tmp_path / "none")


# ---- the program -------------------------------------------------------------------------------------------

def test_the_table_of_real_runs(small_run, tmp_path, monkeypatch, capsys):
    """JEPA, plain training, and plain training with as many FLOPs; and their numbers as JSON."""
    folders = {name: tmp_path / name for name in ("jepa", "plain", "equal")}
    at = small_run.index("--max_steps")
    argv = small_run[:at] + small_run[at + 2:]

    def run(name, *flags):
        train.train(train.parse_config([*argv, "--out", str(folders[name]), *flags]))
        return json.loads((folders[name] / "eval.json").read_text())["trained"]["flops"]

    flops = run("jepa", "--epochs", "1")
    assert run("plain", "--epochs", "1", "--lam", "0") < 0.9 * flops
    assert flops <= run("equal", "--lam", "0", "--max_flops", str(flops)) < 1.5 * flops
    argv = ["compare", *map(str, folders.values()), "--json", str(tmp_path / "t.json")]
    monkeypatch.setattr("sys.argv", argv)
    capsys.readouterr()
    program.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert lines[0] == "train.jsonl, test, 12 items; one seed: the interval is for other items alone"
    rows = json.loads((tmp_path / "t.json").read_text())
    assert [len(row["minus"]) > 0 for row in rows] == [False, False, True]
    narrow = [*argv[:2], str(folders["equal"]), "--narrow", "--against", f"{argv[1]}/"]
    monkeypatch.setattr("sys.argv", narrow)
    program.main()
    lines = capsys.readouterr().out.splitlines()
    assert "baseline: the variant of" in lines[0]
    assert lines[2].endswith("| exact - baseline | prefix - baseline |")
    assert "PFLOP" not in lines[2] and "cos_gap" in lines[2]
