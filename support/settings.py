"""A dataclass of settings: from it come the flags, their checks, a run's name, and what makes two runs alike.

    @dataclass
    class Config:
        lam: float = opt(1.0, "weight of the JEPA loss", group="objective", low=0)
        k: int = opt(1, "predictor tokens; 0: none", group="objective", low=0, needs="lam")

    c = parse_options(Config)       # --lam 2 --k 3; "--k has no effect with --lam 0"

A setting is declared once, here and nowhere else. A new one with a default changes nothing about older runs:
`fill` completes what they have stored.
"""
import argparse
import math
import re
from dataclasses import MISSING, Field, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from support.files import BadInput


def opt(default, help: str, group: str = "", needs: str = "", low=None, above=None, below=None,
        identity: str = "value"):
    """A field of a dataclass of settings.

    group       heading in --help, and what a program asks for with `in_group`
    needs       conditions under which it has an effect, all of them: "lam" (is set), "!init_from" (is not),
                "distance=infonce", "dataset!=*.jsonl" (patterns of fnmatch); "a|b": one of the two
    low, above, below   bounds of a number: value >= low, value > above, value < below
    identity    what tells two runs apart: its "value"; the "content" of the files that it names; "nothing"
                for places and for what changes no result: it may differ when a run is resumed
    """
    return field(default=default, metadata={"help": help, "group": group, "needs": needs, "low": low,
                                            "above": above, "below": below, "identity": identity})


def in_group(cls: type, group: str) -> list[str]:
    return [f.name for f in fields(cls) if f.metadata["group"] == group]


def with_identity(cls: type, identity: str) -> list[str]:
    return [f.name for f in fields(cls) if f.metadata["identity"] == identity]


def broken_bounds(f: Field, value) -> str:
    """The bounds of a setting where its value breaks one or is not finite; empty if all is well."""
    if type(value) is int and abs(value) >= 2**63:
        return "below 2**63"
    low, above, below = (f.metadata[name] for name in ("low", "above", "below"))
    bounds = [words for bound, words in ((low, f"{low} or more"), (above, f"above {above}"),
                                         (below, f"below {below}")) if bound is not None]
    kept = not bounds or (math.isfinite(value) and (low is None or value >= low)
                          and (above is None or value > above) and (below is None or value < below))
    return "" if kept else " and ".join(bounds)


def is_value(f: Field, hint, value) -> bool:
    """May a setting of this type have this value, which a file of others has stored?"""
    kinds = get_args(hint) or (hint,)
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in kinds
    if type(value) is float and not math.isfinite(value):
        return False
    return (type(value) in kinds or hint is float and type(value) is int) and not broken_bounds(f, value)


def fill(cls: type, stored: dict, former: dict[str, Any], where: str | Path = "settings") -> dict:
    """The settings of a run of any version: those that it lacks have their defaults, those that are no more
    (`former`: name -> default) are left out where they have theirs and kept where they do not, and so are
    unknown ones. BadInput, which begins with `where`, if one has a value that it cannot have."""
    kept = {name: value for name, value in stored.items() if name not in former or value != former[name]}
    filled, hints = {f.name: f.default for f in fields(cls)} | kept, get_type_hints(cls)
    for f in fields(cls):
        if f.name in kept and not is_value(f, hints[f.name], filled[f.name]):
            raise BadInput(f"{where}: {f.name} is {filled[f.name]!r:.60}, which this setting cannot be")
        if hints[f.name] is float:
            filled[f.name] = float(filled[f.name])  # one of Python may be 1 for 1.0
    return filled


# ---- from the command line ---------------------------------------------------------------------------------

def parse(cls: type, argv: list[str] | None = None, description: str = "", positional: tuple[str, ...] = (),
          tuned: tuple[str, dict] = ("", {})):
    """An instance of cls from the command line, not yet checked, and the names that were given.

    positional  names of fields that are given without a flag: a list[str] takes one or more
    tuned       (name, other defaults): they hold where the setting of this name is given
    """
    def refuse(message: str):
        raise BadInput(f"{message}; see --help")

    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS)
    parser.error = refuse
    hints, groups = get_type_hints(cls), {"": parser}
    for f in fields(cls):
        hint, extra, meta = hints[f.name], {}, f.metadata
        if get_origin(hint) is Literal:
            extra["choices"] = get_args(hint)
        elif hint == list[str]:
            extra["nargs"] = "*" if "(default" in meta["help"] else "+"
        elif hint in (bool, bool | None):
            extra["action"] = argparse.BooleanOptionalAction
        else:
            extra["type"] = next((kind for kind in get_args(hint) if kind is not type(None)), hint)
        if f.name in positional:
            parser.add_argument(f.name, metavar=f.name.upper(), help=meta["help"], **extra)
            continue
        other = f"; with --{tuned[0]} {tuned[1][f.name]}" if f.name in tuned[1] else ""
        silent = f.default in (None, "", MISSING) or "(default" in meta["help"]
        shown = "" if silent else f" (default: {f.default}{other})"
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        groups[meta["group"]].add_argument(f"--{f.name}", help=meta["help"] + shown, **extra)
    given = vars(parser.parse_args(argv))
    return cls(**(tuned[1] if given.get(tuned[0]) else {}) | given), set(given)


def parse_options(*arguments, **options):
    """`parse`, checked: BadInput names everything that is wrong, in one line."""
    config, given = parse(*arguments, **options)
    raise_problems(problems(config, given))
    return config


def raise_problems(found: list[str]) -> None:
    if found:
        raise BadInput("; ".join(found))


def holds(condition: str, config) -> bool:
    """Does one condition of `needs` hold? One on a setting that this program does not have does."""
    name, operator, pattern = re.fullmatch(r"!?(\w+)(!?=)?(.*)", condition).groups()
    value = getattr(config, name, None)
    if not hasattr(config, name):
        return True
    if operator:
        return fnmatchcase(str(value), pattern) == (operator == "=")
    return bool(value) != condition.startswith("!")


def idle(f: Field, config) -> str:
    """Why a setting has no effect; empty if it has one."""
    for condition in f.metadata["needs"].split():
        if not any(holds(either, config) for either in condition.split("|")):
            name = re.search(r"\w+", condition)[0]
            value, default = getattr(config, name), getattr(type(config), name, None)
            if value in ("", None, False) and not default:
                return f"without --{name}"
            shown = "" if value is True else f" {value:g}" if type(value) is float else f" {value}"
            return f"with --{name}{shown}"
    return ""


def problems(config, given: set[str] | None = None, tuned: dict = {}) -> list[str]:  # noqa: B006
    """Values out of range, and settings without effect among those that are given (None: that are neither at
    their defaults, or tuned ones, nor switched off)."""
    found = []
    for f in fields(config):
        value = getattr(config, f.name)
        changed = value not in (f.default, tuned.get(f.name, f.default))
        is_given = f.name in given if given is not None else changed and (value or f.default is True)
        if not is_given and value == f.default:
            continue
        hint = get_type_hints(type(config))[f.name]
        if get_origin(hint) is Literal and value not in get_args(hint):
            found.append(f"--{f.name} {value}: must be one of {', '.join(map(str, get_args(hint)))}")
        if broken := broken_bounds(f, value):
            found.append(f"--{f.name} {value}: must be {broken}")
        if is_given and idle(f, config):
            found.append(f"--{f.name} has no effect {idle(f, config)}")
    return found


def run_name(config, tuned: dict) -> str:
    """The dataset, the base model, and every other setting that tells runs apart, is not at its default (or
    tuned one) and has an effect."""
    parts = []
    for f in sorted(fields(config), key=lambda f: f.metadata["identity"] != "content"):
        value, identity = getattr(config, f.name), f.metadata["identity"]
        if identity == "content" and (value != f.default or not parts):
            parts += [f.name.rpartition("_")[2]] * bool(parts)
            parts.append(Path(str(value)).name.removesuffix(".jsonl"))  # a stranger may have a number there
        elif identity == "value" and value != tuned.get(f.name, f.default) and not idle(f, config):
            parts.append(f.name + (f"{value:g}" if isinstance(value, float) else str(value)))
    return "-".join(parts)


def differences(cls: type, theirs: dict, ours: dict) -> list[str]:
    """The settings of two runs that tell them apart, as `--name theirs (now ours)`."""
    alike = {f.name for f in fields(cls) if f.metadata["identity"] != "value"}
    return [f"--{name} {theirs.get(name)} (now {ours.get(name)})" for name in {**ours, **theirs}
            if name not in alike and theirs.get(name) != ours.get(name)]
