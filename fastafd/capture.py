"""Recording a call as a CUDA graph, timing recordings, and cleaning up after a recording that failed."""

from __future__ import annotations

import gc
import statistics
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

_abandoned: list[torch.cuda.CUDAGraph] = []  # kept alive, because the allocator may still use them


def capture(call: Callable[[], Any], stream: torch.cuda.Stream, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Record a call on `stream` as a CUDA graph; returns the graph and the result of the call.

    pool: the memory pool to use; None makes a new one. If the call raises, its error is raised again, and the current
    stream, the allocator and the default generator are as before.
    """
    gc.collect()  # destroying another graph during the recording could break it
    before, graph = torch.cuda.current_stream(stream.device), torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    try:
        # Record this thread only, because a loader's thread may allocate memory at the same time.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            outputs = call()
    except Exception as error:
        _abandoned.append(graph)
        torch.cuda.set_stream(before)
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        with suppress(Exception), torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros((), device=stream.device)
        torch.cuda.set_stream(before)
        raise (
            error.__context__ or error
        ) from None  # the original error: ending a broken recording raises a second one
    return graph, outputs


def interleaved_seconds(
    calls: dict[str, Callable[[], Any]], device: torch.device, rounds: int = 20, warm: int = 3
) -> dict[str, float]:
    """The median seconds of each call on a GPU. The calls are recorded as graphs and replayed in turn in each round."""
    stream = torch.cuda.Stream(device)
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    torch.cuda.synchronize(device)
    for name, call in calls.items():
        with torch.cuda.stream(stream):
            for _ in range(warm):
                call()
        torch.cuda.synchronize(device)
        graphs[name], _ = capture(call, stream)
    for graph in [*graphs.values()] * warm:
        graph.replay()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = defaultdict(list)
    for _ in range(rounds):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize(device)
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) / 1000 for name, pairs in events.items()}
