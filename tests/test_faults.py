"""What machines do to a run: kills at random moments, signals, a disk that is full from any write on, files
that are cut, emptied, lost or another run's, two runs in one folder, numbers that are none."""
import io
import json
import os
import pickle
import random
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from conftest import ROOT, contents, serving
from test_train import argv, assert_equal_runs, go, metrics, rows_of, untimed  # noqa: F401 (a fixture)

import eval
import train
from support import distributed, runs
from support.files import BadInput, Interrupts, main_guard, write_text
from tasks import datasets, scorers
from tasks.datasets import git_blob_id


def temporary(folder: Path) -> list[Path]:
    return list(folder.glob("**/*.tmp"))


# ---- killed ------------------------------------------------------------------------------------------------

def killed(delay: float, *job, **options) -> int:
    """Start a program and kill it after a while; its status."""
    running = forks.start(*job, **options)
    time.sleep(delay)
    running.signal(signal.SIGKILL)
    status = running.wait().returncode
    assert status in (0, -signal.SIGKILL), running.stderr
    return status


def test_forty_kills_of_training_and_scoring(argv, tmp_path):  # noqa: F811
    """At random moments, of 30 trainings (checkpoints, a look, export and the score at the end included), of
    10 scorings; every run ends with the bits, the metrics and the score of the one that nobody killed."""
    argv = [*argv, "--n_layers", "1", "--batch_size", "16", "--max_steps", "7", "--checkpoint_every", "3",
            "--alpha", "0.5"]
    forks.server()
    lasts, whole, rng = {}, tmp_path / "whole", random.Random(0)
    for program, arguments in (("train", [*argv, "--out", whole]), ("eval", [whole])):
        began = time.monotonic()
        assert forks.run(program, arguments).returncode == 0
        lasts[program] = time.monotonic() - began
    wanted = json.loads((whole / "eval.json").read_text())
    kills, folder, moments = 0, tmp_path / "run", set()
    while kills < 40:
        job = ("train", [*argv, "--out", folder])
        if kills >= 30 and not (folder / "eval.json").exists():
            assert forks.run(*job).returncode == 0
        if kills >= 30:
            job = ("eval", [folder])
        status = killed(rng.uniform(0, 1) * lasts[job[0]], *job)
        kills += status == -signal.SIGKILL
        moments.add(tuple(sorted(re.sub("[.].*tmp", "", path.name) for path in folder.glob("*"))))
        if status == 0:
            lasts[job[0]] *= 0.9  # the machine is quicker now
        if status == 0 and kills < 30:
            folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    assert forks.run("train", [*argv, "--out", folder]).returncode == 0
    assert len(moments) > 2  # not always the same one
    for run in tmp_path.glob("run*"):
        assert_equal_runs(whole, run)
        assert metrics(whole) == metrics(run) and not temporary(run)
        assert untimed(json.loads((run / "eval.json").read_text())) == untimed(wanted)


def test_ten_kills_of_a_download(tmp_path):
    """From a server that takes half a second for a file. What they left is removed: temporary files got names
    of their own, and stayed."""
    mirror, data, rng = tmp_path / "mirror", tmp_path / "data", random.Random(1)
    mirror.mkdir()
    (mirror / "big.jsonl").write_bytes(b"{}\n" * 600_000)
    published = {"nlrx_synth": {"train": ["big.jsonl", git_blob_id(mirror / "big.jsonl")]}}
    with serving(mirror, pause=0.05) as address:
        job = ("data", ["download", "nlrx_synth", "--data_dir", data, "--base_url", address])
        for _ in range(10):
            status = killed(rng.uniform(0.05, 0.4), *job, published=published)
            assert status == -signal.SIGKILL and not (data / "big.jsonl").exists()
        for left in temporary(data):  # an hour later, they are nobody's
            os.utime(left, times=(time.time() - 3601,) * 2)
        whole = forks.run(*job, published=published)
    assert whole.returncode == 0, whole.stderr
    assert contents(data) == contents(mirror)


# ---- asked to stop -----------------------------------------------------------------------------------------

def started(command, run: Path, **options) -> forks.Job:
    """A training that has just logged steps."""
    path, end = run / "metrics.jsonl", time.monotonic() + 60
    before = path.stat().st_size if path.exists() else 0
    job = forks.start("train", command, **options)
    while not (path.exists() and path.stat().st_size > before) and time.monotonic() < end:
        time.sleep(0.01)
    return job


def test_asked_to_stop(argv, tmp_path):  # noqa: F811
    """By Ctrl-C, a scheduler, a closed terminal, a job's time limit: it ends within 5 s, with a checkpoint of
    the last step and a line that says how to go on; in the end all is as if nothing had been."""
    argv, run = [*argv, "--n_layers", "1", "--epochs", "48"], tmp_path / "run"
    assert forks.run("train", [*argv, "--out", tmp_path / "whole"]).returncode == 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        job = started(argv, run)
        job.signal(number)
        began = time.monotonic()
        assert job.wait().returncode == 128 + number, job.stderr
        assert time.monotonic() - began < 5 and job.stderr.count("\n") == 1
        step = runs.load_state(run, torch.device("cpu"))["step"]
        assert job.stderr == f"interrupted: the same command goes on from step {step}\n"
    assert forks.run("train", argv).returncode == 0
    assert_equal_runs(tmp_path / "whole", run)
    assert metrics(tmp_path / "whole") == metrics(run) and not temporary(run)


def test_a_signal_that_is_ignored_stays_ignored(argv, tmp_path):  # noqa: F811
    """`nohup python train.py` stopped when the terminal was closed: nohup ignores SIGHUP, and the program did
    not."""
    job = started([*argv, "--epochs", "4"], tmp_path / "run", ignore=[signal.SIGHUP])
    job.signal(signal.SIGHUP)
    assert job.wait().returncode == 0, job.stderr


def test_a_signal_that_comes_twice_still_waits():
    """Launchers send one to the group and one more themselves; a person's second one comes later."""
    signals = Interrupts()
    with signals.deferred():
        signals(signal.SIGTERM, None)
        signals(signal.SIGTERM, None)
        assert signals.asked == signal.SIGTERM
        signals.since -= 2
        with pytest.raises(KeyboardInterrupt):
            signals(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        Interrupts()(signal.SIGTERM, None)


@pytest.mark.parametrize("training", [False, True])
def test_sqlite_does_not_swallow_a_signal(tmp_path, monkeypatch, training):
    """It makes an error of its own of what its callbacks raise. While Spider's epoch was scored, in training,
    the next query that failed ended the program before the epoch's checkpoint; there the signal waits."""
    sqlite3.connect(tmp_path / "d.sqlite").close()
    monkeypatch.setattr(scorers, "interrupts", Interrupts())
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
    timer = threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGTERM))
    old = signal.signal(signal.SIGTERM, scorers.interrupts)
    try:
        timer.start()
        if training:
            monkeypatch.setattr(scorers, "MAX_SECONDS", 1)
            with scorers.interrupts.deferred():
                assert scorers.run_query(tmp_path / "d.sqlite", endless) is None
            assert scorers.interrupts.asked == signal.SIGTERM
        else:
            with pytest.raises(KeyboardInterrupt):
                scorers.run_query(tmp_path / "d.sqlite", endless)
    finally:
        signal.signal(signal.SIGTERM, old)


# ---- a full disk -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("at_most", [15, pytest.param(10**9, marks=pytest.mark.slow)], ids=["some", "all"])
def test_the_disk_is_full_from_any_write_on(argv, tmp_path, at_most):  # noqa: F811
    """A call that writes into the run folder fails, and all after it: one line, status 2; the last checkpoint
    loads, and with room again the run ends as if nothing had been."""
    if not forks.server().has_shim:
        pytest.skip("needs Linux and gcc")
    argv = [*argv, "--max_steps", "3", "--checkpoint_every", "2", "--n_layers", "1"]
    whole = tmp_path / "whole"
    job = forks.run("train", [*argv, "--out", whole], full=[str(whole), 10**9])
    calls = int(job.stdout.rpartition(":")[2])
    assert calls > 20
    for n in range(1, calls + 1, max(1, calls // at_most)):
        run = tmp_path / f"run{n}"
        job = forks.run("train", [*argv, "--out", run], full=[str(run), n])
        assert job.returncode == 2 and job.stderr.startswith("error: "), (n, job.stderr)
        assert job.stderr.count("\n") == 1, (n, job.stderr)
        state = runs.load_state(run, torch.device("cpu"))  # raises if it is damaged
        assert state is None or state["step"] in (2, 3)
        job = forks.run("train", [*argv, "--out", run])
        assert job.returncode == 0, (n, job.stderr)
        assert_equal_runs(whole, run)
        assert not temporary(run)
        shutil.rmtree(run)
    print(f"{calls} writes")


# ---- damage ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def three_runs(small_run, small_run_once, tmp_path_factory):
    """Folders of finished runs: a, one of another seed, one on other data; and a's command."""
    folder = tmp_path_factory.mktemp("others")
    (folder / "other.jsonl").write_text("".join(
        json.dumps({"text": f"item {i}", "code": f"a{i}"}) + "\n" for i in range(80)))
    go(small_run, "--out", folder / "seed", "--seed", 1)
    go(small_run, "--out", folder / "data", "--dataset", folder / "other.jsonl")
    shutil.copytree(small_run_once, folder / "a")
    return folder, small_run


HARM = {"cut": lambda path, _: path.write_bytes(path.read_bytes()[:path.stat().st_size * 2 // 3]),
        "emptied": lambda path, _: path.write_bytes(b""), "deleted": lambda path, _: path.unlink(),
        "that of another seed": lambda path, runs: shutil.copy(runs / "seed" / path.name, path),
        "that of other data": lambda path, runs: shutil.copy(runs / "data" / path.name, path),
        "another program's": lambda path, _: torch.save({"model": {}}, path) if path.suffix == ".pt" else (
            path.write_text("{}\n")),
        "no checkpoint": lambda path, _: torch.save({} if path.suffix == ".pt" else [torch.ones(3)], path)}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "state.pt"])
def test_a_harmed_unfinished_run(three_runs, tmp_path, name, harm):
    """It never goes on: neither from another place nor from the beginning; nothing else in it is changed."""
    folder, command = three_runs
    run = tmp_path / "run"
    left_out = shutil.ignore_patterns("eval.json", "model.safetensors", "config.json")
    shutil.copytree(folder / "a", run, ignore=left_out)
    HARM[harm](run / name, folder)
    before = contents(run)
    blamed = {"run.json": "run", "state.pt": "state.pt|metrics.jsonl: not as"}.get(name, name)
    with pytest.raises(BadInput, match=blamed) as error:
        go(command, "--out", run)
    assert "\n" not in str(error.value)
    assert contents(run) == {"metrics.jsonl": b""} | before


@pytest.mark.parametrize("harm", ["cut", "emptied", "deleted"])
@pytest.mark.parametrize("name,readers", [
    ("run.json", "train score answer base"), ("eval.json", "train"), ("metrics.jsonl", "score"),
    ("config.json", "score answer base"), ("model.safetensors", "score answer base"),
    ("tokenizer.json", "score answer base"), ("pred_embedding.safetensors", "score answer base")])
def test_a_harmed_finished_run(three_runs, tmp_path, name, readers, harm):
    """Whoever reads the file names it, and changes nothing: who would show the result, score the run again,
    answer from it, or begin with it."""
    folder, command = three_runs
    run = tmp_path / "run"
    shutil.copytree(folder / "a", run)
    HARM[harm](run / name, folder)
    if harm == "deleted":  # without run.json it is a model folder; a new [PRED] may be trained on it
        readers = {"run.json": "train score", "eval.json": "",
                   "pred_embedding.safetensors": "score answer"}.get(name, readers)
    uses = {"train": lambda: go(command, "--out", run),
            "score": lambda: eval.score_run(run, eval.EvalOptions([str(run)])),
            "answer": lambda: eval.answer_prompt(run, eval.EvalOptions([str(run)], prompt="x")),
            "base": lambda: go(command[:4], "--init_from", run, "--max_steps", 1, "--out", tmp_path / "next")}
    before = contents(run)
    for reader in readers.split():
        with pytest.raises((BadInput, OSError), match={"run.json": "run"}.get(name, name)) as error:
            uses[reader]()
        assert "\n" not in str(error.value) and contents(run) == before
    assert not (tmp_path / "next").exists()
    if not readers:  # a run without its score is not finished: it goes on
        with pytest.raises(BadInput, match="not finished"):
            uses["score"]()
        assert uses["train"]()["n"] == 12


def test_two_runs_in_one_folder(three_runs, tmp_path):
    """The second refuses, and harms nothing; when the first has ended, or died, it may."""
    folder, command = three_runs
    run = tmp_path / "run"
    shutil.copytree(folder / "a", run, ignore=shutil.ignore_patterns("eval.json"))
    with runs.Run(run, json.loads((run / "run.json").read_text()), train.Config, train.FORMER):
        before = contents(run)
        with pytest.raises(BadInput, match="another process is training here"):
            go(command, "--out", run)
        assert contents(run) == before
    assert go(command, "--out", run)["n"] == 12


def test_a_folder_of_others(three_runs, tmp_path):
    """It is not trained in, but for what a kill leaves before there is a run.json."""
    folder, command = three_runs
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json.123.tmp").write_text("{")
    (run / "metrics.jsonl").touch()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="not empty and not a run folder"):
        go(command, "--out", run)
    (run / "notes.txt").unlink()
    go(command, "--out", run)
    assert not temporary(run)


# ---- numbers -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(three_runs, tmp_path, monkeypatch, value):
    """The run stops before the weights are touched, and names step, examples and checkpoint."""
    folder, command = three_runs
    total_loss, calls, steps = train.total_loss, [], []

    def breaks(*arguments):
        calls.append(1)
        return total_loss(*arguments) * (value if len(calls) == 4 else 1)
    monkeypatch.setattr(train, "total_loss", breaks)
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a, **k: (steps.append(1), step(*a, **k)))
    with pytest.raises(BadInput, match="^step 4: .*the checkpoint of step 2 is kept.*train.jsonl:") as error:
        go(command, "--out", tmp_path / "run")
    assert len(steps) == 3 and str(error.value).count("train.jsonl:") == 8
    monkeypatch.undo()
    go(command, "--out", tmp_path / "run")  # it goes on from step 2
    assert_equal_runs(folder / "a", tmp_path / "run")


# ---- what others put there ---------------------------------------------------------------------------------

class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_no_pickle_of_others_is_run(three_runs, tmp_path, monkeypatch):
    """Neither as a checkpoint of a run nor as weights."""
    folder, command = three_runs
    run, base, bomb = tmp_path / "run", tmp_path / "base", tmp_path / "went off"
    monkeypatch.setenv("BOMB", str(bomb))
    shutil.copytree(folder / "a", run, ignore=shutil.ignore_patterns("eval.json"))
    left_out = shutil.ignore_patterns("*.safetensors", "run.json", "eval.json")
    shutil.copytree(folder / "a", base, ignore=left_out)
    for save in (torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, 2))):
        for place, name, flags in ((run, "state.pt", [*command, "--out", run]),
                                   (base, "pytorch_model.bin", [*command[:4], "--init_from", base])):
            save({"model": Bomb()}, place / name)
            with pytest.raises(BadInput, match=name):
                go(map(str, flags))
            assert not bomb.exists()


def test_no_link_is_followed_to_a_file_of_the_user(tmp_path, monkeypatch):
    """Temporary files had known names and were opened where they stood: `ln -s victim RUN/state.pt.tmp`, in a
    folder that others can write to, had the next checkpoint overwrite the victim. Not even a guess helps."""
    (tmp_path / "victim").write_text("mine")
    monkeypatch.setattr(secrets, "token_hex", lambda n: "guessed")
    (tmp_path / "notes.guessed.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "notes", "theirs")
    assert (tmp_path / "victim").read_text() == "mine" and not (tmp_path / "notes").exists()


def test_the_network_is_for_downloads_alone(three_runs, tmp_path, monkeypatch):
    """Training, scoring, answering: no socket is opened. One module can open one."""
    def refuse(*_, **__):
        raise AssertionError("the network")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    _, command = three_runs
    run = tmp_path / "run"
    go(command, "--out", run)
    eval.score_run(run, eval.EvalOptions([str(run)]))
    eval.answer_prompt(run, eval.EvalOptions([str(run)], prompt="x"))
    opens = re.compile(r"^ *(?:import|from) (?:urllib|http|socket|requests|ftplib)", re.MULTILINE)
    here = [path.relative_to(ROOT) for path in ROOT.glob("**/*.py") if opens.search(path.read_text())]
    assert [str(path) for path in here if path.parts[0] != "tests"] == ["tasks/datasets.py"]


# ---- the surroundings --------------------------------------------------------------------------------------

REST = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize("environ,rank,world,problem", [
    ({}, 0, 1, ""), ({"RANK": "", "WORLD_SIZE": ""}, 0, 1, ""), ({"WORLD_SIZE": "1"}, 0, 1, ""),
    ({"LOCAL_RANK": "0"}, 0, 1, ""), (REST | {"RANK": "1"}, 1, 2, ""),
    ({"RANK": "0"}, 0, 1, "RANK set, but not WORLD_SIZE, LOCAL_RANK, MASTER_PORT, MASTER_ADDR: start the"),
    (REST | {"RANK": "x"}, 0, 1, "RANK=x: not a number; torchrun sets it"),
    ({"WORLD_SIZE": "-1"}, 0, 1, "WORLD_SIZE=-1: not a number"),
    (REST | {"RANK": "2"}, 2, 2, "below WORLD_SIZE=2")])
def test_what_torchrun_sets_or_would_not(environ, rank, world, problem):
    found = distributed.read_environment(environ)
    assert found[:2] == (rank, world) and bool(found[2]) == bool(problem) and problem in found[2]


def test_a_world_size_alone_is_one_line(small_run, tmp_path):
    reply = forks.run("train", [*small_run, "--out", tmp_path / "run"], env={"WORLD_SIZE": "2"})
    assert reply.returncode == 2 and reply.stderr.startswith("error: WORLD_SIZE set, but not RANK")
    assert reply.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_folder_that_not_every_rank_sees(tmp_path):
    with pytest.raises(BadInput, match="run.json: not seen by every rank; --out must be a folder that all"):
        runs.Run(tmp_path / "here", {}, train.Config, {}, writes=False)


def test_windows(small_run, tmp_path, monkeypatch):
    """It has no pread and no fcntl, and its fsync wants a file that may be written."""
    fcntl, fsync = pytest.importorskip("fcntl"), os.fsync

    def strict(fd):
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        fsync(fd)
    monkeypatch.setattr(os, "fsync", strict)
    monkeypatch.delattr(os, "pread")
    monkeypatch.setattr(runs, "fcntl", None)
    monkeypatch.setattr(datasets.generated_files, "__defaults__", (40, 10))
    go(["--dataset", "nlrx_synth", *small_run[4:], "--max_steps", "1"], "--data_dir", tmp_path / "data",
       "--out", tmp_path / "run")
    assert (tmp_path / "run" / "eval.json").exists()


def test_an_older_python_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 10, 12))
    with pytest.raises(SystemExit, match="2"), main_guard():
        raise AssertionError("not before main()")
    assert capsys.readouterr().err.startswith("error: needs Python 3.11 or newer; this is ")


def test_an_output_that_has_no_such_letter(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    with main_guard():
        print("été 数")
    assert out.buffer.getvalue() == rb"\xe9t\xe9 \u6570" + b"\n"


@pytest.mark.parametrize("lines", [10, 10**6])
def test_a_pipe_that_is_closed(lines):
    """`python data.py show nlrx_synth | head -1` ended with a traceback."""
    code = f"from support.files import main_guard\nwith main_guard():\n    for i in range({lines}): print(i)"
    command = f'{sys.executable} -c "$CODE" | (read line; sleep 0.2); echo ${{PIPESTATUS[0]}}'
    reply = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT,
                           env=os.environ | {"CODE": code})
    assert reply.stdout == ("0\n" if lines == 10 else "141\n") and reply.stderr == ""


def test_an_output_that_is_closed():
    code = "import sys\nfrom support.files import main_guard\nwith main_guard(): print(sys.stdout.isatty())"
    reply = subprocess.run(["bash", "-c", f'{sys.executable} -c "$CODE" >&-'], cwd=ROOT, capture_output=True,
                           text=True, env=os.environ | {"CODE": code})
    assert (reply.returncode, reply.stderr) == (0, "")


# ---- a long life -------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_memory_stays_flat(argv, tmp_path):  # noqa: F811
    """20,000 steps, 250 looks and checkpoints: less than 0.1 MiB more per 1,000 steps."""
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv, "--batch_size", "1",
                                "--alpha", "0.5", "--epochs", "250"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    page, points = os.sysconf("SC_PAGESIZE"), []
    while process.poll() is None:
        time.sleep(0.5)
        lines = (tmp_path / "run" / "metrics.jsonl").exists() and rows_of(tmp_path / "run")
        if lines and lines[-1]["step"] > 2000:  # allocators have warmed up
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            if resident:  # it may have ended
                points.append((lines[-1]["step"] / 1000, resident * page / 2**20))
    assert process.returncode == 0 and rows_of(tmp_path / "run")[-1]["step"] == 20_000
    slope = np.polyfit(*zip(*points, strict=True), 1)[0]
    print(f"{slope:.4f} MiB per 1,000 steps, {points[-1][1]:.0f} MiB at the end")
    assert slope < 0.1
