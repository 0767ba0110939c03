"""The device: choosing it and its arithmetic, its name in results, and the error when its memory is full."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from fastafd.settings import RunError, UsageError

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
OUT_OF_MEMORY = re.compile(r"out of memory|ALLOC_FAILED|can't allocate memory")


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one. UsageError if the device does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise UsageError(f"device: got {name!r}, takes auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise UsageError(f"device: got {name!r}, and this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # events and kernel launches go to the current device
    return device


def device_of(net: nn.Module) -> torch.device:
    """The device of the network's weights, the CPU if it has none."""
    return next((tensor.device for tensor in (*net.parameters(), *net.buffers())), torch.device("cpu"))


def resolve_amp(amp: str, device: torch.device) -> str:
    """The arithmetic, "bf16", "fp16" or "fp32"; "auto" is bf16 on a GPU that computes it, else fp32."""
    if amp == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if amp not in AMP:
        raise UsageError(f"amp: got {amp!r}, takes auto, bf16, fp16 or fp32")
    return amp


def autocast(device: torch.device, amp: torch.dtype | None) -> AbstractContextManager[Any]:
    """The autocast context of the forward passes; None is without autocast."""
    return nullcontext() if amp is None else torch.autocast(device.type, dtype=amp)


@contextmanager
def algorithms_by_trial() -> Iterator[None]:
    """Let cuDNN time its algorithms for every new shape and keep the fastest.

    That pays, since batches have few shapes.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def true_fp32() -> Iterator[None]:
    """Compute in fp32: without autocast, and convolutions not in TF32, which PyTorch allows by default."""
    cudnn = torch.backends.cudnn
    as_is = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    no_autocast = torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)
    with cudnn.flags(**as_is, allow_tf32=False), no_autocast[0], no_autocast[1]:
        yield


@contextmanager
def enough_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Turn a failed allocation into a RunError that says what was asked for, what was free, and the advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        message = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and not OUT_OF_MEMORY.search(message):
            raise
        asked = re.search(r"tried to allocate ([\d.]+ \w+)", message, re.IGNORECASE)
        free = re.search(r"of which ([\d.]+ \w+) is free", message)
        figures = [f"asked for {asked[1]}" if asked else "", f"{free[1]} free" if free else ""]
        memory = "GPU memory" if re.search("CUDA|CUBLAS|CUDNN", message) else "memory"
        known = ", ".join(figure for figure in figures if figure)
        raise RunError(f"out of {memory}{f': {known}' if known else ''}. {advice()}") from error


def provenance(device: torch.device) -> dict[str, Any]:
    """The device, the versions and the UTC date of a result."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = {package: version(package) for package in ("fastafd", "torchvision", "pyautoattack", "numpy")}
    versions["torch"] = torch.__version__  # with its build, such as +cu130
    return {"device": name, "versions": versions, "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
