"""support/settings.py: flags, checks, names; and that a new setting changes nothing about an older run."""
import json
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from test_train import assert_equal_runs, die_at_step, steps_of

import eval
import train
from support.files import BadInput
from support.settings import differences, fill, in_group, opt, parse, parse_options, problems, run_name
from support.settings import with_identity

# ---- a dataclass of settings -------------------------------------------------------------------------------

@dataclass
class Settings:
    steps: int = opt(3, "how many", low=1, group="length")
    data: str = opt("synth", "a name or a path", identity="content")
    base_from: str = opt("", "a folder", identity="content")
    lam: float = opt(1.0, "weight", low=0, group="loss")
    k: int = opt(1, "tokens", low=0, needs="lam", group="loss")
    distance: Literal["cosine", "infonce"] = opt("cosine", "d", needs="lam", group="loss")
    heat: float = opt(0.5, "of infonce", above=0, below=2, needs="lam distance=infonce", group="loss")
    ends: bool = opt(True, "of labels", needs="lam|steps")
    scratch: int = opt(0, "only from scratch", needs="!base_from")
    test: str = opt("", "a file", needs="data=*.jsonl", identity="nothing")
    seed: int = opt(0, "of all", low=0)
    compile: bool | None = opt(None, "or by the device", identity="nothing")
    system: str | None = opt(None, "an instruction")


TUNED = {"lam": 0.1, "steps": 4, "scratch": 2}


def settings(flags: str, tuned: bool = True):
    return parse(Settings, flags.split(), tuned=("base_from", TUNED) if tuned else ("", {}))


def test_flags():
    """Types, switches, a third state where nothing was said, and defaults that another setting tunes."""
    c, given = settings("--steps 5 --lam 2 --no-ends --distance infonce --data a/b.jsonl")
    assert c == Settings(steps=5, lam=2.0, ends=False, distance="infonce", data="a/b.jsonl")
    assert given == {"steps", "lam", "ends", "distance", "data"} and c.compile is c.system is None
    c, _ = settings("--compile --system x")
    assert c.compile is True and c.system == "x"
    assert settings("--no-compile")[0].compile is False
    c, _ = settings("--base_from f --steps 7")
    assert (c.lam, c.steps, c.scratch) == (0.1, 7, 2)
    with pytest.raises(BadInput, match="argument --distance: invalid choice: 'l3'"):
        settings("--distance l3")


@pytest.mark.parametrize("flags,message", [
    ("--nonsense 1", "unrecognized arguments: --nonsense 1; see --help"),
    ("--step 4", "unrecognized arguments: --step 4; see --help"),  # no guessing at abbreviations
    ("--lam fast", "argument --lam: invalid float value: 'fast'; see --help"),
    ("--lam 1 2", "unrecognized arguments: 2; see --help"),
    ("--steps 0", "--steps 0: must be 1 or more"),
    ("--lam nan", "--lam nan: must be 0 or more"),
    (f"--k {10**400}", f"--k {10**400}: must be below 2**63"),
    ("--heat 2 --distance infonce", "--heat 2.0: must be above 0 and below 2"),
    (f"--seed {2**64}", f"--seed {2**64}: must be below 2**63"),
    ("--heat 1", "--heat has no effect with --distance cosine"),
    ("--k 3 --distance infonce --lam 0",
     "--k has no effect with --lam 0; --distance has no effect with --lam 0"),
    ("--scratch 1 --base_from x", "--scratch has no effect with --base_from x"),
    ("--test x", "--test has no effect with --data synth"),
    # named, and so refused, though each is at its default
    ("--k 1 --lam 0", "--k has no effect with --lam 0"),
    ("--steps 0 --heat 0 --lam 0", "--steps 0: must be 1 or more; --heat 0.0: must be above 0 and below 2; "
                                   "--heat has no effect with --lam 0")])
def test_all_that_is_wrong_is_one_line(flags, message):
    with pytest.raises(BadInput) as error:
        parse_options(Settings, flags.split())
    assert str(error.value) == message


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        settings("--help")
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in Settings.__dataclass_fields__) and "\nloss:" in shown
    assert "(default: 3; with --base_from 4)" in shown and "(default: None" not in shown


def test_values_of_python_callers():
    """Values that are neither defaults nor tuned ones count as given, unless they switch something off."""
    assert problems(Settings(k=2, lam=0.0)) == ["--k has no effect with --lam 0"]
    assert problems(Settings(distance="l3", steps=-1)) == [
        "--steps -1: must be 1 or more", "--distance l3: must be one of cosine, infonce"]
    assert problems(Settings(ends=False, lam=0.0, steps=0))[-1] == "--ends has no effect with --lam 0"
    assert problems(Settings(k=0, lam=0.0)) == problems(Settings(base_from="f", **TUNED), tuned=TUNED) == []


def test_names_and_groups():
    for options, name in ((dict(), "synth"), (dict(data="a/b.c.jsonl", k=2), "b.c-k2"),
                          (dict(base_from="a/f/", lam=2.0, steps=4), "synth-from-f-lam2"),
                          (dict(lam=0.0, k=0), "synth-lam0"),  # what has no effect is not told
                          (dict(compile=True, test="x", ends=False, seed=1), "synth-endsFalse-seed1")):
        c = Settings(**options)
        assert run_name(c, TUNED if c.base_from else {}) == name
    assert in_group(Settings, "loss") == ["lam", "k", "distance", "heat"]
    assert with_identity(Settings, "nothing") == ["test", "compile"]


def test_settings_of_other_versions():
    """What an older run lacks has its default; what is no more is left out at its default, and else is a
    difference, as is what only a newer version knows."""
    stored, former = {"lam": 2.0, "objective": "jepa", "compile": True}, {"objective": "jepa"}
    filled = fill(Settings, stored, former)
    assert filled == vars(Settings(lam=2.0, compile=True))
    assert differences(Settings, filled, vars(Settings(lam=2.0, test="x", data="other"))) == []
    assert differences(Settings, filled, vars(Settings(k=2))) == ["--lam 2.0 (now 1.0)", "--k 1 (now 2)"]
    with pytest.raises(BadInput, match="run.json: k is '1', which this setting cannot be"):
        fill(Settings, {"k": "1"}, former, "run.json")
    for more in ({"objective": "stp"}, {"newer": "stp"}):
        found = differences(Settings, fill(Settings, stored | more, former), vars(Settings(lam=2.0)))
        assert found == [f"--{[*more][0]} stp (now None)"]


# ---- those of train.py -------------------------------------------------------------------------------------

CONTRADICTIONS = [
    ("--lam 0 --k 3 --alpha 0.5", "--k has no effect with --lam 0; --alpha has no effect with --lam 0"),
    ("--lam 0 --gamma 0", "nothing to train on"),
    (f"--lr inf --seed {2**63}", f"--lr inf: must be above 0; --seed {2**63}: must be below 2**63"),
    ("--distance infonce --micro_batch 4", "--distance infonce compares the pairs of the whole batch"),
    ("--distance infonce --batch_size 1", "--batch_size 2 or more, no --micro_batch, no --alpha"),
    ("--reg_weight 1 --lam 0 --alpha 0.5", "--reg vicreg compares the pairs of the whole batch: it needs"),
    ("--fixed_shapes --row_len 64 --predictor mlp", "--fixed_shapes needs --pool last, --predictor tokens"),
    ("--fixed_shapes --row_len 64 --target ema", "--predictor tokens and no --target ema"),
    ("--passes three --row_len 9", "--row_len has no effect with --passes three"),
    ("--lam 0 --attention dense", "--attention has no effect with --lam 0"),
    ("--device cpu --attention flex", "--attention flex needs CUDA and --compile"),
    pytest.param("--device cuda", "--device cuda: not available here",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")),
    ("--dataset x.jsonl", "needs --test_file or --eval_split valid"),
    ("--dataset x.jsonl --eval_split valid --data_dir y", "--data_dir has no effect with --dataset x.jsonl"),
    ("--dataset x.jsonl --eval_split valid --test_file y", "--test_file has no effect with --eval_split"),
    ("--test_file x.jsonl", "--test_file has no effect with --dataset nlrx_synth"),
    ("--dataset paraphrase", "paraphrase has no test split: it needs --eval_split valid"),
    ("--dataset paraphrase --eval_split valid --max_new_tokens 5", "--max_new_tokens has no effect with"),
    ("--dataset gsm8k --scorer regex", "--scorer has no effect with --dataset gsm8k"),
    ("--dataset a.jsonl --test_file b --databases d", "--databases has no effect without --scorer"),
    ("--batch_size 4 --micro_batch 8", "--micro_batch 8 is more than --batch_size 4"),
    ("--max_flops 1e9 --epochs 2", "--epochs has no effect with --max_flops"),
    ("--init_from x --lora_dropout 0.2", "--lora_dropout has no effect without --lora_rank"),
    ("--init_from x --dim 64 --vocab_size 600", "--vocab_size has no effect with --init_from x; --dim has"),
    ("--format plain", "--format has no effect without --init_from"),
    ("--dataset paraphrase --eval_split valid --ntp_on code", "--ntp_on has no effect with --dataset"),
    ("--init_from x --backend ours --trust_remote_code", "--trust_remote_code has no effect with --backend"),
    ("--dim 30 --n_heads 4", "--dim 30 --n_heads 4: heads must"),
    ("--dim 20 --n_heads 4", "--dim 20 --n_heads 4: heads must"), ("--n_kv_heads 3", "does not divide")]


@pytest.mark.parametrize("flags,message", CONTRADICTIONS)
def test_contradictions(flags, message, tmp_path, monkeypatch):
    """From the command line and from Python, with the same words, and before any work."""
    monkeypatch.setattr(train, "load", lambda *_: pytest.fail("taken"))
    config, _ = parse(train.Config, flags.split(), tuned=("init_from", train.FINE_TUNING))
    config.out = str(tmp_path / "run")
    messages = []
    for call in (lambda: train.parse_config(flags.split()), lambda: train.train(config)):
        with pytest.raises(BadInput) as error:
            call()
        messages.append(str(error.value))
    assert message in messages[0] == messages[1] and "\n" not in messages[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [dict(max_flops=1e9), dict(lam=0.0, k=0, batch_size=16)])
def test_defaults_of_python_callers_contradict_nothing(options, pairs):
    """Those of epochs were refused beside init_from and max_flops. Here the folder alone is wrong."""
    with pytest.raises(BadInput, match="--init_from nowhere: no such folder"):
        train.train(train.Config(init_from="nowhere", dataset=str(pairs / "train.jsonl"), eval_split="valid",
                                 **options))


# ---- older runs --------------------------------------------------------------------------------------------

@dataclass
class NewConfig(train.Config):
    """train.Config of a version to come."""
    colour: Literal["blue", "red"] = opt("blue", "of a new idea", group="objective", needs="lam")
    shade: float = opt(0.5, "of it, in groups and checks as any other", needs="colour=red", low=0)


def make_older(folder, without, state_keys):
    """Rewrite a run folder as an older version would have left it."""
    record = json.loads((folder / "run.json").read_text())
    for name in without:
        del record["config"][name]
    record["config"] |= {"view2": "", "match_flops": "", "objective": "jepa"}
    record |= {"version": 1, "budget": None, "init_run": ""}
    (folder / "run.json").write_text(json.dumps(record))
    state = torch.load(folder / "state.pt", weights_only=True)
    state["config"] = dict(record["config"])
    state |= {"run": "0" * 64, "metrics": "0" * 64}
    torch.save({name: state[name] for name in state_keys}, folder / "state.pt")


OLDER = ("run", "metrics", "metrics_size", "step", "seen", "model", "optimizer")


@pytest.fixture
def interrupted_run(small_run, tmp_path):
    """The settings of a run that died after the checkpoint of its second step, and its folder."""
    argv = [*small_run, "--out", str(tmp_path / "run")]
    die_at_step(3, argv)
    return argv, tmp_path / "run"


@pytest.mark.parametrize("without,state_keys", [((), ("config", *OLDER[2:], "last_line")),
                                                (("stp", "max_flops", "train_eos"), OLDER)])
def test_a_new_setting_changes_nothing_about_an_older_run(interrupted_run, finished_run, monkeypatch, capsys,
                                                          without, state_keys):
    """It resumes and ends with the same weights, scores again, and shows its result; entries of former
    versions in run.json and state.pt do not disturb."""
    argv, folder = interrupted_run
    make_older(folder, without, state_keys)
    monkeypatch.setattr(train, "Config", NewConfig)
    capsys.readouterr()
    result = train.train(train.parse_config(argv))
    assert ", from step 2\n" in capsys.readouterr().out
    assert_equal_runs(folder, finished_run)
    assert [row["step"] for row in steps_of(folder)] == [1, 2, 3, 4]
    again = eval.score_run(folder, eval.EvalOptions())
    assert again == result | {"seconds": again["seconds"]}
    assert train.train(train.parse_config(argv)) == json.loads((folder / "eval.json").read_text())
    assert "finished before" in capsys.readouterr().out
    c = train.parse_config([*argv, "--colour", "red"])
    with pytest.raises(BadInput, match="holds a run with --colour blue .now red.; choose another --out"):
        train.train(c)


@pytest.mark.parametrize("name,value", [("objective", "stp"), ("of_the_future", 1), ("lr", 0.5)])
def test_a_run_with_other_settings_is_refused(interrupted_run, name, value):
    """Those that are no more and those that are not yet known, too; state.pt's as well as run.json's."""
    argv, folder = interrupted_run
    c, record = train.parse_config(argv), (folder / "run.json").read_text()
    changed = json.loads(record)
    changed["config"][name] = value
    (folder / "run.json").write_text(json.dumps(changed))
    with pytest.raises(BadInput, match=f"holds a run with --{name} {value} "):
        train.train(c)
    (folder / "run.json").write_text(record)
    state = torch.load(folder / "state.pt", weights_only=True)
    state["config"][name] = value
    torch.save(state, folder / "state.pt")
    with pytest.raises(BadInput, match="state.pt: of another run"):
        train.train(c)
