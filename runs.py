"""A run folder: run.json, which says what the run is, metrics.jsonl and the last checkpoint, state.pt."""
import json
import os
import subprocess
from pathlib import Path

import torch
from torch import nn

from files import BadInput, atomic, read_json, write_text

PLACES = ("out", "data_dir")  # settings that say where things are, and nothing of what they are


def git_commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        reply = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"],
                               capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return reply.stdout.strip() or None


def open_run(folder: Path, record: dict) -> dict:
    """Make the folder and its run.json from the record, or recognise them: what run.json holds. BadInput if
    it is another run's: other settings, other data (`files`), another checkpoint (`init`)."""
    path = folder / "run.json"
    if not path.exists():
        if folder.exists() and any(path.name != "run.json.tmp" for path in folder.iterdir()):
            raise BadInput(f"{folder}: not empty and not a run folder; choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(record, indent=2) + "\n")
        return record
    old = read_json(path)
    if not all(isinstance(old.get(name), dict) for name in ("config", "files", "init")) or "dtype" not in old:
        raise BadInput(f"{path}: not written by this program; choose another --out")
    theirs, ours = old["config"], record["config"]
    different = [f"--{name} {theirs.get(name)} (now {value})" for name, value in ours.items()
                 if name not in PLACES and theirs.get(name) != value]
    if different:
        raise BadInput(f"{folder} holds a run with {', '.join(different)}; choose another --out")
    for name, what in (("files", "on other data"), ("init", "from another checkpoint")):
        if list(old[name].values()) != list(record[name].values()):
            raise BadInput(f"{folder} holds a run {what} than {', '.join(record[name])} now; "
                           "choose another --out")
    for name in ("git_commit", "versions"):
        if old.get(name) != record[name]:
            print(f"note: {name} was {old.get(name)} when this run began, and is {record[name]} now")
    return old


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, and so what a checkpoint holds: everything, or with LoRA the adapters and [PRED]."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def save_state(folder: Path, state: dict) -> None:
    try:
        with atomic(folder / "state.pt") as temporary:
            torch.save(state, temporary)
    except RuntimeError as error:  # what torch.save makes of a full disk
        raise OSError(f"{folder / 'state.pt'}: cannot be written ({str(error).splitlines()[0]})") from None


def load_state(folder: Path, device: torch.device) -> dict | None:
    path = folder / "state.pt"
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises half a dozen kinds on a damaged file
        raise BadInput(f"{path}: damaged ({str(error).splitlines()[0]}); move it away to restart") from None


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict, int]:
    """Load the last checkpoint, if there is one: (steps done, what they took, bytes of metrics.jsonl)."""
    state = load_state(folder, next(model.parameters()).device)
    if state is None:
        return 0, {"examples": 0, "tokens": 0, "flops": 0, "seconds": 0.0}, 0
    try:
        if state["model"].keys() != trainable(model).keys():
            raise KeyError
        model.load_state_dict(state["model"], strict=False)  # with LoRA, the base's weights are not in it
        optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["seen"], state["metrics_size"]
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError):
        raise BadInput(f"{folder / 'state.pt'}: of another run; move it away to restart") from None


def summary(folder: Path) -> dict:
    """What a score is compared by: settings, data, versions, and what the training took so far."""
    run, trained = read_json(folder / "run.json"), {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        trained = {name: row[name] for name in ("step", "examples", "tokens", "flops", "seconds")}
    config = {name: value for name, value in run["config"].items() if name not in PLACES}
    view2 = str(Path(config["view2"]))  # no baseline has this file
    for name in ("view2", "match_flops", "init_from"):
        config[name] = Path(config[name]).name
    config["init_from"] = run["init_run"] or config["init_from"]
    return {"config": config,
            "files": [digest for path, digest in run["files"].items() if path != view2],
            "init": list(run["init"].values()),
            **{name: run[name] for name in ("init_run", "dtype", "device", "versions", "git_commit")},
            "trained": trained}


class Metrics:
    """metrics.jsonl, cut back to `size` bytes: lines behind the last checkpoint are written again."""

    def __init__(self, path: Path, size: int):
        self.file = open(path, "ab")
        if self.file.tell() < size:
            raise BadInput(f"{path}: shorter than at the last checkpoint; put it back, or move the run away")
        self.file.truncate(size)

    def write(self, row: dict) -> None:
        self.file.write(json.dumps(row).encode() + b"\n")
        self.file.flush()  # for whoever watches the run

    def size(self) -> int:
        """Bytes so far, all on the disk."""
        os.fsync(self.file.fileno())
        return self.file.tell()
