"""Seconds on either device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

WARM = 3  # calls before a clock starts


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """One call, launches and all."""
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


def median_seconds(
    function: Callable[..., Any], inputs: Sequence[Sequence[Any]], rounds: int, device: torch.device
) -> float:
    """Median of a call; a round is a call on each of the input sets, on CUDA recorded as one graph."""

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
    # All rounds are queued before the first is waited for, so that the device never waits for a launch.
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    wait(device)
    return statistics.median(start.elapsed_time(end) for start, end in pairwise(events)) / 1e3 / len(inputs)


def limits(device: torch.device, dtype: torch.dtype, rounds: int) -> tuple[float, float]:
    """FLOP/s of a large square product, bytes/s of a large copy."""
    side, numbers = (8192, 2**26) if device.type == "cuda" else (1024, 2**24)
    squares = [[torch.randn(side, side, device=device, dtype=dtype) for _ in range(2)] for _ in range(2)]
    product = median_seconds(torch.mm, squares, rounds, device)
    pairs = [[torch.rand(numbers, device=device) for _ in range(2)] for _ in range(2)]
    copy = median_seconds(lambda a, b: b.copy_(a), pairs, rounds, device)
    return 2 * side**3 / product, 2 * 4 * numbers / copy
