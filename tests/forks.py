"""Starts programs of the project without importing torch each time: for tests that start hundreds.

A line of stdin: {"program": "train", "argv": [...], "log": PATH, "full": [folder, n] or null,
"published": more of datasets.PUBLISHED}. A line of
stdout: the child's pid, and when it has ended its status (-signal where one killed it).
"""
import ctypes
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import eval  # noqa: E402
import train  # noqa: E402
from support.files import main_guard  # noqa: E402
from tasks.datasets import PUBLISHED  # noqa: E402

PROGRAMS = {"train": train.main, "eval": eval.main, "data": data.main}


def child(job: dict) -> None:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.argv = [job["program"] + ".py", *job["argv"]]
    PUBLISHED.update(job["published"])
    shim = ctypes.CDLL(None) if job["full"] else None
    if shim:
        shim.full_from(os.fsencode(job["full"][0]), job["full"][1])
    status = 0
    try:
        with main_guard():
            PROGRAMS[job["program"]]()
    except SystemExit as end:
        status = end.code or 0
    sys.stdout.flush(), sys.stderr.flush()
    if shim:
        print(f"\ncalls: {shim.calls_seen()}", flush=True)
    os._exit(status)


print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            child(json.loads(line))
        except BaseException:
            import traceback
            traceback.print_exc()
        os._exit(99)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
