"""CUDA graphs of a function: its kernels recorded once for each shape of its inputs, then launched as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastafd.capture import capture
from fastafd.console import Console

WARM_UPS = 3  # calls before a recording, in which libraries choose their algorithms and buffers come to be


class Graphs:
    """`run`, replayed from a recording wherever its inputs have a shape that was recorded.

    run: takes a tuple of tensors (or None) and returns a tuple of tensors, works on the device alone and in place, and
    leaves nothing on the host that a later call needs. The first calls of a shape simply run, on the stream that will
    record: no state has to be put back afterwards. What a call returns is overwritten by the next.
    Where recording fails, a line says why and `run` runs unrecorded from then on.
    """

    def __init__(self, run: Callable[..., tuple[Tensor, ...]], device: torch.device, console: Console):
        self.run, self.console = run, console
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.calls: dict[Any, int] = {}
        self.recorded: dict[Any, tuple[torch.cuda.CUDAGraph, tuple[Tensor | None, ...], tuple[Tensor, ...]]] = {}
        self.works = True
        self.replays = 0

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        key = tuple(None if v is None else (v.shape, v.dtype) for v in inputs)
        self.calls[key] = self.calls.get(key, 0) + 1
        if not self.works or self.calls[key] <= WARM_UPS:
            return self._aside(*inputs)
        if key not in self.recorded:
            try:
                self.recorded[key] = self._record(*inputs)
            except Exception as error:  # whatever a model does that cannot be recorded
                self.works = False
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                self.console.line(f"no CUDA graph, the compiled step is launched kernel by kernel: {reason}")
                return self._aside(*inputs)
        graph, held, outputs = self.recorded[key]
        for own, given in zip(held, inputs, strict=True):
            if own is not None and given is not None:
                own.copy_(given, non_blocking=True)
        graph.replay()
        self.replays += 1
        return outputs

    def clear(self) -> None:
        """Forget the recordings, whose tensors are no longer those in use, and that there were warm-ups."""
        self.recorded.clear()
        self.calls.clear()
        self.pool = torch.cuda.graph_pool_handle()  # the old one ends with its last graph, though tensors may be left

    def _aside(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Run on the recording stream, between what came before and what comes after."""
        here = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            outputs = self.run(*inputs)
        here.wait_stream(self.stream)
        return outputs

    def _record(self, *inputs: Tensor | None) -> Any:
        held = tuple(None if v is None else v.clone() for v in inputs)
        graph, outputs = capture(lambda: self.run(*held), self.stream, self.pool)
        return graph, held, outputs
