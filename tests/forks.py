"""Programs of the project, each a process of its own, without importing torch each time (2 to 3 s).

    reply = run("train", argv)          returncode, stdout, stderr, as of subprocess.run
    job = start("train", argv, env=...) and later job.wait()

A server, one per process of pytest, has imported everything; for each job it forks a child. A line of its
stdin is {"start": job} or {"wait": pid}; a line of its stdout is the child's pid or its status (-signal where
one killed it). """
import ctypes
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


# ---- the tests' side ---------------------------------------------------------------------------------------

@dataclass
class Job:
    """A program that runs, or has run."""
    pid: int
    folder: Path
    returncode: int | None = None

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def wait(self) -> "Job":
        if self.returncode is None:
            self.returncode = server().ask({"wait": self.pid})
        return self

    def signal(self, number: int) -> None:
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            pass  # it was quicker


def start(program: str, argv: list, **options) -> Job:
    """options: cwd; env, to be added; ignore, signals; full, (folder, n): no write call succeeds in it from
    the n-th on; published, more of tasks.datasets.PUBLISHED."""
    folder = Path(tempfile.mkdtemp(dir=server().folder))
    job = {"program": program, "argv": list(map(str, argv)), "folder": str(folder), **options}
    return Job(server().ask({"start": job}), folder)


def run(program: str, argv: list, **options) -> Job:
    return start(program, argv, **options).wait()


class Server:
    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="forks"))
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        if sys.platform.startswith("linux") and shutil.which("gcc"):
            source, shim = ROOT / "tests" / "faults.c", self.folder / "faults.so"
            subprocess.run(["gcc", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
            env["LD_PRELOAD"] = str(shim)
        self.has_shim = "LD_PRELOAD" in env
        self.process = subprocess.Popen([sys.executable, __file__, self.folder], text=True, env=env,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, what: dict) -> int:
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@functools.cache
def server() -> Server:
    return Server()


# ---- the server's side -------------------------------------------------------------------------------------

def child(job: dict, programs: dict) -> None:
    from support import distributed
    from support.files import main_guard
    from tasks.datasets import PUBLISHED
    for number, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(Path(job["folder"], name), os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(job.get("env", {}))
    distributed.rank, distributed.world, distributed.problem = distributed.read_environment(os.environ)
    os.chdir(job.get("cwd") or job["folder"])
    signal.alarm(300)  # a rank whose other one died would wait for hours
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # so does nohup
    for number in job.get("ignore", ()):
        signal.signal(number, signal.SIG_IGN)
    PUBLISHED.update(job.get("published", {}))
    sys.argv, status = [job["program"] + ".py", *job["argv"]], 0
    if "full" in job:
        shim = ctypes.CDLL(None)
        shim.full_from(os.fsencode(job["full"][0]), job["full"][1])
    try:
        with main_guard():
            programs[job["program"]]()
    except SystemExit as end:
        status = end.code or 0
    sys.stdout.flush(), sys.stderr.flush()
    if "full" in job:
        print(f"\ncalls: {shim.calls_seen()}", flush=True)
    os._exit(status)


def serve() -> None:
    sys.path.insert(0, str(ROOT))
    import torch._dynamo  # noqa: F401  the first optimizer imports it, which takes a second
    import data
    import eval
    import train
    programs = {"train": train.main, "eval": eval.main, "data": data.main}
    print("ready", flush=True)
    for line in sys.stdin:
        what = json.loads(line)
        if "wait" in what:
            print(os.waitstatus_to_exitcode(os.waitpid(what["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            try:
                child(what["start"], programs)
            except BaseException:
                import traceback
                traceback.print_exc()
            os._exit(99)
        print(pid, flush=True)
    shutil.rmtree(sys.argv[1], ignore_errors=True)  # pytest has ended, however it did


if __name__ == "__main__":
    serve()
