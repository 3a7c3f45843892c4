"""A run folder: run.json, which says what the run is, metrics.jsonl, the last checkpoint state.pt, and at the
end the model and eval.json. Nothing of it is read unless it belongs together: state.pt knows the sums of
run.json and of metrics.jsonl up to its step, eval.json those of everything that the run wrote."""
import hashlib
import json
import os
import subprocess
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn

from config import Config
from support.files import BadInput, atomic, read_json, sha256, write_text
from support.tokenizer import CARRIED

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second process out
    fcntl = None

VERSION = 1  # of run folders; raised when what they hold changes
RECORDED = {"source", "init_run", "budget", "dtype", "system", "max_new_tokens", "device", "git_commit",
            "versions"}
PLACES = ("out", "data_dir")  # settings that say where things are, and nothing of what they are
WRITTEN = ("run.json", "metrics.jsonl", "config.json", "model.safetensors", "pred_embedding.safetensors",
           *CARRIED)


def git_commit() -> str | None:
    here = Path(__file__).resolve().parent.parent
    try:
        reply = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"],
                               capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return reply.stdout.strip() or None


def read_run(folder: str | Path) -> dict:
    """What run.json holds; BadInput if it is another program's, or another version's."""
    path = Path(folder) / "run.json"
    run = read_json(path)
    if not all(isinstance(run.get(name), dict) for name in ("config", "files", "init")):
        raise BadInput(f"{path}: not written by this program's train.py")
    if run.get("version") != VERSION:
        raise BadInput(f"{path}: of version {run.get('version')!r}, and this program reads version {VERSION};"
                       f" use the program that wrote it (commit {run.get('git_commit')!r}), or train again")
    if not RECORDED <= run.keys() or not {field.name for field in fields(Config)} <= run["config"].keys():
        raise BadInput(f"{path}: damaged; put its own back, or choose another --out")
    return run


def verify(folder: str | Path) -> None:
    """BadInput if a run is not finished, or a file of it is not the one that it wrote. Any other folder may
    pass."""
    path, is_run = Path(folder) / "eval.json", (Path(folder) / "run.json").exists()
    if is_run:
        read_run(folder)
        if not path.exists():
            raise BadInput(f"{folder}: training is not finished; start the same train.py command again to "
                           "go on")
    elif not (Path(folder) / "model.safetensors").exists() or not path.exists():
        return
    sums = read_json(path).get("sha256")
    if sums is None and not is_run:
        return
    if not isinstance(sums, dict) or not sums or set(sums) - set(WRITTEN):
        raise BadInput(f"{path}: not written by this program; move it away and start train.py again")
    for name, digest in sums.items():
        file = Path(folder) / name
        if not file.is_file() or sha256(file) != digest:
            raise BadInput(f"{file}: missing, damaged or of another run, says eval.json; put its own back, or"
                           " move eval.json away and start train.py again")


def summary(folder: Path) -> dict:
    """What a score is compared by: settings, data, versions, and what the training took so far."""
    run, trained = read_run(folder), {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        trained = {name: row[name] for name in ("step", "examples", "tokens", "flops", "seconds")}
    config = {name: value for name, value in run["config"].items() if name not in PLACES}
    for name in ("match_flops", "init_from"):
        config[name] = Path(config[name]).name
    config["init_from"] = run["init_run"] or config["init_from"]
    return {"config": config,
            "files": list(run["files"].values()),
            "init": list(run["init"].values()),
            **{name: run[name] for name in ("init_run", "dtype", "device", "versions", "git_commit")},
            "trained": trained,
            "sha256": {name: sha256(folder / name) for name in WRITTEN if (folder / name).exists()}}


class Run:
    """An open run folder. The one process that `writes` has it for itself until it ends or closes it."""

    def __init__(self, folder: Path, record: dict, writes: bool = True):
        """Make the folder and its run.json from the record, or recognise them. BadInput if it is another
        run's: other settings, other data (`files`), another checkpoint (`init`); or in use."""
        self.folder, self.log, self.sum = folder, None, hashlib.sha256()
        path, new = folder / "run.json", not (folder / "run.json").exists()
        if new and folder.exists():
            for found in folder.iterdir():  # what a killed process can leave before run.json is there
                if found.name != "run.json.tmp" and (found.name != "metrics.jsonl" or found.stat().st_size):
                    raise BadInput(f"{folder}: not empty and not a run folder; choose another --out")
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            self.log = open(folder / "metrics.jsonl", "ab+")
            try:
                if fcntl:
                    fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BadInput(f"{folder}: another process is training here; choose another --out") from None
            new = not path.exists()  # another process may have been here until now
        try:
            if new:
                write_text(path, json.dumps({"version": VERSION} | record, indent=2) + "\n")
            self.record = read_run(folder)
            self.recognise(record)
            for left in folder.glob("*.tmp") if writes else ():  # by a killed process
                left.unlink()
        except BaseException:
            self.close()
            raise
        self.digest = sha256(path)

    def recognise(self, record: dict) -> None:
        theirs, ours = self.record["config"], record["config"]
        different = [f"--{name} {theirs.get(name)} (now {value})" for name, value in ours.items()
                     if name not in PLACES and theirs.get(name) != value]
        if different:
            raise BadInput(f"{self.folder} holds a run with {', '.join(different)}; choose another --out")
        for name, what in (("files", "on other data"), ("init", "from another checkpoint")):
            if list(self.record[name].values()) != list(record[name].values()):
                raise BadInput(f"{self.folder} holds a run {what} than {', '.join(record[name])} now; "
                               "choose another --out")
        for name in ("git_commit", "versions"):
            if self.record.get(name) != record[name]:
                print(f"note: {name} was {self.record.get(name)} when this run began, and is {record[name]} "
                      "now")

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self.log:
            self.log.close()

    def write(self, row: dict) -> None:
        """A line of metrics.jsonl."""
        if self.log:
            line = json.dumps(row).encode() + b"\n"
            self.sum.update(line)
            self.log.write(line)
            self.log.flush()  # for whoever watches the run

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, seen: dict) -> None:
        """The checkpoint: it replaces the last one when it is whole."""
        if not self.log:
            return
        os.fsync(self.log.fileno())
        state = {"run": self.digest, "metrics_size": self.log.tell(), "metrics": self.sum.hexdigest(),
                 "step": step, "seen": seen, "model": trainable(model), "optimizer": optimizer.state_dict()}
        try:
            with atomic(self.folder / "state.pt") as temporary:
                torch.save(state, temporary)
        except RuntimeError as error:  # what torch.save makes of a full disk
            raise OSError(f"{self.folder / 'state.pt'}: cannot be written "
                          f"({str(error).splitlines()[0]})") from None

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, every: int) -> tuple[int, dict]:
        """Load the last checkpoint, if there is one, and cut metrics.jsonl back to it: lines behind it are
        written again. Returns the steps done, and what they took. every: steps between two checkpoints."""
        path, size = self.folder / "state.pt", 0
        start, seen = 0, {"examples": 0, "tokens": 0, "flops": 0, "seconds": 0.0}
        state = load_state(self.folder, next(model.parameters()).device)
        if state is not None:
            try:
                if state["run"] != self.digest or state["model"].keys() != trainable(model).keys():
                    raise KeyError
                model.load_state_dict(state["model"], strict=False)  # with LoRA, without the base's weights
                optimizer.load_state_dict(state["optimizer"])
                start, seen, size, digest = (state[x] for x in ("step", "seen", "metrics_size", "metrics"))
            except (KeyError, RuntimeError, ValueError, TypeError, AttributeError):
                raise BadInput(f"{path}: of another run; put its own back, or choose another --out") from None
        if not self.log:
            return start, seen
        self.log.seek(0)
        content = self.log.read(size if state else -1)
        metrics = self.folder / "metrics.jsonl"
        if state:
            self.sum = hashlib.sha256(content)
            if len(content) < size or self.sum.hexdigest() != digest:
                raise BadInput(f"{metrics}: not as at the last checkpoint; put its own back, or choose "
                               "another --out")
        elif last_step(metrics, content) > every:
            raise BadInput(f"{path}: missing, but {metrics} goes on behind the first checkpoint; put it back,"
                           " or choose another --out")
        self.log.truncate(size)
        self.log.seek(size)
        return start, seen


def last_step(path: Path, content: bytes) -> int:
    """Of the whole lines of a metrics.jsonl: a kill may tear the last one."""
    try:
        return max((json.loads(line)["step"] for line in content.split(b"\n")[:-1]), default=0)
    except (ValueError, TypeError, KeyError):
        raise BadInput(f"{path}: damaged; choose another --out") from None


def load_state(folder: Path, device: torch.device) -> dict | None:
    path = folder / "state.pt"
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises half a dozen kinds on a damaged file
        what = str(error).partition("\n")[0] or type(error).__name__
        raise BadInput(f"{path}: damaged ({what}); put a whole one back, or choose another --out") from None


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, and so what a checkpoint holds: everything, or with LoRA the adapters and [PRED]."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
