"""How a setting is declared, parsed and explained; the exceptions that end a run; and the folder of caches.

Every setting is a field of a frozen dataclass, declared with `setting`: a sentence with its unit, which the command
line shows as help, and the function that parses what a user wrote. `fastafd.cli` turns such a dataclass into a command
line. The verbs, `fastafd.training.build` and `fastafd.training.natural` read such configs; functions below them take
plain values.
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
    """A user's mistake, told in one line: the name of the field, what it got and what it takes. Exit code 2."""


class RunError(Exception):
    """A run cannot continue (NaN loss, no disk space); one line says why. Exit code 1."""


class Stopped(BaseException):
    """A signal asked the run to stop, and the run has saved its state. Exit code 75: a scheduler may requeue the run.

    It is not an Exception, as KeyboardInterrupt is not, so that code that recovers from errors does not catch it.
    """


def unknown(field: str, got: object, valid: Iterable[str]) -> UsageError:
    """The error for a name that is not in `valid`; it names the most similar valid one."""
    names = list(valid)
    near = difflib.get_close_matches(str(got), names, n=1, cutoff=0.4)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return UsageError(f"{field}: got {got!r}, takes one of {', '.join(names)}{hint}")


def cache_dir() -> Path:
    """The folder of .beton files, pre-trained weights and compiled code.

    It is FASTAFD_CACHE, else XDG_CACHE_HOME/fastafd, else ~/.cache/fastafd.
    """
    folder = os.environ.get("FASTAFD_CACHE")
    if folder:
        return user_path(folder, "FASTAFD_CACHE")
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME") / "fastafd"


# The accuracies of an evaluation, in order: their names in settings and results, and in tables.
ATTACK_NAMES = {"clean": "clean", "pgd20": "PGD-20", "autoattack": "AutoAttack"}


# -- how a field is declared --------------------------------------------------------------------------------------

Parser = Callable[[object, str], Any]  # (what the user wrote, field name) -> value; raises UsageError


def setting(default: Any, help: str, parse: Parser | None = None) -> Any:
    """A field of a config: its default, the sentence with its unit that explains it, and its parser, if it has one."""
    return dataclasses.field(default=default, metadata={"help": help, "parse": parse})


def part(default: Any = dataclasses.MISSING, flat: bool = False) -> Any:
    """A field of a config that is itself a dataclass of settings.

    flat: True if its settings are named without a prefix (`lr`), False with one (`attack.steps`).
    """
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata={"flat": flat})
    return dataclasses.field(default=default, metadata={"flat": flat})


def pixels(value: object, field: str) -> float:
    """Parse a distance in pixels of [0,1].

    A float, or a fraction such as "8/255". UsageError if it is outside [0,1].
    """
    takes = "a length in pixels of [0,1] such as 8/255 or 0.03"
    try:
        number = fraction(value) if isinstance(value, str) else float(value)  # type: ignore[arg-type]
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        raise UsageError(f"{field}: got {value!r}, takes {takes}") from None
    if isinstance(value, bool) or not math.isfinite(number) or not 0 <= number <= 1:
        meant = f" (did you mean {value}/255?)" if 1 < number <= 255 else ""
        raise UsageError(f"{field}: got {value!r}, takes {takes}{meant}")
    return number


def fraction(value: str) -> float:
    """The number that "0.03", "8/255" or "0.5/255" stands for. Raises ValueError for other text."""
    above, *below = value.split("/")
    if len(below) > 1:
        raise ValueError(value)
    return float(Fraction(above.strip()) / Fraction(below[0].strip())) if below else float(value)


def in_255ths(length: float) -> str:
    """A length in pixels of [0,1] as users write it: "8/255", "0.5/255"."""
    return f"{255 * length:.6g}/255"


def number(low: float, high: float = math.inf, whole: bool = False) -> Parser:
    """A parser of numbers in [low, high]; with `whole`, of integers."""
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
    """A parser that takes one of `names`."""

    def parse(value: object, field: str) -> str:
        if value not in names:
            raise unknown(field, value, names)
        return str(value)

    return parse


def optional(inner: Parser) -> Parser:
    """A parser that takes what `inner` takes, or nothing: None, in a file `null`."""

    def parse(value: object, field: str) -> Any:
        return None if value in (None, "", "none", "null") else inner(value, field)

    return parse


def user_path(value: object, field: str) -> Path:
    """The path that a user wrote, with `~` and `~name` as home folders. UsageError for what no path can be."""
    if not isinstance(value, (str, Path)) or "\0" in str(value):
        raise UsageError(f"{field}: got {value!r}, takes a path")
    try:
        os.fsencode(value)
        return Path(value).expanduser()
    except UnicodeEncodeError:
        raise UsageError(f"{field}: got {str(value)!r}, takes a path") from None
    except RuntimeError:
        raise UsageError(f"{field}: got {value}, and this machine has no such home folder") from None


def path(value: object, field: str) -> Path:
    """Parse a path and make it absolute, because a run folder's config must be valid from any working directory."""
    return user_path(value, field).absolute()


def weights_file(value: object, field: str) -> str:
    """Parse the path of a file of weights, made absolute, or the word "example"."""
    return "example" if value == "example" else str(path(value, field))


def text(value: object, field: str) -> str:
    """Parse any string."""
    if not isinstance(value, str):
        raise UsageError(f"{field}: got {value!r}, takes a word")
    return value


def switch(value: object, field: str) -> bool:
    """Parse true or false."""
    if str(value).lower() not in ("true", "false"):
        raise UsageError(f"{field}: got {value!r}, takes true or false")
    return str(value).lower() == "true"


def lr_steps(value: object, field: str) -> tuple[tuple[float, float], ...]:
    """Parse a learning rate schedule: pairs (fraction of the run, factor on lr), or text such as "0:1,0.5:0.8"."""
    takes = "pairs FRACTION:FACTOR from 0 on, rising, such as 0:1,0.75:0.1,0.9:0.01"
    try:
        pairs = [pair.split(":") for pair in value.split(",")] if isinstance(value, str) else list(value)  # type: ignore[call-overload]
        if any(isinstance(pair, str) for pair in pairs):
            raise ValueError(value)
        steps = tuple((float(at), float(factor)) for at, factor in pairs)
    except (TypeError, ValueError):
        raise UsageError(f"{field}: got {value!r}, takes {takes}") from None
    starts = [at for at, _ in steps]
    if not all(math.isfinite(number) for pair in steps for number in pair):
        raise UsageError(f"{field}: got {value!r}, takes {takes}")
    if not steps or starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] > 1 or min(f for _, f in steps) < 0:
        raise UsageError(f"{field}: got {value!r}, takes {takes}")
    return steps


def check(config: Any) -> None:
    """Parse every field of a dataclass of settings in place; `__post_init__` calls this."""
    for field in dataclasses.fields(config):
        parse = field.metadata.get("parse")
        if parse is not None:
            object.__setattr__(config, field.name, parse(getattr(config, field.name), field.name))
