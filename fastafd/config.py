"""Settings and their mistakes: how a field is declared, checked and explained, and what a run consists of.

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
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastafd.attacks import PGD
    from fastafd.methods import Method


class UsageError(Exception):
    """A user's mistake: one line that names the field, what it got and what it takes. Exit code 2."""


class RunError(Exception):
    """A run that cannot go on (NaN loss, no disk space): one line that says why. Exit code 1."""


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
            parsed = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            parsed = math.nan
        fits = low <= parsed <= high and math.isfinite(parsed) and not (whole and parsed != int(parsed))
        if not fits or isinstance(value, bool):
            raise UsageError(f"{field}: got {value!r}, takes {takes}")
        return int(parsed) if whole else parsed

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
    return Path(value).expanduser()


def text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{field}: got {value!r}, takes a word")
    return value


def switch(value: object, field: str) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise UsageError(f"{field}: got {value!r}, takes true or false")
    return str(value).lower() == "true"


def lr_steps(value: object, field: str) -> tuple[tuple[float, float], ...]:
    """A step schedule: pairs (fraction of the run, factor on lr), also written "0:1,0.5:0.8"."""
    takes = "pairs FRACTION:FACTOR from 0 on, rising, such as 0:1,0.75:0.1,0.9:0.01"
    try:
        pairs = [pair.split(":") for pair in value.split(",")] if isinstance(value, str) else list(value)  # type: ignore[call-overload]
        steps = tuple((float(at), float(factor)) for at, factor in pairs)
    except (TypeError, ValueError):
        raise UsageError(f"{field}: got {value!r}, takes {takes}") from None
    starts = [at for at, _ in steps]
    if not steps or starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= 1 or min(f for _, f in steps) < 0:
        raise UsageError(f"{field}: got {value!r}, takes {takes}")
    return steps


def check(config: Any) -> None:
    """Run every field of a dataclass of settings through its parser; called from `__post_init__`."""
    for field in dataclasses.fields(config):
        parse = field.metadata.get("parse")
        if parse is not None:
            object.__setattr__(config, field.name, parse(getattr(config, field.name), field.name))


def override(config: Any, changes: dict[str, Any]) -> Any:
    """A copy of `config` with fields replaced by name, those of flat parts included. UsageError for an unknown name."""
    direct, left = {}, dict(changes)
    names: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        names.append(field.name)
        if field.name in left:
            direct[field.name] = left.pop(field.name)
        elif field.metadata.get("flat"):
            inner = {f.name for f in dataclasses.fields(value)}
            names += sorted(inner)
            mine = {name: left.pop(name) for name in list(left) if name in inner}
            direct[field.name] = override(value, mine)
    if left:
        raise unknown("setting", next(iter(left)), names)
    return dataclasses.replace(config, **direct)


# -- what a run consists of ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Which classifier, on which images, on which machine."""

    arch: str = setting(
        "resnet18", "classifier: resnet18, resnet50, preactresnet18, wrn34_10 (any wrnN_K), resnet8", text
    )
    dataset: str = setting("cifar10", "cifar10, cifar100, tiny-imagenet, imagefolder or digits", text)
    data_dir: Path = setting(Path("data"), "folder that holds the data set, or an image tree of its classes", path)
    image_size: int | None = setting(
        None, "side in pixels that an image folder is resized to", optional(number(8, 1024, whole=True))
    )
    normalize: str = setting("none", "normalisation layer inside the model: none, cifar10, cifar100 or imagenet", text)
    loader: str = setting("ffcv", "what feeds the batches", choice("ffcv", "resident", "torch"))
    device: str = setting("auto", "cpu, cuda, cuda:N, or auto: a GPU if there is one", text)
    amp: str = setting(
        "auto", "arithmetic of the forward passes; auto: bf16 on a GPU, else fp32", choice("auto", "bf16", "fp32")
    )
    seed: int = setting(
        0, "seed of the order, the augmentation, the attack's starts and fresh weights", number(0, whole=True)
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum over a number of epochs; the learning rate falls in steps."""

    epochs: int = setting(20, "passes over the training images", number(0, whole=True))
    batch_size: int = setting(128, "images a step", number(1, whole=True))
    lr: float = setting(0.025, "initial learning rate", number(0))
    lr_schedule: tuple[tuple[float, float], ...] = setting(
        ((0.0, 1.0),), "from a fraction of the run on, lr times a factor: 0:1,0.5:0.8", lr_steps
    )
    momentum: float = setting(0.9, "momentum", number(0, 1))
    weight_decay: float = setting(
        5e-4, "weight decay on every parameter but D2, BatchNorm and biases included", number(0)
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole fine-tuning run; `fastafd.recipes` returns complete ones."""

    recipe: str = setting(
        "released", "where all other settings start: released, paper, released_cifar100 or digits", text
    )
    task: Task = part(flat=True)
    method: Method = part(flat=True)
    attack: PGD = part()
    sgd: SGD = part(flat=True)
    pretrain: SGD = part()
    attack_bn: str = setting(
        "eval", "BatchNorm during the attack: running or batch statistics", choice("eval", "train")
    )
    d2_weight_decay: float = setting(5e-4, "weight decay on D2", number(0))
    ema_decay: float = setting(0.999, "decay of the weight average, reached as (1+t)/(10+t)", number(0, 1))
    pretrained: str | None = setting(
        None, "natural weights to start from: a file, or 'example'; else they are pre-trained", optional(text)
    )
    out: Path | None = setting(None, "run folder; default runs/DATE-TIME-DATASET-ARCH-RECIPE", optional(path))
    log_every: int = setting(50, "steps between two lines of metrics.jsonl", number(1, whole=True))
    save_every: int = setting(
        0, "steps between two saves of last.pt within an epoch; 0: epochs alone", number(0, whole=True)
    )
    eval_n: int | None = setting(
        None, "test images for clean and PGD-20 accuracy; default all", optional(number(1, whole=True))
    )
    autoattack_n: int = setting(1000, "test images for AutoAttack; 0 leaves it out", number(0, whole=True))

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class PretrainConfig:
    """A natural pre-training run; the defaults are the paper's appendix."""

    task: Task = part(flat=True, default=Task())
    sgd: SGD = part(flat=True, default=SGD(100, 128, 0.1, ((0.0, 1.0), (0.75, 0.1), (0.9, 0.01)), 0.9, 5e-4))
    out: Path | None = setting(
        None, "run folder; default a folder in the cache that the configuration names", optional(path)
    )
    log_every: int = setting(50, "steps between two lines of metrics.jsonl", number(1, whole=True))

    def __post_init__(self) -> None:
        check(self)
