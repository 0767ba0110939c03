"""A launch of a step: the tensors it reads and writes, its FLOPs and its least time.

And the totals of many launches.
"""

from __future__ import annotations

import math
import re
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

KINDS = ("convolution", "dgrad", "wgrad", "Triton", "product", "own", "other")
CONVOLUTIONS = KINDS[:3]
PEAK, BANDWIDTH = 798e12, 3.0e12  # FLOP/s of a bf16 product of 8192, bytes/s of a large copy, on an H100
L2_BANDWIDTH = 5.5e12  # bytes/s, assumed


class Operand(NamedTuple):
    """A tensor that a launch reads or writes. memory: a number that identifies its storage."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    memory: int

    @property
    def bytes(self) -> int:
        """The bytes of its values; an expanded dimension counts once."""
        return math.prod(d for d, step in zip(self.shape, self.stride) if step) * self.dtype.itemsize

    @property
    def layout(self) -> tuple[tuple[int, int], ...]:
        """The size and the stride of every dimension with more than one element."""
        return tuple((d, step) for d, step in zip(self.shape, self.stride) if d > 1)

    @property
    def channels_last(self) -> bool:
        """True if it is channels_last, or if that means nothing.

        Not four dimensions, one channel or pixel, uint8 images.
        """
        if len(self.shape) != 4 or self.dtype == torch.uint8 or 1 in (self.shape[1], self.shape[2] * self.shape[3]):
            return True
        return self.stride[1] == 1


@dataclass
class Launch:
    """A library call, or a kernel of Inductor or of fastafd.

    Count: the kernels that an operation of fastafd launches.
    """

    part: str
    kind: str
    name: str
    reads: list[Operand]
    writes: list[Operand]
    flops: int = 0
    count: int = 1

    @property
    def bytes(self) -> int:
        return sum(operand.bytes for operand in (*self.reads, *self.writes))

    @property
    def seconds(self) -> float:
        """The least seconds: the longer of arithmetic and memory traffic."""
        return max(self.flops / PEAK, self.bytes / BANDWIDTH)

    def moves(self, sources: dict[str, str]) -> str:
        """What a launch does if it computes nothing: "cast", "permuted", both, or "copied"; empty if it computes.

        sources: of Inductor's kernels.
        """
        if self.kind == "Triton":
            lines = re.findall(r"tmp\d+ = (.*)", sources[self.name])
            if not all(re.fullmatch(r"tl\.load\(.*|tmp\d+(\.to\(.*\))?", line) for line in lines):
                return ""
        elif not re.match(r"aten\.(_to_copy|copy_|clone|contiguous|_foreach_copy_)", self.name):
            return ""
        if not self.reads:
            return ""
        cast = {o.dtype for o in self.reads} != {o.dtype for o in self.writes}
        permuted = {o.layout for o in self.reads} != {o.layout for o in self.writes}
        return " and ".join(["cast"] * cast + ["permuted"] * permuted) or "copied"


def check(launches: Sequence[Launch], amp: torch.dtype | None) -> None:
    """Raise RuntimeError if an assumption of the stand-in does not hold: convolutions in `amp` and channels_last."""
    of = [launch for launch in launches if launch.kind in CONVOLUTIONS]
    if not of:
        raise RuntimeError("no convolution was recorded: nothing is to be said of this step")
    for launch in of:
        types = {operand.dtype for operand in launch.reads}
        if amp is not None and types != {amp}:
            raise RuntimeError(
                f"{launch.part}: a {launch.kind} reads {types}, not {amp}: autocast is off on this fake GPU"
            )
        if not all(operand.channels_last for operand in launch.writes):
            shape, stride = launch.writes[0][:2]
            raise RuntimeError(
                f"{launch.part}: a {launch.kind} writes {shape} with strides {stride}, not channels_last:"
                " Inductor does not take cuDNN for what runs it"
            )


def with_cache(
    launches: Sequence[Launch], capacity: float, floor: float = 0.0, gap: float = 0.0
) -> tuple[float, float]:
    """The seconds, and the bytes to and from memory, with a write-back cache of whole tensors, least recently used out
    first.

    capacity: bytes; 0 is none. floor: seconds that a launch takes at the least; gap: seconds between two.
    """
    held: OrderedDict[int, tuple[int, bool]] = (
        OrderedDict()
    )  # by memory: its bytes, and True if they are not written back yet
    seconds = total = 0.0
    for launch in launches:
        moved = launch.bytes
        if capacity:
            moved = sum(map(partial(touch, held, capacity, False), launch.reads))
            moved += sum(map(partial(touch, held, capacity, True), launch.writes))
        least = max(launch.flops / PEAK, moved / BANDWIDTH, launch.bytes / L2_BANDWIDTH if capacity else 0.0)
        seconds += max(least, floor * launch.count) + gap * launch.count
        total += moved
    return seconds, total


def touch(held: OrderedDict[int, tuple[int, bool]], capacity: float, writes: bool, of: Operand) -> int:
    """The bytes to or from memory when a tensor is read or written through the cache `held`."""
    size, dirty = held.pop(of.memory, (0, False))
    moved = 0 if writes else max(0, of.bytes - size)
    if of.bytes > capacity:
        return moved + (of.bytes if writes else 0)
    held[of.memory] = (max(size, of.bytes), dirty or writes)
    while sum(size for size, _ in held.values()) > capacity:
        _, (size, dirty) = held.popitem(last=False)
        moved += size if dirty else 0
    return moved


def by_kind(launches: Sequence[Launch]) -> Counter[str]:
    """The number of launches of each kind."""
    counts: Counter[str] = Counter()
    for launch in launches:
        counts[launch.kind] += launch.count
    return counts
