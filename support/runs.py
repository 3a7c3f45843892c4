"""A run folder: run.json, which says what the run is; metrics.jsonl; state.pt, the last checkpoint; and at
the end the model and eval.json. A run goes on only where its settings, data and base model are those of
run.json."""
import contextlib
import json
import os
import subprocess
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from support import distributed
from support.distributed import gathered, part_of
from support.files import BadInput, append, atomic, library, parse_json, printable, read_json, regular
from support.files import write_text
from support.settings import differences, fill
from support.tables import COLUMNS, SHARES, from_hex

SCORES = (*COLUMNS, "cos_gap")
try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second process out
    fcntl = None

# What a run.json holds, whatever else is in it
RECORDED = {"config": dict, "files": dict, "init": dict, "source": str, "dtype": str, "system": str,
            "max_new_tokens": int}


def git_commit() -> str | None:
    here = Path(__file__).resolve().parent.parent
    try:
        reply = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"],
                               capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return reply.stdout.strip() or None


def read_run(folder: str | Path) -> dict:
    """What run.json holds; BadInput if it is another program's."""
    path = Path(folder) / "run.json"
    run = read_json(path)
    for name, kind in RECORDED.items():
        value = run.get(name)
        if type(value) is not kind or kind is int and not 1 <= value < 2**63:
            raise BadInput(f"{path}: damaged, or not written by this program's train.py: its {name} is "
                           f"{value!r:.60}")
    return run


def read_score(folder: str | Path) -> dict:
    """What eval.json holds, with shares counted from the items' verdicts. BadInput if it is damaged."""
    path = Path(folder) / "eval.json"
    result = read_json(path)
    try:
        n, names = result["n"], [result.get(name, "") for name in ("dataset", "source")]
        verdicts = {name: from_hex(text, n) for name, text in result.get("items", {}).items()}
        if type(n) is not int or n < 1 or any(len(x) != n for x in verdicts.values()):
            raise ValueError
        result |= {name: float(x.mean()) for name, x in verdicts.items() if name in SHARES}
        numbers = [result[name] for name in SCORES if result.get(name) is not None]
        if not (all(type(name) is str for name in names)
                and all(type(x) in (int, float) and not abs(x) > 1e99 for x in numbers)):
            raise ValueError
    except (LookupError, TypeError, ValueError, AttributeError):
        raise BadInput(f"{path}: damaged, or not written by this program's train.py") from None
    return result


def trained_so_far(folder: Path) -> dict:
    """What the last line of metrics.jsonl says that the training took; BadInput if it is cut."""
    path, names, row = folder / "metrics.jsonl", ("step", "examples", "tokens", "flops", "seconds"), {}
    for row in read_metrics(path, torn=False):  # noqa: B007  the last one counts
        pass
    if not set(names) <= row.keys():
        raise BadInput(f"{path}: damaged; its last line is not whole")
    return {name: row[name] for name in names}


def run_summary(folder: Path) -> dict:
    """What a score is compared by: settings, data, versions, and what the training took. Of a path, only the
    last part."""
    run = read_run(folder)
    config = {name: Path(value).name if isinstance(value, str) else value
              for name, value in run["config"].items() if name not in ("out", "data_dir")}
    config["init_from"] = run.get("init_run") or config.get("init_from", "")
    return {"config": config, "files": list(run["files"].values()), "init": list(run["init"].values()),
            **{name: run.get(name) for name in ("init_run", "dtype", "device", "versions", "git_commit")},
            "trained": trained_so_far(folder)}


class Board:
    """What metrics.jsonl holds, in FOLDER/tensorboard: the terms of the loss apart, and scores on the way as
    look/NAME. BadInput if TensorBoard is not installed."""

    def __init__(self, folder: Path):
        library("tensorboard", "--log tensorboard", "requirements-lesson.txt")
        self.folder, self.writer = folder / "tensorboard", None

    def write(self, row: dict) -> None:
        if self.writer is None:  # a run that goes on replaces what it had shown of later steps
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(str(self.folder), purge_step=row["step"])
        values = {f"look/{name}": value for name, value in row["look"].items()} if "look" in row else row
        for name, value in values.items():
            if type(value) in (int, float) and name != "step":
                self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Run(contextlib.AbstractContextManager):
    """An open run folder. The one process that `writes` has it for itself until it ends or closes it."""

    def __init__(self, folder: Path, record: dict, settings: type, former: dict, writes: bool = True):
        """Make the folder and its run.json from the record, or recognise them. BadInput if it is another
        run's (other settings, data or base model) or in use. settings, former: see settings.fill."""
        self.folder, self.log, self.last_line = folder, None, b""
        self.board = Board(folder) if writes and record["config"].get("log") == "tensorboard" else None
        self.settings, self.former = settings, former
        path = folder / "run.json"
        if folder.exists() and not path.exists():
            for found in folder.iterdir():  # what a killed process can leave before run.json is there
                if found.suffix != ".tmp" and (found.name != "metrics.jsonl" or found.stat().st_size):
                    raise BadInput(f"{folder}: not empty and not a run folder; choose another --out")
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            for found in folder.iterdir():  # libraries would write where it leads
                if found.is_symlink() and found.suffix != ".tmp":
                    raise BadInput(f"{found}: a link; remove it, or choose another --out")
            self.log = append(folder / "metrics.jsonl")
            try:
                if fcntl:
                    fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BadInput(f"{folder}: another process is training here; choose another --out") from None
        try:
            if writes and not path.exists():
                write_text(path, json.dumps(record, indent=2) + "\n")
            if not path.exists():  # rank 0 has just written it
                raise BadInput(f"{path}: not seen by every rank; --out must be a folder that all nodes share")
            self.record = read_run(folder)
            self.recognise(record)
            for left in folder.glob("*.tmp") if writes else ():  # by a killed process
                left.unlink()
        except BaseException:
            self.close()
            raise

    def recognise(self, record: dict) -> None:
        self.record["config"] = fill(self.settings, self.record["config"], self.former,
                                     self.folder / "run.json")
        different = differences(self.settings, self.record["config"], record["config"])
        if different:
            raise BadInput(f"{self.folder} holds a run with {', '.join(different)}; choose another --out")
        for name, what in (("files", "on other data"), ("init", "from another base model")):
            if list(self.record[name].values()) != list(record[name].values()):
                raise BadInput(f"{self.folder} holds a run {what} than {', '.join(record[name])} now; "
                               "choose another --out")
        for name in ("git_commit", "versions"):
            if self.record.get(name) != record[name]:
                print(f"note: {name} was {printable(self.record.get(name))} when this run began, and is "
                      f"{record[name]} now")

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        for file in (self.log, self.board):
            if file:
                file.close()

    def write(self, row: dict) -> None:
        """A line of metrics.jsonl."""
        if self.log:
            self.last_line = json.dumps(row).encode() + b"\n"
            self.log.write(self.last_line)
            self.log.flush()  # for whoever watches the run
        if self.board:
            self.board.write(row)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, seen: dict,
             ema: nn.Module | None = None) -> None:
        """The checkpoint: it replaces the last one when it is whole. ema: a moving average of the model."""
        state = gathered({"config": self.record["config"], "step": step, "seen": seen,
                          "model": trainable(model), "optimizer": optimizer.state_dict(),
                          "ema": ema and ema.state_dict()})
        if not self.log:
            return
        os.fsync(self.log.fileno())
        state |= {"metrics_size": self.log.tell(), "last_line": self.last_line}
        try:
            with atomic(self.folder / "state.pt") as temporary:
                torch.save(state, temporary)
        except RuntimeError as error:  # what torch.save makes of a full disk
            raise OSError(f"{self.folder / 'state.pt'}: cannot be written "
                          f"({str(error).splitlines()[0]})") from None

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, every: int,
                ema: nn.Module | None = None) -> tuple[int, dict]:
        """Load the last checkpoint, if there is one, and cut metrics.jsonl back to it: lines after it are
        written again. Returns the steps done, and what they took. every: steps between two checkpoints."""
        path, metrics = self.folder / "state.pt", self.folder / "metrics.jsonl"
        step, seen, size = 0, {"examples": 0, "tokens": 0, "flops": 0, "seconds": 0.0}, 0
        state = load_state(self.folder, next(model.parameters()).device)
        if state is None:
            if any(row["step"] > every for row in read_metrics(metrics)):
                raise BadInput(f"{path}: missing, but {metrics} goes on after the first checkpoint; put it "
                               "back, or choose another --out")
        else:
            try:
                theirs = fill(self.settings, state.get("config", self.record["config"]), self.former)
                if (differences(self.settings, theirs, self.record["config"])
                        or state["model"].keys() != trainable(model).keys()):
                    raise KeyError
                step, seen, size = state["step"], seen | state["seen"], state["metrics_size"]
                self.last_line = state.get("last_line", b"")  # an older version did not keep it
                if not (type(step) is type(size) is int and 0 <= len(self.last_line) <= size
                        and all(type(value) in (int, float) for value in seen.values())):
                    raise TypeError
                load_parts(model, state["model"], strict=False)  # with LoRA, without the base's weights
                params = [weight for group in optimizer.param_groups for weight in group["params"]]
                for i, kept in state["optimizer"]["state"].items():
                    kept |= {name: part_of(x, params[i]) for name, x in kept.items() if x.dim()}
                optimizer.load_state_dict(state["optimizer"])
                if ema is not None:
                    load_parts(ema, state["ema"], strict=True)
                if any(x.dim() and x.shape != weight.shape for weight, kept in optimizer.state.items()
                       for x in kept.values()):
                    raise ValueError
            except (LookupError, RuntimeError, ValueError, TypeError, AttributeError):
                raise BadInput(f"{path}: of another run; put its own back, or choose another --out") from None
        if self.log:
            whole = os.fstat(self.log.fileno()).st_size >= size
            self.log.seek(size - len(self.last_line))
            if not whole or self.log.read(len(self.last_line)) != self.last_line:
                raise BadInput(f"{metrics}: not as at the last checkpoint; put its own back, or choose "
                               "another --out")
            self.log.truncate(size)
            self.log.seek(size)
        return step, seen


def read_metrics(path: Path, torn: bool = True) -> Iterator[dict]:
    """The lines of a metrics.jsonl. torn: the last one may be, as a kill leaves it, and is left out."""
    with open(regular(path), "rb") as file:
        for line in iter(partial(file.readline, 1 << 20), b""):
            if torn and not line.endswith(b"\n") and not file.read(1):
                return
            row = parse_json(line, path)
            look = row.get("look", {})
            numbers = [value for name, value in row.items() if name != "look"]
            if isinstance(look, dict):
                numbers += [look[name] for name in SCORES if look.get(name) is not None]
            if not (type(row.get("step")) is int and isinstance(look, dict) and line.endswith(b"\n")
                    and all(type(x) in (int, float) for x in numbers)):
                raise BadInput(f"{path}: damaged; choose another --out")
            yield row


def load_state(folder: Path, device: torch.device) -> dict | None:
    path = folder / "state.pt"
    if not path.exists():
        return None
    try:
        many = distributed.world > 1  # they share one copy in memory: the mapped file
        if many and zipfile.ZipFile(regular(path)).testzip():
            raise ValueError("wrong checksum")
        return torch.load(regular(path), "cpu" if many else device, weights_only=True, mmap=many)
    except Exception as error:  # torch.load raises half a dozen kinds on a damaged file
        what = str(error).partition("\n")[0] or type(error).__name__
        raise BadInput(f"{path}: damaged ({what}); put a whole one back, or choose another --out") from None


def load_parts(model: nn.Module, weights: dict[str, Tensor], strict: bool) -> None:
    """Load this rank's parts of whole weights."""
    own = model.state_dict()
    model.load_state_dict({name: part_of(x, own[name]) for name, x in weights.items()}, strict)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, and so what a checkpoint holds: everything, or with LoRA the adapters, [PRED] and the
    predictor."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
