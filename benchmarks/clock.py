"""Seconds on either device, the device's name, and the file that results go to."""

from __future__ import annotations

import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

WARM = 3  # calls before a clock starts
RESULTS = Path(__file__).parent / "results"


def device_name(device: torch.device) -> str:
    """The name of the GPU or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else []
    return names[0] if names else platform.machine()


def result_file(kind: str, device: torch.device) -> Path:
    """Where the results of a benchmark on that device go, such as results/epoch-time-nvidia-h100-80gb-hbm3.json."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()) if device.type == "cuda" else "cpu"
    return RESULTS / f"{kind}-{name}.json"


def wait(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """The seconds of one call, launches included."""
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


def median_seconds(
    function: Callable[..., Any], inputs: Sequence[Sequence[Any]], rounds: int, device: torch.device
) -> float:
    """The median seconds of a call. A round calls the function on each of the inputs, on CUDA as one recorded graph."""

    def all_inputs() -> list[Any]:
        return [function(*operands) for operands in inputs]

    if device.type == "cpu":
        all_inputs()
        return statistics.median(seconds_of(all_inputs, device) for _ in range(rounds)) / len(inputs)

    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            all_inputs()
    wait(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        all_inputs()
    for _ in range(WARM):
        graph.replay()
    # Queue all rounds before waiting, so that the device never waits for a launch.
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    wait(device)
    return statistics.median(start.elapsed_time(end) for start, end in pairwise(events)) / 1e3 / len(inputs)


def limits(device: torch.device, dtype: torch.dtype, rounds: int) -> tuple[float, float]:
    """The FLOP/s of a large matrix product and the bytes/s of a large copy."""
    side, numbers = (8192, 2**26) if device.type == "cuda" else (1024, 2**24)
    squares = [[torch.randn(side, side, device=device, dtype=dtype) for _ in range(2)] for _ in range(2)]
    product = median_seconds(torch.mm, squares, rounds, device)
    pairs = [[torch.rand(numbers, device=device) for _ in range(2)] for _ in range(2)]
    copy = median_seconds(lambda a, b: b.copy_(a), pairs, rounds, device)
    return 2 * side**3 / product, 2 * 4 * numbers / copy
