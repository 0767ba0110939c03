"""Settings and their mistakes: how a field is declared, parsed and explained, and where caches live.

Every setting is a field of a frozen dataclass, declared with `setting`: a sentence (with its unit) that the command
line shows as help, and the function that parses what a user may write. `fastafd.cli` turns such a dataclass into a
command line; below the verbs' modules functions take plain values, never a config.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any


class UsageError(Exception):
    """A user's mistake: one line that names the field, what it got and what it takes. Exit code 2."""


class RunError(Exception):
    """A run that cannot go on (NaN loss, no disk space): one line that says why. Exit code 1."""


class Stopped(BaseException):
    """A signal asked the run to stop; what it had is saved. Exit code 75, so that a scheduler may requeue it.

    Like KeyboardInterrupt no Exception, since nothing that recovers from errors should catch it.
    """


def unknown(field: str, got: object, valid: Iterable[str]) -> UsageError:
    """The error for a name that is not among `valid`, with the nearest valid one."""
    names = list(valid)
    near = difflib.get_close_matches(str(got), names, n=1, cutoff=0.4)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return UsageError(f"{field}: got {got!r}, takes one of {', '.join(names)}{hint}")


def cache_dir() -> Path:
    """For .beton files and pre-trained weights: FASTAFD_CACHE, else XDG_CACHE_HOME/fastafd, else ~/.cache/fastafd."""
    named = os.environ.get("FASTAFD_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastafd"


# -- how a field is declared --------------------------------------------------------------------------------------

Parser = Callable[[object, str], Any]  # (what the user wrote, field name) -> value; raises UsageError


def setting(default: Any, help: str, parse: Parser | None = None) -> Any:
    """A config field: its default, the sentence (with its unit) that explains it, and its own parser if it has one."""
    return dataclasses.field(default=default, metadata={"help": help, "parse": parse})


def part(default: Any = dataclasses.MISSING, flat: bool = False) -> Any:
    """A config field that is itself a dataclass of settings; `flat` ones lend their fields' names to the whole."""
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata={"flat": flat})
    return dataclasses.field(default=default, metadata={"flat": flat})


def pixels(value: object, field: str) -> float:
    """A distance in pixels of [0,1]: a float, or a fraction such as "8/255". UsageError for anything outside [0,1]."""
    takes = "a length in pixels of [0,1] such as 8/255 or 0.03"
    try:
        number = float(Fraction(value)) if isinstance(value, str) else float(value)  # type: ignore[arg-type]
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        raise UsageError(f"{field}: got {value!r}, takes {takes}") from None
    if not math.isfinite(number) or not 0 <= number <= 1:
        meant = f" (did you mean {value}/255?)" if 1 < number <= 255 else ""
        raise UsageError(f"{field}: got {value!r}, takes {takes}{meant}")
    return number


def number(low: float, high: float = math.inf, whole: bool = False) -> Parser:
    """A parser of numbers in [low, high], whole ones only if `whole`."""
    kind = "a whole number" if whole else "a number"
    takes = f"{kind} >= {low:g}" if high == math.inf else f"{kind} from {low:g} to {high:g}"

    def parse(value: object, field: str) -> float | int:
        try:
            exact = whole and not isinstance(value, float)
            parsed = int(value) if exact else float(value)  # type: ignore[call-overload, arg-type]
            fits = low <= parsed <= high and math.isfinite(parsed) and not (whole and parsed != int(parsed))
        except (TypeError, ValueError, OverflowError):
            fits = False
        if not fits or isinstance(value, bool):
            raise UsageError(f"{field}: got {value!r}, takes {takes}")
        return int(parsed) if whole else float(parsed)

    return parse


def choice(*names: str) -> Parser:
    """A parser of one of `names`."""

    def parse(value: object, field: str) -> str:
        if value not in names:
            raise unknown(field, value, names)
        return str(value)

    return parse


def optional(inner: Parser) -> Parser:
    """`inner`, or nothing (None, in a file `null`)."""

    def parse(value: object, field: str) -> Any:
        return None if value in (None, "", "none", "null") else inner(value, field)

    return parse


def path(value: object, field: str) -> Path:
    if not isinstance(value, (str, Path)):
        raise UsageError(f"{field}: got {value!r}, takes a path")
    return Path(value).expanduser().absolute()  # a run folder's config must hold from anywhere


def weights_file(value: object, field: str) -> str:
    """A path, made absolute, or the word "example"."""
    return "example" if value == "example" else str(path(value, field))


def text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{field}: got {value!r}, takes a word")
    return value


def switch(value: object, field: str) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise UsageError(f"{field}: got {value!r}, takes true or false")
    return str(value).lower() == "true"


def lr_steps(value: object, field: str) -> tuple[tuple[float, float], ...]:
    """A schedule: pairs (fraction of the run, factor on lr), also written "0:1,0.5:0.8"."""
    takes = "pairs FRACTION:FACTOR from 0 on, rising, such as 0:1,0.75:0.1,0.9:0.01"
    try:
        pairs = [pair.split(":") for pair in value.split(",")] if isinstance(value, str) else list(value)  # type: ignore[call-overload]
        steps = tuple((float(at), float(factor)) for at, factor in pairs)
    except (TypeError, ValueError):
        raise UsageError(f"{field}: got {value!r}, takes {takes}") from None
    starts = [at for at, _ in steps]
    if not steps or starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] > 1 or min(f for _, f in steps) < 0:
        raise UsageError(f"{field}: got {value!r}, takes {takes}")
    return steps


def check(config: Any) -> None:
    """Run every field of a dataclass of settings through its parser; called from `__post_init__`."""
    for field in dataclasses.fields(config):
        parse = field.metadata.get("parse")
        if parse is not None:
            object.__setattr__(config, field.name, parse(getattr(config, field.name), field.name))
