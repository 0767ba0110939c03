"""CUDA graphs of a function: its kernels are recorded once for each shape of its inputs, then launched as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastafd.capture import capture
from fastafd.console import Console

WARM_UPS = 3  # calls before a recording: libraries choose their algorithms, and buffers are allocated


class Graphs:
    """The function `run`, replayed from a recording if its inputs have a shape that was recorded.

    run: takes tensors (or None), returns a tuple of tensors, works on the device alone and in place, and leaves nothing
    on the host that a later call needs. The first calls of a shape run unrecorded, on the stream that will record, so
    no state has to be restored after a warm-up. The next call overwrites the tensors that a call returned.
    If a recording fails, one line says why, and from then on `run` runs unrecorded.
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
            return self._run_unrecorded(*inputs)
        if key not in self.recorded:
            try:
                self.recorded[key] = self._record(*inputs)
            except Exception as error:  # a model may do anything that cannot be recorded
                self.refuse(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
                return self._run_unrecorded(*inputs)
        graph, recorded_inputs, outputs = self.recorded[key]
        for recorded, new in zip(recorded_inputs, inputs, strict=True):
            if recorded is not None and new is not None:
                recorded.copy_(new, non_blocking=True)
        graph.replay()
        self.replays += 1
        return outputs

    def refuse(self, reason: str) -> None:
        """Run unrecorded from now on; a line says why."""
        if self.works:
            self.works = False
            self.console.line(f"no CUDA graph, the compiled step is launched kernel by kernel: {reason}")

    def clear(self) -> None:
        """Forget all recordings and warm-ups, because the step now uses other tensors."""
        self.recorded.clear()
        self.calls.clear()
        self.pool = torch.cuda.graph_pool_handle()  # a pool dies with its last graph, so start a new one

    def _run_unrecorded(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Run on the recording stream, after all earlier work of the current stream and before all later work."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = self.run(*inputs)
        current.wait_stream(self.stream)
        return outputs

    def _record(self, *inputs: Tensor | None) -> Any:
        """The graph of a call, its input tensors (later calls copy theirs into them), and its output tensors."""
        recorded_inputs = tuple(None if v is None else v.clone() for v in inputs)
        graph, outputs = capture(lambda: self.run(*recorded_inputs), self.stream, self.pool)
        return graph, recorded_inputs, outputs
