"""Weights in files of any program. Reading a file runs no code of it; the state dict that fits the classifier is taken.

`read_weights` finds every state dict in a file, however deep it lies. `fit_weights` tries each of them, below each
prefix of its names, and loads the one that has all tensors of the classifier and no others.

    {"epoch": 3, "ema": {...}, "state_dict": {"0.mean": ..., "0.std": ..., "1.module.conv1.weight": ...}}

Here the prefix is `1.` of `state_dict`, the normalisation is `0.`, and a line says that `ema` was left.
"""

from __future__ import annotations

import argparse
import json
import re
import types
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastafd.models import NORMALIZATIONS, Normalize
from fastafd.settings import UsageError

Tensors = dict[str, Tensor]
Report = Callable[[str], None]

SAVE_ANEW = "torch.save(model.state_dict(), FILE)"
DEPTH = 20  # of dicts and lists in each other
LEAST_STD = 0.01  # of pixels in [0,1]; a smaller one is a mistake
CLOSE = 0.005  # two normalisations whose numbers differ by less are the same
MOST_CLASSES = 100_000


@dataclass(frozen=True)
class StateDict:
    """A dict of tensors in a file. place: the keys that lead to it, such as ("checkpoint", "state_dict").

    constants: what is named as a mean or a standard deviation in it, plain numbers too.
    """

    place: tuple[str, ...]
    tensors: Tensors
    constants: Tensors


@dataclass(frozen=True)
class Weights:
    """What a file holds. field: the setting that named the file, with which errors begin.

    header: what `fastafd.checkpoint.save_model` wrote into it; empty in a file of another program.
    """

    path: Path
    field: str
    header: dict[str, Any]
    states: list[StateDict]

    def error(self, problem: str) -> UsageError:
        """The error that this file has that problem."""
        return UsageError(f"{self.field}: {self.path} {problem}")


# -- reading ------------------------------------------------------------------------------------------------------


def read_weights(path: Path, field: str = "weights") -> Weights:
    """The state dicts in a file: safetensors, or a pickle of PyTorch, from which no code is run.

    Raises UsageError for a missing, truncated or foreign file, and for a header that save_model cannot have written.
    """
    if not path.is_file():
        raise UsageError(f"{field}: got {path}, takes a file of weights, and there is none")
    if is_safetensors(first_bytes(path, field)):
        return read_safetensors(path, field)
    content = load_pickle(path, field, f"; save the weights anew: {SAVE_ANEW}")
    weights = Weights(path, field, {}, find_states(content))
    if not any(state.tensors for state in weights.states):
        meta = any(isinstance(x, Tensor) and x.is_meta for _, entries in containers(content) for x in entries.values())
        raise weights.error(
            "holds no state dict" + (", only tensors on the device meta, which have no numbers" if meta else "")
        )
    return weights


def first_bytes(path: Path, field: str) -> bytes:
    """The first bytes of a file, which say of what kind it is. UsageError if it cannot be opened."""
    try:
        with path.open("rb") as file:
            return file.read(512)
    except FileNotFoundError:
        raise UsageError(f"{field}: got {path}, and there is no such file") from None
    except OSError as error:
        raise UsageError(f"{field}: {path} cannot be opened: {error.strerror}") from None


def is_safetensors(head: bytes) -> bool:
    """True for the first bytes of a safetensors file: the length of a JSON header, which is below 100 MB, and it."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000


def read_safetensors(path: Path, field: str) -> Weights:
    """The one state dict of a safetensors file, and its header."""
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except Exception as error:  # what a damaged file raises depends on the damage
        raise UsageError(f"{field}: {path} is not a complete safetensors file: {error}") from None
    return Weights(path, field, parse_header(metadata.get("fastafd"), path, field), find_states(tensors))


def load_pickle(path: Path, field: str, remedy: str = "") -> Any:
    """The content of a file of `torch.save`, on the CPU. No code of the file is run.

    remedy: the end of the error message for a file that holds other objects. Raises UsageError for any file that cannot
    be read, and names the first object that is not allowed.
    """
    head = first_bytes(path, field)
    try:
        with torch.serialization.safe_globals(allowed()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other pickle protocols; the error below says what counts
            with path.open("rb") as file:  # by its path, torch.load refuses a .safetensors, whatever it holds
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on the damage
        raise UsageError(f"{field}: {path} cannot be read: {reason(str(error), path, head, remedy)}") from None


# What files are that no torch.save has written, by their first bytes.
FOREIGN = {
    b"version https://git-lfs": "it is a pointer of Git LFS, not the file itself; run git lfs pull",
    b"<": "it is a page of HTML or XML, not the file itself; download the file anew",
    b"\x1f\x8b": "it is compressed by gzip; unpack it first",
    b"BZh": "it is compressed by bzip2; unpack it first",
    b"\xfd7zXZ": "it is compressed by xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd; unpack it first",
    b"\x93NUMPY": "it is an array of numpy",
    b"\x89HDF": "it is an HDF5 file, as Keras writes",
}


def reason(error: str, path: Path, head: bytes, remedy: str) -> str:
    """Why torch.load has refused a file with these first bytes, in our words."""
    if not head:
        return "it is empty"
    for start, kind in FOREIGN.items():
        if head.lstrip().startswith(start):
            return kind
    names = zip_names(path)
    if names and all(name.endswith(".npy") for name in names):
        return f"it is an archive of numpy arrays{remedy}"
    if names and not any(name.endswith("data.pkl") for name in names):
        return "it is a zip archive of other files; unpack it first"
    named = re.search(r"GLOBAL (\S+)", error)
    if named:
        return f"it holds more than tensors, {named[1]}, which is not read{remedy}"
    if "TorchScript" in error:
        return f"it holds a TorchScript program{remedy}"
    if "operand 149" in error:  # the first instruction of a newer pickle
        return f"it was saved with a pickle_protocol above 2{remedy}"
    saved = head.startswith((b"PK", b"\x80", b"L119547037146038801333356L"))  # the last: torch.save, protocol 0 or 1
    if saved and "operand" in error:
        return f"it is damaged, or was saved with another pickle_protocol than 2{remedy}"
    if head.startswith(b"\x80") and "magic number" in error:
        return f"it is a plain pickle, not a file of torch.save{remedy}"
    return "it is truncated, or neither a PyTorch nor a safetensors file"


def zip_names(path: Path) -> list[str]:
    """The names in a zip archive; none for any other file, or a damaged one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception:  # what a damaged file raises depends on the damage
        return []


class Inert:
    """Stands for an object that no weights need. It takes any arguments and any state, and keeps none of them."""

    def __new__(cls, *_: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class NumberType(Inert):
    """Stands for a dtype of numpy. name: such as "<f4"."""

    name = ""

    def __init__(self, name: object = "", *_: object) -> None:
        self.name = str(name)

    def __setstate__(self, state: Any) -> None:
        self.name = f"{state[1]}{self.name}"  # the order of the bytes


class Array(Inert):
    """Stands for an array or a number of numpy. content: shape, type, whether in Fortran's order, bytes."""

    content: tuple[Any, ...] = ()

    def __init__(self, *values: object) -> None:
        if isinstance(values[0], NumberType):  # a number
            self.content = ((), values[0], False, values[1])

    def __setstate__(self, state: Any) -> None:
        self.content = tuple(state[1:])

    def tensor(self) -> Tensor | None:
        """The same numbers as a tensor; None for anything but numbers."""
        try:
            shape, kind, fortran, data = self.content
            if not re.fullmatch(r"[<>|=]?[biuf][1248]", kind.name):
                return None
            numbers = np.frombuffer(data, kind.name).reshape(shape, order="F" if fortran else "C")
            return torch.from_numpy(np.array(numbers, numbers.dtype.newbyteorder("="), order="C"))
        except (AttributeError, TypeError, ValueError):  # what torch has not, or a damaged file
            return None


# Objects that lie beside weights in ordinary files. None of them is built: each becomes an Inert, which keeps nothing.
UNNEEDED = (
    "numpy.ndarray",
    *(f"pathlib.{name}Path" for name in ("", "Pure", "Posix", "PurePosix", "Windows", "PureWindows")),
    *(f"pathlib._local.{name}Path" for name in ("", "Pure", "Posix", "PurePosix", "Windows", "PureWindows")),
    *(f"builtins.{name}" for name in ("bytes", "dict", "float", "int", "list", "range", "str", "tuple")),
    *(f"datetime.{name}" for name in ("date", "datetime", "timedelta", "timezone")),
    "torch.torch_version.TorchVersion",
)


def empty_dict(*_: object) -> dict[object, object]:
    """A plain dict instead of a defaultdict, whose default is never asked for."""
    return {}


def allowed() -> list[Any]:
    """What may occur in a file beside tensors and plain values: (what it becomes, its name) or the class itself."""
    stand_ins: list[Any] = [(Inert, name) for name in UNNEEDED]
    cores = ("numpy.core.multiarray", "numpy._core.multiarray")
    arrays = [(Array, f"{core}.{name}") for core in cores for name in ("_reconstruct", "scalar")]
    stand_ins += [(NumberType, "numpy.dtype"), (empty_dict, "collections.defaultdict")]
    return [*stand_ins, *arrays, argparse.Namespace, types.SimpleNamespace]


def find_states(content: Any) -> list[StateDict]:
    """Every dict with tensors, or with constants of a normalisation, the outer ones first."""
    states = []
    for place, entries in containers(content):
        named = {name: value for name, value in entries.items() if isinstance(name, str)}
        tensors = {name: tensor for name, value in named.items() if (tensor := tensor_of(value)) is not None}
        constants = {}
        for name in named:
            numbers = numbers_of(named[name]) if constant(name) else None
            if numbers is not None:
                constants[name] = numbers
        if tensors or constants:
            states.append(StateDict(place, tensors, constants))
    return states


def containers(content: Any) -> Iterable[tuple[tuple[str, ...], dict[Any, Any]]]:
    """The place and the entries of every nested dict, list and namespace, the outer ones first."""
    seen = set()
    found: list[tuple[tuple[str, ...], Any]] = [((), content)]
    for place, container in found:  # which grows
        if id(container) in seen or len(place) > DEPTH:
            continue
        seen.add(id(container))
        entries = dict(entries_of(container))
        yield place, entries
        found += [((*place, str(name)), value) for name, value in entries.items() if isinstance(value, CONTAINERS)]


CONTAINERS = (dict, list, tuple, argparse.Namespace, types.SimpleNamespace)


def entries_of(container: Any) -> Iterable[tuple[object, Any]]:
    """The names and values in a container; in a list, a number is the name."""
    if isinstance(container, (list, tuple)):
        return enumerate(container)
    if isinstance(container, dict):
        return container.items()
    return vars(container).items() if isinstance(container, CONTAINERS) else ()


NUMBERS = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


def plain(value: Any) -> bool:
    """True for a tensor of ordinary numbers: not sparse, nested, quantised, or without data."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in NUMBERS and not value.is_meta


def tensor_of(value: Any) -> Tensor | None:
    """A plain tensor, or an array of numpy as one; None for anything else, a single number of numpy too."""
    if isinstance(value, Array):
        value = value.tensor()
        return value if plain(value) and value.dim() else None
    return value if plain(value) else None


def numbers_of(value: Any, depth: int = 4) -> Tensor | None:
    """A tensor, an array, a number, or a short list of these, as a tensor; None for anything else."""
    if isinstance(value, Array):
        return value.tensor()
    if isinstance(value, (list, tuple)) and depth and 0 < len(value) <= 3:
        parts = [numbers_of(part, depth - 1) for part in value]
        alike = [part.float() for part in parts if part is not None and part.shape == getattr(parts[0], "shape", None)]
        return torch.stack(alike) if len(alike) == len(value) else None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(value if abs(value) < 1e30 else torch.inf, dtype=torch.float32)
    return value if plain(value) else None


# -- the header of a file of fastafd ------------------------------------------------------------------------------

HEADER: dict[str, tuple[type, ...]] = {
    "arch": (str,),
    "normalize": (str,),
    "num_classes": (int,),
    "classes": (list,),
    "dataset": (str,),
    "pretraining_seconds": (int, float),
}


def parse_header(text: str | None, path: Path, field: str) -> dict[str, Any]:
    """The header in a file, with entries of the right types; {} if there is none. UsageError for any other text."""
    try:
        header = json.loads(text or "{}")
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise UsageError(f"{field}: {path} has a header of fastafd that cannot be read")
    header = {name: value for name, value in header.items() if value is not None}
    for name in HEADER:
        value = header.get(name)
        if value is not None and (not isinstance(value, HEADER[name]) or isinstance(value, bool)):
            raise UsageError(f"{field}: {path} has a header whose {name} is {value!r:.60}")
    count, classes = header.get("num_classes"), header.get("classes")
    if count is not None and not 1 <= count <= MOST_CLASSES:
        raise UsageError(f"{field}: {path} has a header whose num_classes is {count}, takes 1 to {MOST_CLASSES}")
    if classes is not None and not all(isinstance(name, str) for name in classes):
        raise UsageError(f"{field}: {path} has a header whose classes are not names")
    if classes is not None and count not in (None, len(classes)):
        raise UsageError(f"{field}: {path} has a header with num_classes {count} and {len(classes)} classes")
    return header


def check_classifier(weights: Weights, arch: str, normalize: str) -> None:
    """Raise UsageError if the header names another architecture or normalisation. No header: nothing to check."""
    for name, wanted in (("arch", arch), ("normalize", normalize)):
        got = weights.header.get(name, wanted)
        if got != wanted:
            raise weights.error(f"holds a classifier of --{name} {got}, takes --{name} {wanted}")


def check_classes(weights: Weights, classes: Sequence[str]) -> None:
    """Raise UsageError if the header names other classes, or the same in another order."""
    difference = other_classes(weights.header, classes)
    if difference:
        raise weights.error(difference)


def other_classes(header: dict[str, Any], classes: Sequence[str]) -> str:
    """How the classes of a header differ from `classes`, in words; empty if they do not, or the header has none."""
    got, wanted = header.get("classes"), list(classes)
    count = len(got) if got is not None else header.get("num_classes", len(wanted))
    if count != len(wanted):
        return f"holds a classifier of {count} classes, takes {len(wanted)}"
    if got is None or got == wanted:
        return ""
    if len(wanted) <= 10:
        return f"holds the classes {', '.join(got)}, takes {', '.join(wanted)}"
    place = next(index for index in range(count) if got[index] != wanted[index])
    return f"holds other classes: its class {place} is {got[place]}, takes {wanted[place]}"


# -- fitting ------------------------------------------------------------------------------------------------------

WRAPPERS = ("module", "_orig_mod")  # DataParallel, AveragedModel and torch.compile put these into names
IGNORED = ("n_averaged",)  # the counter of AveragedModel
UNUSED = "sub_block1."  # WRNs of TRADES have a copy of block1 that no forward pass reads
COUNTER = "num_batches_tracked"  # old files have none

# Of different weights in one file, those that stand under the first of these names are taken; "" is the top level.
# Any other name comes after them, and averages come last.
ORDER = ("", "state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params", "last")
AVERAGE = re.compile(r"(^|_)(ema|swa|avg|average|averaged|shadow)(_|\d|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Match:
    """How the tensors of a state dict below a prefix agree with those of an architecture.

    names: their full names, by the architecture's name. missing and unlike (of another shape) are names of the
    architecture, unknown are full names.
    """

    state: StateDict
    prefix: str
    names: dict[str, str]
    missing: list[str]
    unknown: list[str]
    unlike: list[str]

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unknown or self.unlike)

    @property
    def place(self) -> tuple[str, ...]:
        """Where the tensors are: keys, then the parts of the prefix, without wrappers."""
        return (*self.state.place, *parts(self.prefix))

    @property
    def tensors(self) -> Tensors:
        """The tensors by the architecture's names."""
        return {key: self.state.tensors[name] for key, name in self.names.items()}


def fit_weights(net: nn.Module, weights: Weights, report: Report) -> None:
    """Load into `net`, a classifier of `build_model`, the state dict that fits it, and the file's normalisation.

    report: gets a line for everything that was left out, and for a normalisation that differs from the net's.
    Raises UsageError if none fits or several do equally, for a normalisation or another layer before the classifier
    that `net` has no layer for, and for numbers that cannot be.
    """
    layer = net[0] if isinstance(net, nn.Sequential) and isinstance(net[0], Normalize) else None
    core = net[1] if isinstance(net, nn.Sequential) and layer is not None else net
    own = core.state_dict()
    matches = [match for state in weights.states for match in matches_of(state, own)]
    fitting = [match for match in matches if match.fits]
    if not fitting:
        raise weights.error(misfit(closest(matches), core, own))
    taken = preferred(fitting, weights, report)

    tensors = {name: cast(value, own[name]) for name, value in taken.tensors.items()}
    check_numbers(tensors, weights)
    normalisation = normalisation_of(taken, [match for match in matches if match.names], weights)
    if normalisation is not None:
        check_numbers(normalisation._asdict(), weights)
        set_normalisation(layer, normalisation, weights, report)
    say_what_is_left(taken, fitting, weights, report)
    core.load_state_dict({name: tensors.get(name, value) for name, value in own.items()})


def parts(name: str) -> tuple[str, ...]:
    """The parts of a dotted name, without those of wrappers."""
    return tuple(part for part in name.split(".") if part and part not in WRAPPERS)


def matches_of(state: StateDict, own: Tensors) -> list[Match]:
    """The match below each prefix. A tensor belongs to the longest prefix that fits."""
    found: list[Match] = []
    for prefix in sorted(prefixes(state.tensors, own), key=len, reverse=True):
        inner = tuple(match.prefix for match in found if match.fits)
        below = [name for name in state.tensors if name.startswith(prefix) and not name.startswith(inner)]
        found.append(match_below(prefix, below, state, own))
    return found


def prefixes(names: Iterable[str], own: Tensors) -> set[str]:
    """What stands before an architecture's name in any of `names`, and the empty prefix."""
    found = {""}
    for name in names:
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        found |= {name[:start] for start in starts if ".".join(parts(name[start:])) in own}
    return found


def match_below(prefix: str, below: Iterable[str], state: StateDict, own: Tensors) -> Match:
    """The match of the tensors `below` a prefix, which are full names."""
    tensors = state.tensors
    normalising = {name for pair in pairs(state.constants).values() for name in pair}
    names: dict[str, str] = {}
    unknown = []
    for name in below:
        key = ".".join(parts(name.removeprefix(prefix)))
        if key in own and (key not in names or equal(tensors[name], tensors[names[key]])):
            names[key] = name
        elif key not in IGNORED and not key.startswith(UNUSED) and name not in normalising:
            unknown.append(name)
    missing = [key for key in own if key not in names and not key.endswith(COUNTER)]
    other_shape = [key for key in own if key in names and unlike(key, tensors[names[key]], own[key])]
    return Match(state, prefix, names, missing, unknown, other_shape)


def unlike(key: str, tensor: Tensor, own: Tensor) -> bool:
    """True for another shape, and for whole numbers where the architecture has fractions, as quantised weights are.

    A counter may be a fraction, as averages of it are.
    """
    other_kind = tensor.is_floating_point() != own.is_floating_point()
    return tensor.shape != own.shape or (other_kind and not key.endswith(COUNTER))


def cast(tensor: Tensor, own: Tensor) -> Tensor:
    """The tensor in the type of the architecture's; a counter beyond its type, which no forward pass reads, is 0."""
    if tensor.is_floating_point() and not own.is_floating_point():
        tensor = tensor.nan_to_num(0, 0, 0)
    return tensor.to(own.dtype)


def closest(matches: Sequence[Match]) -> Match:
    """The match with the most tensors of the architecture, and among those the one with the fewest others."""
    return max(matches, key=lambda match: (len(match.names), -len(match.unknown), -len(match.unlike)))


def misfit(match: Match, core: nn.Module, own: Tensors) -> str:
    """Why a match does not fit, in words."""
    inside = f" (in {shown(match)})" if match.place else ""
    if match.missing or match.unknown:
        kinds = (("missing", match.missing), ("unknown", match.unknown))
        problems = [f"{len(names)} {kind} tensors, such as {min(names)}" for kind, names in kinds if names]
        return f"does not fit the architecture{inside}: {' and '.join(problems)}"
    key = match.unlike[0]
    got, takes = match.tensors[key], own[key]
    head = [name for name, module in core.named_modules() if isinstance(module, nn.Linear)][-1]
    if match.unlike == [f"{head}.weight", f"{head}.bias"] and got.shape[1:] == takes.shape[1:]:
        return f"does not fit the data set{inside}: {len(got)} classes in the file, takes {len(takes)}"
    if got.shape == takes.shape:
        return f"does not fit the architecture{inside}: {key} has numbers of {got.dtype}, takes {takes.dtype}"
    return f"does not fit the architecture{inside}: {key} is {tuple(got.shape)}, takes {tuple(takes.shape)}"


def shown(match: Match) -> str:
    """Where the tensors are, for a message."""
    return ".".join(match.place) or "the top level"


def preferred(fitting: Sequence[Match], weights: Weights, report: Report) -> Match:
    """The match to take; a line says which were left. Raises UsageError if `ORDER` does not decide."""
    different: list[Match] = []  # the first by order of all that have the same tensors
    for match in sorted(fitting, key=lambda match: [rank(name) for name in match.place]):
        if not any(same(match, other) for other in different):
            different.append(match)
    taken, *others = different
    for other in others:
        if not comes_before(taken, other):
            raise weights.error(
                f"holds two classifiers, {shown(taken)} and {shown(other)}; save the one that is meant: {SAVE_ANEW}"
            )
    if others:
        left = ", ".join(map(shown, others))
        report(f"{weights.path}: took {shown(taken)}; {left} {'was' if len(others) == 1 else 'were'} left")
    return taken


def rank(name: str) -> int:
    """The place of a name in the order of preference."""
    return ORDER.index(name) if name in ORDER else len(ORDER) + bool(AVERAGE.search(name))


def comes_before(one: Match, other: Match) -> bool:
    """True if the first names in which two places differ decide for `one`."""
    for a, b in zip_longest(one.place, other.place, fillvalue=""):
        if a != b:
            return rank(a) < rank(b)
    return False


def same(one: Match, other: Match) -> bool:
    """True if two matches have equal numbers; what BatchNorm has counted does not matter."""
    theirs = other.tensors
    return all(equal(value, theirs[key]) for key, value in one.tensors.items() if not key.endswith(COUNTER))


def equal(a: Tensor, b: Tensor) -> bool:
    """True for equal numbers of the same type."""
    return a is b or (a.dtype == b.dtype and torch.equal(a, b))


def check_numbers(tensors: Tensors, weights: Weights) -> None:
    """Raise UsageError, with its name, for a tensor that holds NaN, infinity, or a variance below 0."""
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise weights.error(f"holds numbers that are not finite, in {name} as {str(value.dtype)[6:]}")
        if name.endswith("running_var") and (value < 0).any():
            raise weights.error(f"holds variances below 0, in {name}")


def say_what_is_left(taken: Match, fitting: Sequence[Match], weights: Weights, report: Report) -> None:
    """A line that names the tensors of the same state dict that nobody takes.

    Raises UsageError for those of a layer that changes the images: fractions before the classifier, or one for each
    channel of an image.
    """
    tensors = taken.state.tensors
    known = tuple(match.prefix for match in fitting if match.state is taken.state)
    normalising = {name for pair in pairs(taken.state.constants).values() for name in pair}
    left = [n for n in tensors if not n.startswith(known) and n not in normalising and parts(n)[-1:] != IGNORED]
    order = list(tensors)
    before = set(order[: min(map(order.index, taken.names.values()))])
    layer = [n for n in left if tensors[n].is_floating_point() and (n in before or tensors[n].numel() == 3)]
    if layer:
        raise weights.error(f"holds a layer that is not read, {listed(layer)}, beside {shown(taken)}; {TAKES_A_PAIR}")
    if left:
        report(f"{weights.path}: took {shown(taken)}; {listed(left)} left out")


def listed(names: Sequence[str]) -> str:
    """The first three of the names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


# -- normalisation ------------------------------------------------------------------------------------------------


class Normalisation(NamedTuple):
    """Per-channel mean and standard deviation (3,) of pixels in [0,1]."""

    mean: Tensor
    std: Tensor

    def differs(self, other: Normalisation) -> bool:
        """True if any number is more than CLOSE away."""
        return any((a - b).abs().max() > CLOSE for a, b in zip(self, other))

    def __str__(self) -> str:
        mean, std = (", ".join(f"{number:.4g}" for number in values.tolist()) for values in self)
        return f"mean {mean} and std {std}"


MEAN, STD = re.compile(r"(?!running_)(.*_)?(mean|mu)"), re.compile(r"(.*_)?(std|sigma)")
PLAIN_NAMES = ("mean", "mu", "std", "sigma")
TAKES_A_PAIR = f"takes a mean and a std of three numbers each, or weights alone: {SAVE_ANEW}"


def constant(name: str) -> bool:
    """True for the name of a mean or a standard deviation."""
    last = name.rpartition(".")[2]
    return bool(MEAN.fullmatch(last) or STD.fullmatch(last))


def by_kind(names: Iterable[str]) -> dict[str, tuple[list[str], list[str]]]:
    """The names of means and of standard deviations, by the prefix that they share."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for name in names:
        scope, _, last = name.rpartition(".")
        found.setdefault(scope, ([], []))[0 if MEAN.fullmatch(last) else 1].append(name)
    return found


def pairs(constants: Tensors) -> dict[str, tuple[str, str]]:
    """The names of a mean and a standard deviation of three numbers, by the prefix that they share."""
    found = by_kind(name for name, value in constants.items() if value.numel() == 3)
    return {scope: (mean[0], std[0]) for scope, (mean, std) in found.items() if len(mean) == len(std) == 1}


def unpaired(constants: Tensors) -> list[str]:
    """The names of constants that may normalise images and are no pair of three numbers each.

    A number counts only as `mean` beside `std`: `mu`, `sigma` and a number alone may be any setting.
    """
    paired = {name for pair in pairs(constants).values() for name in pair}
    named = [n for n in constants if n.rpartition(".")[2] in PLAIN_NAMES and n not in paired]
    found = by_kind(name for name in named if fits_images(constants[name]))
    return [
        n
        for mean, std in found.values()
        for n in (*mean, *std)
        if constants[n].numel() > 1 or (mean and std and n.rpartition(".")[2] in ("mean", "std"))
    ]


def fits_images(value: Tensor) -> bool:
    """True for one number, one for each of three channels, or an image of three channels."""
    shape = list(value.shape)
    while shape[:1] == [1]:
        del shape[0]
    return not shape or (shape[0] == 3 and len(shape) in (1, 3))


def normalisation_of(taken: Match, matches: Sequence[Match], weights: Weights) -> Normalisation | None:
    """The normalisation of the taken tensors, or None.

    It lies anywhere in the file. One that stands by another of `matches` counts only if there is no other. UsageError
    for two, and for constants that are no such pair.
    """
    found: dict[tuple[str, ...], Normalisation] = {}
    for state in weights.states:
        odd = [".".join((*state.place, name)) for name in unpaired(state.constants)]
        if odd:
            raise weights.error(f"holds constants that are not read, {listed(odd)}; {TAKES_A_PAIR}")
        for scope, (mean, std) in pairs(state.constants).items():
            values = (state.constants[name].detach().float().flatten() for name in (mean, std))
            found[(*state.place, *parts(scope))] = Normalisation(*values)
    others = [match for match in matches if match is not taken]
    own = {p: v for p, v in found.items() if stands_by(p, taken) or not any(stands_by(p, one) for one in others)}
    chosen = own or found
    for place, value in chosen.items():
        here, one = next(iter(chosen.items()))
        if value.differs(one):
            raise weights.error(f"holds two normalisations, {'.'.join(here)} and {'.'.join(place)}, of other values")
    return next(iter(chosen.values()), None)


def stands_by(place: tuple[str, ...], match: Match) -> bool:
    """True for the place of a normalisation beside a match or around it."""
    return place[:-1] == match.place[: len(place[:-1])]


def set_normalisation(layer: Normalize | None, values: Normalisation, weights: Weights, report: Report) -> None:
    """Put the file's normalisation into the net's layer. UsageError if there is none, or it is not for [0,1]."""
    if values.mean.min() < 0 or values.mean.max() > 1 or values.std.min() < LEAST_STD or values.std.max() > 1:
        raise weights.error(
            f"normalises with {values}, takes a mean in [0, 1] and a std in [{LEAST_STD}, 1], as images are in [0, 1];"
            f" divide constants for 0 to 255 by 255 and save the file anew"
        )
    if layer is None:
        if values.differs(Normalisation(torch.zeros(3), torch.ones(3))):  # which changes nothing
            raise weights.error(f"normalises with {values}; {advice(values)}")
        return
    if values.differs(Normalisation(layer.mean.flatten(), layer.std.flatten())):
        report(f"{weights.path}: its own normalisation is used, {values}, which is not that of --normalize")
    with torch.no_grad():
        layer.mean.copy_(values.mean.view(1, 3, 1, 1))
        layer.std.copy_(values.std.view(1, 3, 1, 1))


def advice(values: Normalisation) -> str:
    """Which --normalize a user must give."""
    for name, numbers in NORMALIZATIONS.items():
        if numbers is not None and not values.differs(Normalisation(*map(torch.tensor, numbers))):
            return f"give --normalize {name}"
    return "no --normalize has these values; give any, such as --normalize cifar10, and those of the file are used"
