"""Seconds of each phase of a step, measured without making the host wait for the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """`with timer("attack"):` adds the block's seconds to that phase.

    On CUDA a phase is the time between two events, and only `collect` waits for them. The timer is off until somebody
    sets `on` and then calls `collect` now and then; otherwise the events of a long loop would pile up.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.on = False
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if not self.on:
            yield
        elif self.cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((phase, begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - began

    def collect(self) -> dict[str, float]:
        """The seconds of each phase since the last call."""
        if self._events:
            self._events[-1][2].synchronize()
        for phase, begin, end in self._events:
            self._seconds[phase] += begin.elapsed_time(end) / 1000  # elapsed_time is in ms
        seconds = dict(self._seconds)
        self._events.clear()
        self._seconds.clear()
        return seconds
