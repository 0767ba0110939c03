"""Branches that only CUDA takes.

Stand-ins for streams, events, graphs and pinned memory record the order of the calls.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from fastafd.console import Console
from fastafd.data import Augment
from fastafd.data.loaders import FfcvLoader, TorchLoader
from fastafd.device import provenance, resolve_amp, resolve_device, true_fp32
from fastafd.evaluation import autoattack
from fastafd.training import engine
from fastafd.training.graphs import WARM_UPS, Graphs
from fastafd.training.timing import PhaseTimer

CUDA = torch.device("cuda", 0)


class Cuda:
    """A stand-in for torch.cuda: `calls` lists all calls; `capturing` is True while a graph is recorded."""

    def __init__(self, monkeypatch):
        self.calls, self.capturing, self.pools, self.current = [], False, 0, SimpleNamespace(name="current")
        cuda = self

        class Stream:
            def __init__(self, device=None):
                self.name, self.device, self.device_index = "recording", device, 0

            def wait_stream(self, other):
                cuda.calls.append(f"{self.name} waits for {other.name}")

        class CUDAGraph:
            def __init__(self):
                self.body = None

            def replay(self):
                cuda.calls.append("replay")
                self.body()

        @contextmanager
        def stream(of):
            before, cuda.current = cuda.current, of
            yield
            cuda.current = before

        @contextmanager
        def graph(graph, pool=None, stream=None, capture_error_mode="global"):
            cuda.calls.append(f"record in pool {pool} on {getattr(stream, 'name', None)}, {capture_error_mode}")
            before, cuda.current, cuda.capturing = cuda.current, stream, True
            try:
                yield
                cuda.current = before  # if the body raises, torch does not restore the stream
            finally:
                cuda.capturing = False

        def handle():
            self.pools += 1
            return self.pools

        def set_stream(of):
            self.current = of
            self.calls.append(f"{of.name} is current")

        self.current.wait_stream = lambda other: self.calls.append(f"current waits for {other.name}")
        self.current.device_index = 0
        for name, value in {
            "Stream": Stream,
            "CUDAGraph": CUDAGraph,
            "stream": stream,
            "graph": graph,
            "graph_pool_handle": handle,
            "current_stream": lambda device=None: self.current,
            "set_stream": set_stream,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        ended = lambda device, pool: self.calls.append(f"pool {pool} ends")  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended, raising=False)


def doubling(cuda, graphs_of):
    """A function that doubles its input into a tensor that it keeps, as a recorded function does."""
    held = {}

    def run(x, nothing):
        assert nothing is None
        cuda.calls.append(f"run on {cuda.current.name}{', captured' if cuda.capturing else ''}")
        out = held.setdefault(x.shape, torch.zeros_like(x))
        if not cuda.capturing:
            out.copy_(2 * x)
            return (out.clone(),)
        for_replay = x

        def body():
            out.copy_(2 * for_replay)

        graphs_of().last_body = body
        return (out,)

    return run


def test_a_recording_is_made_after_the_warm_ups_and_replayed_with_new_inputs(monkeypatch):
    cuda, box = Cuda(monkeypatch), {}
    graphs = box["graphs"] = Graphs(doubling(cuda, lambda: box["graphs"]), CUDA, Console())
    record = graphs._record

    def recording(*inputs):
        graph, held, outputs = record(*inputs)
        graph.body = graphs.last_body
        return graph, held, outputs

    monkeypatch.setattr(graphs, "_record", recording)
    for index in range(WARM_UPS):
        cuda.calls.clear()
        (out,) = graphs(torch.full((2,), float(index)), None)
        assert out.tolist() == 2 * [2.0 * index]
        # The recording stream starts after earlier work, and later work starts after the recording stream.
        assert cuda.calls == ["recording waits for current", "run on recording", "current waits for recording"]
    assert graphs.replays == 0 and not graphs.recorded
    cuda.calls.clear()
    for value in (7.0, 8.0):
        (out,) = graphs(torch.full((2,), value), None)
        assert out.tolist() == 2 * [2 * value]
    assert cuda.calls == ["record in pool 1 on recording, thread_local", "run on recording, captured"] + 2 * ["replay"]
    assert graphs.replays == 2 and cuda.current.name == "current"
    (out,) = graphs(torch.full((3,), 1.0), None)  # another shape has its own warm-ups
    assert out.tolist() == 3 * [2.0] and len(graphs.recorded) == 1
    graphs.clear()
    assert not graphs.recorded and not graphs.calls and graphs.pool == 2


def test_a_broken_recording_leaves_stream_pool_and_generator_as_they_were(monkeypatch, capsys):
    cuda = Cuda(monkeypatch)

    def run(x):
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return (x + 1,)

    graphs = Graphs(run, CUDA, Console())
    for _ in range(WARM_UPS):
        graphs(torch.zeros(1))
    cuda.calls.clear()
    (out,) = graphs(torch.zeros(1))
    assert out.tolist() == [1.0] and not graphs.works and cuda.current.name == "current"
    first, *rest = cuda.calls
    assert first.startswith("record") and rest[:2] == ["current is current", "pool 1 ends"]
    assert rest[2].startswith("record in pool None") and rest[3] == "current is current"  # a short recording that works
    assert rest[4:] == ["recording waits for current", "current waits for recording"]
    assert capsys.readouterr().err.count("kernel by kernel: operation not permitted when stream is capturing") == 1
    cuda.calls.clear()
    graphs(torch.zeros(1))
    assert not any(call.startswith("record in") for call in cuda.calls) and graphs.replays == 0


def test_phases_are_timed_between_events_that_only_collecting_waits_for(monkeypatch):
    calls, clock = [], iter(range(0, 1000, 7))

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing

        def record(self):
            self.at = next(clock)
            calls.append("record")

        def synchronize(self):
            calls.append("synchronize")

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = PhaseTimer(CUDA)
    with timer("off"):
        pass
    timer.on = True
    for phase in ("attack", "update", "attack"):
        with timer(phase):
            pass
    assert calls == 6 * ["record"]
    assert timer.collect() == pytest.approx({"attack": 0.014, "update": 0.007})  # events are in milliseconds
    assert calls[6:] == ["synchronize"] and timer.collect() == {}


class Lent(torch.Tensor):
    """A tensor that records where it is copied to."""

    moves: ClassVar[list] = []

    def pin_memory(self):
        Lent.moves.append("pinned")
        return self

    def to(self, device, non_blocking=False):
        Lent.moves.append((str(device), non_blocking))
        return self


def test_draws_reach_a_gpu_through_pinned_memory(monkeypatch):
    """A copy from pageable memory would make the host wait for the device."""
    augment = Augment(4, True, 0)
    draw = augment.draw
    monkeypatch.setattr(augment, "draw", lambda batch: tuple(v.as_subclass(Lent) for v in draw(batch)))
    Lent.moves = []
    augment.draw_on(CUDA, 3)
    assert Lent.moves == ["pinned", "pinned", ("cuda:0", True), ("cuda:0", True)]
    Lent.moves = []
    augment.draw_on(torch.device("cpu"), 3)
    assert "pinned" not in Lent.moves


def test_ffcv_batches_reach_a_gpu_through_pinned_memory_of_torchs_own(monkeypatch):
    """FFCV overwrites its buffer, so an asynchronous copy directly from it would read the next batch."""
    made = []

    def empty_like(tensor, pin_memory=False):
        made.append(pin_memory)
        return torch.zeros(tensor.shape, dtype=tensor.dtype).as_subclass(Lent)

    monkeypatch.setattr(torch, "empty_like", empty_like)
    Lent.moves = []
    lent = torch.arange(4, dtype=torch.uint8)
    got = FfcvLoader.copied(SimpleNamespace(device=CUDA), lent)
    lent.zero_()
    assert got.tolist() == [0, 1, 2, 3] and made == [True] and Lent.moves == [("cuda:0", True)]


def test_torchs_loader_pins_for_a_gpu_alone(monkeypatch, digit_tree):
    pinned = []

    class DataLoader(list):
        def __init__(self, *_, pin_memory, **__):
            pinned.append(pin_memory)

    monkeypatch.setattr(torch.utils.data, "DataLoader", DataLoader)
    for device in ("cuda", "cpu"):
        loader = SimpleNamespace(dataset=None, batch_size=2, device=torch.device(device))
        assert list(TorchLoader.deliver(loader, np.arange(4))) == []
    assert pinned == [True, False]


@pytest.mark.parametrize(
    "supported, device, amp, expected",
    [
        (True, "cuda", "auto", "bf16"),
        (False, "cuda", "auto", "fp32"),  # a card that would emulate bf16
        (True, "cpu", "auto", "fp32"),
        (False, "cuda", "fp16", "fp16"),
    ],
)
def test_arithmetic_and_engine_of_a_gpu(supported, device, amp, expected, monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation) or supported
    )
    assert resolve_amp(amp, torch.device(device)) == expected
    assert not any(asked)
    assert engine.resolve_engine("auto", torch.device(device)) == ("fast" if device == "cuda" else "reference")


def test_a_named_gpu_becomes_the_current_one(monkeypatch):
    """Kernel launches and events go to the current device."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda") and not chosen
    assert resolve_device("cuda:1") == torch.device("cuda:1") and chosen == [torch.device("cuda:1")]


def test_what_is_compiled_is_kept_by_gpu_and_named_in_results(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTAFD_CACHE", str(tmp_path))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    folder = engine.keep_compiled(CUDA)
    assert folder.parent == tmp_path / "compiled" and folder.name.endswith("NVIDIA-H100-80GB-HBM3")
    assert provenance(CUDA)["device"] == "NVIDIA H100 80GB HBM3"


def test_convolutions_of_an_evaluation_are_not_tf32():
    before = torch.backends.cudnn.allow_tf32
    with true_fp32():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


def test_autoattack_leaves_the_generator_of_its_gpu_alone(monkeypatch):
    class Stops(Exception):
        pass

    def fork_rng(devices):
        raise Stops(devices)

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    monkeypatch.setattr(autoattack, "check_classes", lambda model, x: 10)
    monkeypatch.setattr(autoattack, "check_network", lambda model, name: None)
    for device, forked in ((CUDA, [CUDA]), (torch.device("cpu"), [])):
        weights = [SimpleNamespace(device=device)]
        model = SimpleNamespace(parameters=lambda weights=weights: weights, buffers=list)
        with pytest.raises(Stops) as stopped:
            autoattack.run_autoattack(model, torch.rand(2, 3, 4, 4), torch.zeros(2).long(), 0.1, 2, 0, print)
        assert stopped.value.args == (forked,)
