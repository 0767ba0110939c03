"""What a device can do: the rate of the fastest product or convolution of many, and that of a copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.clock import seconds_of_rounds

SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}  # of the square products
# Convolutions of the networks' stages: kernel, channels in and out, pixels of a side. A 1x1 one is a product that the
# convolutions' library does: on an AMD CPU it is faster than MKL.
CONVOLUTIONS = ((3, 64, 32), (3, 128, 16), (3, 256, 8), (3, 512, 4), (3, 160, 32), (3, 640, 8), (1, 512, 16))
GFLOP = {"cpu": 2.0, "cuda": 100.0}  # of a call of a convolution, about: the number of images follows


class Limits(NamedTuple):
    """The highest FLOP/s, what reached it, and the bytes/s of a large copy."""

    flops: float
    by: str
    bandwidth: float


class Candidate(NamedTuple):
    """A product or convolution: its name, its FLOPs, the call, and two sets of inputs."""

    name: str
    flops: int
    call: Callable[..., Tensor]
    inputs: list[list[Tensor]]


def limits(device: torch.device, dtype: torch.dtype, rounds: int) -> Limits:
    """Measure the limits of a device; the fastest round counts, since a limit is what nothing exceeds."""
    flops, by = 0.0, ""
    for candidate in candidates(device, dtype):
        rate = candidate.flops / min(seconds_of_rounds(candidate.call, candidate.inputs, rounds, device))
        if rate > flops:
            flops, by = rate, candidate.name
    numbers = 2**26 if device.type == "cuda" else 2**24
    pairs = [[torch.rand(numbers, device=device) for _ in range(2)] for _ in range(2)]
    copy = min(seconds_of_rounds(lambda a, b: b.copy_(a), pairs, rounds, device))
    return Limits(flops, by, 2 * 4 * numbers / copy)


def candidates(device: torch.device, dtype: torch.dtype) -> Iterator[Candidate]:
    """Products and convolutions that may be the fastest, one at a time, because the large ones fill memory."""

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype)

    for side in SIDES[device.type]:
        squares = [[normal(side, side) for _ in range(2)] for _ in range(2)]
        yield Candidate(f"a product of {side}", 2 * side**3, torch.mm, squares)
        biased = [[*square, normal(side)] for square in squares]
        yield Candidate(f"a linear layer of {side}", 2 * side**3, F.linear, biased)
    for kernel, channels, side in CONVOLUTIONS:
        of_image = 2 * side**2 * channels**2 * kernel**2
        images = math.ceil(GFLOP[device.type] * 1e9 / of_image)
        weight = channels, channels, kernel, kernel
        sets = [[normal(images, channels, side, side), normal(*weight)] for _ in range(2)]
        for layout, laid_out in layouts(device).items():
            name = f"a {kernel}x{kernel} convolution, {channels} channels of {side}x{side}, {layout}"
            inputs = [[laid_out(tensor) for tensor in one] for one in sets]
            yield Candidate(name, images * of_image, convolution(kernel), inputs)


def convolution(kernel: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: F.conv2d(x, w, padding=kernel // 2)


def layouts(device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """The layouts of images by name, and how a tensor gets them; on a CPU also oneDNN's own."""
    of: dict[str, Callable[[Tensor], Tensor]] = {
        "NCHW": Tensor.contiguous,
        "channels_last": lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
    }
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        of["oneDNN's layout"] = Tensor.to_mkldnn
    return of


def share(part: float) -> str:
    """A share of a limit in per cent; empty above 100 %, because what was exceeded is no limit."""
    return f"{part:.0%}" if part <= 1 else ""
