"""What machines do to a run: kills at random moments, a disk that is full from any write on, files that are
cut, emptied, lost or another run's, two runs in one folder, numbers that are none."""
import functools
import http.server
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_train import argv, assert_equal_runs, rows_of, untimed  # noqa: F401 (argv: a fixture)

import eval
from support import runs
import train
from support.files import BadInput, Interrupted, Interrupts
from tasks import nlrx, scorers
from tasks.datasets import git_blob_id


class Forks:
    """tests/forks.py, running."""

    def __init__(self, folder: Path, **env: str):
        self.log = folder / "log.txt"
        self.server = subprocess.Popen([sys.executable, str(ROOT / "tests" / "forks.py")], text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder,
                                       env=os.environ | {"OMP_NUM_THREADS": "1"} | env)
        assert self.server.stdout.readline() == "ready\n"

    def start(self, program: str, arguments: list, full=None, published=()) -> int:
        job = {"program": program, "argv": list(map(str, arguments)), "log": str(self.log), "full": full,
               "published": dict(published)}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def wait(self) -> int:
        return int(self.server.stdout.readline())

    def run(self, *arguments, **options) -> int:
        self.start(*arguments, **options)
        return self.wait()

    def said(self) -> str:
        return self.log.read_text()


@pytest.fixture
def forks(tmp_path):
    server = Forks(tmp_path)
    yield server
    server.server.stdin.close()
    server.server.wait()


def signalled(forks, number, delay, *job, **options) -> tuple[int, float]:
    """Start a program, send it a signal after a while: its status, and how long it then took."""
    pid = forks.start(*job, **options)
    time.sleep(delay)
    began = time.monotonic()
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it was quicker
    return forks.wait(), time.monotonic() - began


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def temporary(folder: Path) -> list[Path]:
    return list(folder.glob("**/*.tmp"))


def metrics(folder: Path) -> list[dict]:
    """Without timings."""
    rows = [row | row.pop("look", {}) for row in rows_of(folder)]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in rows]


# ---- killed ------------------------------------------------------------------------------------------------

def test_forty_kills_of_training_and_scoring(forks, argv, tmp_path):  # noqa: F811
    """At random moments, of 30 trainings (checkpoints, looks, export and the score at the end included), of
    10 scorings; every run ends with the bits, the metrics and the score of the one that nobody killed."""
    argv = [*argv, "--checkpoint_every", "3", "--max_steps", "12", "--alpha", "0.5"]
    began, whole, rng = time.monotonic(), tmp_path / "whole", random.Random(0)
    assert forks.run("train", [*argv, "--out", whole]) == 0, forks.said()
    trained = time.monotonic() - began
    assert forks.run("eval", [whole]) == 0, forks.said()
    scored, wanted = time.monotonic() - began - trained, json.loads((whole / "eval.json").read_text())
    killed, folder, moments = 0, tmp_path / "run0", set()
    while killed < 40:
        job, longest = ("train", [*argv, "--out", folder]), trained
        if killed == 30 and not (folder / "eval.json").exists():
            assert forks.run(*job) == 0, forks.said()
        if killed >= 30:
            job, longest = ("eval", [folder]), scored
        status, _ = signalled(forks, signal.SIGKILL, rng.uniform(0, 1) * longest, *job)
        assert status in (0, -signal.SIGKILL), forks.said()
        killed += status == -signal.SIGKILL
        moments.add(tuple(sorted(path.name for path in folder.glob("*"))))
        if status == 0 and killed < 30:
            folder = tmp_path / f"run{killed}"
    assert forks.run("train", [*argv, "--out", folder]) == 0, forks.said()
    assert len(moments) > 2  # not always the same one
    for run in tmp_path.glob("run*"):
        assert_equal_runs(whole, run)
        assert metrics(whole) == metrics(run) and not temporary(run)
        score = json.loads((run / "eval.json").read_text())
        assert untimed(score) == untimed(wanted)


def test_ten_kills_of_a_download(forks, tmp_path):
    """From a server that takes half a second for a file."""
    content = b"".join(b'{"text": "%d", "code": "c"}\n' % i for i in range(60_000))
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "big.jsonl").write_bytes(content)

    class Slow(http.server.SimpleHTTPRequestHandler):
        def copyfile(self, source, target):
            while chunk := source.read(len(content) // 10 + 1):
                target.write(chunk)
                time.sleep(0.05)

        def log_message(self, *_):
            pass
    handler, rng = functools.partial(Slow, directory=tmp_path / "mirror"), random.Random(1)
    data = tmp_path / "data"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        job = ("data", ["download", "nlrx_synth", "--data_dir", data, "--base_url",
                        f"http://127.0.0.1:{server.server_port}"])
        published = {"nlrx_synth": {"train": ["big.jsonl", git_blob_id(tmp_path / "mirror" / "big.jsonl")]}}
        for _ in range(10):
            status, _ = signalled(forks, signal.SIGKILL, rng.uniform(0.05, 0.5), *job, published=published)
            assert status == -signal.SIGKILL and not (data / "big.jsonl").exists()
        assert forks.run(*job, published=published) == 0, forks.said()
        server.shutdown()
    assert (data / "big.jsonl").read_bytes() == content and not temporary(data)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(forks, argv, tmp_path, number):  # noqa: F811
    """It ends within 5 s, with a checkpoint of the last step and a line that says how to go on."""
    argv, rng, stopped, run = [*argv, "--epochs", "4"], random.Random(2), 0, tmp_path / "run"
    assert forks.run("train", [*argv, "--out", tmp_path / "whole"]) == 0
    for _ in range(4):
        before, end = size_of(run / "metrics.jsonl"), time.monotonic() + 60
        pid = forks.start("train", [*argv, "--out", run])
        while size_of(run / "metrics.jsonl") <= before and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(pid, number)
        began, status = time.monotonic(), forks.wait()
        assert time.monotonic() - began < 5
        if status == 0:
            break  # it was quicker
        assert status == 128 + number, forks.said()
        last = forks.said().splitlines()[-1]
        assert last.startswith("interrupted: the same command goes on from"), forks.said()
        assert "Traceback" not in forks.said()
        if "from step" in last:
            stopped += 1
            state = runs.load_state(run, torch.device("cpu"))
            assert last.endswith(f"goes on from step {state['step']}")
    assert stopped
    assert forks.run("train", [*argv, "--out", run]) == 0, forks.said()
    assert_equal_runs(tmp_path / "whole", run)
    assert metrics(tmp_path / "whole") == metrics(run) and not temporary(run)


def test_a_signal_that_comes_twice_still_waits(monkeypatch):
    """Launchers send one to the group and one more themselves; a person's second one comes later."""
    signals = Interrupts()
    signals.waits = True
    signals(signal.SIGTERM, None)
    signals(signal.SIGTERM, None)
    signals.since -= 2
    with pytest.raises(KeyboardInterrupt):
        signals(signal.SIGTERM, None)
    signals.waits = False
    with pytest.raises(Interrupted):
        signals.look()


def test_sqlite_does_not_swallow_a_signal(tmp_path, monkeypatch):
    """It makes an error of its own of what its callbacks raise."""
    sqlite3.connect(tmp_path / "d.sqlite").close()
    monkeypatch.setattr(scorers, "interrupts", Interrupts())
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
    timer = threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGTERM))
    old = signal.signal(signal.SIGTERM, scorers.interrupts)
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            scorers.run_query(tmp_path / "d.sqlite", endless)
    finally:
        signal.signal(signal.SIGTERM, old)


# ---- a full disk -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("at_most", [20, pytest.param(10**9, marks=pytest.mark.slow)], ids=["some", "all"])
def test_the_disk_is_full_from_any_write_on(argv, tmp_path, at_most):  # noqa: F811
    """A call that writes into the run folder fails, and all behind it: one line, status 2; the last
    checkpoint loads, and with room again the run ends as if nothing had been."""
    shim, source = tmp_path / "faults.so", ROOT / "tests" / "faults.c"
    if not sys.platform.startswith("linux") or not shutil.which("gcc"):
        pytest.skip("needs Linux and gcc")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(shim), str(source), "-ldl"], check=True)
    argv = [*argv, "--max_steps", "3", "--checkpoint_every", "2", "--n_layers", "1"]
    forks, whole = Forks(tmp_path, LD_PRELOAD=str(shim)), tmp_path / "whole"
    assert forks.run("train", [*argv, "--out", whole], full=[str(whole), 10**9]) == 0, forks.said()
    calls = int(forks.said().rpartition("calls: ")[2])
    assert calls > 20
    for n in range(1, calls + 1, max(1, calls // at_most)):
        run = tmp_path / f"run{n}"
        assert forks.run("train", [*argv, "--out", run], full=[str(run), n]) == 2, (n, forks.said())
        said = forks.said().rpartition("\ncalls")[0].strip().splitlines()
        assert said[-1].startswith("error: ") and "Traceback" not in forks.said(), (n, forks.said())
        state = runs.load_state(run, torch.device("cpu"))  # raises if it is damaged
        assert state is None or state["step"] in (2, 3)
        assert forks.run("train", [*argv, "--out", run]) == 0, (n, forks.said())
        assert_equal_runs(whole, run)
        assert not temporary(run)
        shutil.rmtree(run)
    print(f"{calls} writes")
    forks.server.stdin.close()
    forks.server.wait()


# ---- damage ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def two_runs(pairs, tmp_path_factory):
    """Two finished runs that differ in the seed and the data, and the one's command."""
    folder = tmp_path_factory.mktemp("runs")
    other = folder / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"item {i}", "code": f"a{i}"}) + "\n" for i in range(40)))
    tiny = ["--dim", "32", "--n_layers", "1", "--n_heads", "2", "--ffn_dim", "48", "--vocab_size", "300",
            "--batch_size", "8", "--max_steps", "5", "--checkpoint_every", "2", "--max_new_tokens", "8",
            "--log_every", "1", "--device", "cpu"]
    commands = [["--dataset", str(data), "--test_file", str(pairs / "test.jsonl"), *tiny, "--seed", seed]
                for data, seed in ((pairs / "train.jsonl", "1"), (other, "2"))]
    for name, command in zip("ab", commands, strict=True):
        train.train(train.parse_config([*command, "--out", str(folder / name)]))
    return folder, commands[0]


HARM = {"cut": lambda path, other: path.write_bytes(path.read_bytes()[:path.stat().st_size * 2 // 3]),
        "emptied": lambda path, other: path.write_bytes(b""), "deleted": lambda path, other: path.unlink(),
        "swapped": lambda path, other: shutil.copy(other, path)}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "state.pt"])
def test_a_harmed_unfinished_run(two_runs, tmp_path, name, harm):
    """It never goes on: neither from another place nor from the beginning; nothing else in it is changed."""
    folder, command = two_runs
    run = tmp_path / "run"
    shutil.copytree(folder / "a", run)
    for left in ("eval.json", "model.safetensors", "config.json"):
        (run / left).unlink()
    HARM[harm](run / name, folder / "b" / name)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(BadInput, match="run" if name == "run.json" else name) as error:
        train.train(train.parse_config([*command, "--out", str(run)]))
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == {"metrics.jsonl": b""} | before


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "config.json", "model.safetensors",
                                  "pred_embedding.safetensors", "tokenizer.model", "eval.json"])
def test_a_harmed_finished_run(two_runs, tmp_path, name, harm, monkeypatch):
    """Not scored, not answered from, not a base to train on, not taken for finished."""
    folder, command = two_runs
    run = tmp_path / "run"
    shutil.copytree(folder / "a", run)
    (run / name).touch()
    if (run / name).read_bytes() == (folder / "b" / name).read_bytes():
        assert name == "config.json"  # of the same shape
        return
    HARM[harm](run / name, folder / "b" / name)
    uses = {
        "finished": lambda: train.train(train.parse_config([*command, "--out", str(run)])),
        "score": lambda: eval.score_run(run), "prompt": lambda: eval.answer_prompt(str(run), "x"),
        "base": lambda: train.train(train.parse_config([
            *command[:4], "--init_from", str(run), "--max_steps", "1", "--out", str(tmp_path / "next")]))}
    unscored = uses.pop("finished") if (name, harm) == ("eval.json", "deleted") else None
    for use in uses.values():
        with pytest.raises(BadInput, match="run" if name in ("run.json", "eval.json") else name) as error:
            use()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "next").exists()
    if unscored:  # a run without its score is not finished: it goes on
        assert unscored()["n"] == 12


def test_another_versions_run(two_runs, tmp_path):
    folder, command = two_runs
    run = tmp_path / "run"
    shutil.copytree(folder / "a", run)
    record = json.loads((run / "run.json").read_text())
    for version in (None, 0, runs.VERSION + 1):
        (run / "run.json").write_text(json.dumps(record | {"version": version}))
        for use in (lambda: train.train(train.parse_config([*command, "--out", str(run)])),
                    lambda: eval.score_run(run)):
            with pytest.raises(BadInput, match=f"of version {version}, and this program reads version"):
                use()


def test_two_runs_in_one_folder(two_runs, argv, tmp_path):  # noqa: F811
    """The second refuses, and harms nothing; when the first has ended, or died, it may."""
    folder, command = two_runs
    run = tmp_path / "run"
    shutil.copytree(folder / "a", run)
    (run / "eval.json").unlink()
    c = train.parse_config([*command, "--out", str(run)])
    with runs.Run(run, json.loads((run / "run.json").read_text())):
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        with pytest.raises(BadInput, match="another process is training here"):
            train.train(c)
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert train.train(c)["n"] == 12


# ---- numbers -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(two_runs, tmp_path, monkeypatch, value):
    """The run stops before the weights are touched, and names step, examples and checkpoint."""
    _, command = two_runs
    total_loss, calls, steps = train.total_loss, [], []

    def breaks(*arguments):
        calls.append(1)
        return total_loss(*arguments) * (value if len(calls) == 4 else 1)
    monkeypatch.setattr(train, "total_loss", breaks)
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a, **k: (steps.append(1), step(*a, **k)))
    c = train.parse_config([*command, "--out", str(tmp_path / "run")])
    with pytest.raises(BadInput, match="^step 4: .*the checkpoint of step 2 is kept.*train.jsonl:") as error:
        train.train(c)
    assert len(steps) == 3 and str(error.value).count("train.jsonl:") == 8
    monkeypatch.undo()
    assert train.train(c)["n"] == 12  # it goes on from step 2
    assert_equal_runs(two_runs[0] / "a", tmp_path / "run")


def test_the_same_seed_twice(two_runs, tmp_path):
    folder, command = two_runs
    train.train(train.parse_config([*command, "--out", str(tmp_path / "run")]))
    assert_equal_runs(folder / "a", tmp_path / "run")
    assert metrics(folder / "a") == metrics(tmp_path / "run")


# ---- strangers -------------------------------------------------------------------------------------------

class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_no_pickle_of_others_is_run(two_runs, tmp_path, monkeypatch):
    """Neither as a checkpoint of a run nor as weights."""
    folder, command = two_runs
    run, base, bomb = tmp_path / "run", tmp_path / "base", tmp_path / "went off"
    monkeypatch.setenv("BOMB", str(bomb))
    shutil.copytree(folder / "a", run)
    (run / "eval.json").unlink()
    left_out = shutil.ignore_patterns("*.safetensors", "run.json", "eval.json")
    shutil.copytree(folder / "a", base, ignore=left_out)
    for save in (torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))):
        for place, name, flags in ((run, "state.pt", [*command, "--out", str(run)]),
                                   (base, "pytorch_model.bin", [*command[:4], "--init_from", str(base)])):
            save({"model": Bomb()}, place / name)
            with pytest.raises(BadInput, match=name):
                train.train(train.parse_config(flags))
            assert not bomb.exists()


def test_the_network_is_for_downloads_alone(two_runs, tmp_path, monkeypatch):
    """Training, scoring, answering: no socket is opened. One module can open one."""
    def refuse(*_, **__):
        raise AssertionError("the network")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    folder, command = two_runs
    train.train(train.parse_config([*command, "--out", str(tmp_path / "run")]))
    eval.score_run(tmp_path / "run")
    eval.answer_prompt(str(tmp_path / "run"), "x")
    opens = re.compile(r"^ *(?:import|from) (?:urllib|http|socket|requests|ftplib)", re.MULTILINE)
    here = [path.relative_to(ROOT) for path in ROOT.glob("**/*.py") if opens.search(path.read_text())]
    assert [str(path) for path in here if path.parts[0] != "tests"] == ["tasks/datasets.py"]


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


@pytest.mark.slow
def test_a_million_lines(argv, tmp_path):  # noqa: F811
    """100 steps from a file of a million lines: at most 200 MiB more than from one of a thousand."""
    lines = [json.dumps({"text": text, "code": code}) + "\n" for text, code in nlrx.generate(1000)]
    peaks, seconds = [], []
    for copies in (1, 1000):
        path = tmp_path / f"{copies}.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            for _ in range(copies):
                file.writelines(lines)
        start = time.monotonic()
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv, "--max_steps", "100",
                                    "--dataset", str(path), "--out", str(tmp_path / f"run{copies}")],
                                   stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        assert status == 0
        peaks.append(used.ru_maxrss / 1024)
        seconds.append(time.monotonic() - start)
    print(f"peaks of {peaks[0]:.0f} and {peaks[1]:.0f} MiB, {seconds[1] - seconds[0]:.0f} s more")
    assert peaks[1] - peaks[0] < 200
