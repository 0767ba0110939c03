"""Seconds on either device, the device's name, and where results are: those measured here, and the committed ones."""

from __future__ import annotations

import json
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

from fastafd.files import save_text

WARM = 3  # calls before a clock starts
RESULTS = Path(__file__).parent / "results"  # committed: what the pages show
MEASURED = Path(__file__).parent / "measured"  # ignored by git: what a script writes without --out


def device_name(device: torch.device) -> str:
    """The name of the GPU or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else []
    return names[0] if names else platform.machine()


def result_file(kind: str, of: torch.device | str) -> Path:
    """The file of a benchmark's results without --out, such as measured/nvidia-h100-80gb-hbm3/epoch-time.json.

    of: the device, or the name of the folder.
    """
    if not isinstance(of, str):
        of = re.sub(r"[^a-z0-9]+", "-", device_name(of).lower()) if of.type == "cuda" else "cpu"
    return MEASURED / of / f"{kind}.json"


def save(result: dict[str, Any], out: Path) -> None:
    """Write results as JSON, and make the folder. RunError if that fails."""
    save_text(out, json.dumps(result, indent=1) + "\n")


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
    """The median seconds of a call: see `seconds_of_rounds`."""
    return statistics.median(seconds_of_rounds(function, inputs, rounds, device))


def seconds_of_rounds(
    function: Callable[..., Any], inputs: Sequence[Sequence[Any]], rounds: int, device: torch.device
) -> list[float]:
    """The seconds of a call in each round.

    A round calls the function on each of the inputs, on CUDA as one recorded graph.
    """

    def all_inputs() -> list[Any]:
        return [function(*operands) for operands in inputs]

    if device.type == "cpu":
        all_inputs()
        return [seconds_of(all_inputs, device) / len(inputs) for _ in range(rounds)]

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
    return [start.elapsed_time(end) / 1e3 / len(inputs) for start, end in pairwise(events)]
