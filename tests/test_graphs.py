"""Steps launched through CUDA graphs: on a CPU with a stand-in for the recording, and on a GPU."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from tiny import Tiny, afd_step, assert_close, batches, needs_gpu, tiny

from fastafd.methods import Natural
from fastafd.training.graphs import WARM_UPS, Graphs
from fastafd.training.optim import fuse, make_sgd, needs_host, restore
from fastafd.training.step import TrainStep


class OnTheCPU(Graphs):
    """`Graphs` without CUDA: a recording computes nothing, and a replay writes into the same output tensors."""

    def __init__(self, step):
        self.run, self.console, self.calls, self.recorded, self.works = step._recorded, step.console, {}, {}, True
        self.step, self.replays = step, 0

    def clear(self):
        self.recorded.clear()
        self.calls.clear()

    def _run_unrecorded(self, *inputs):
        return self.run(*inputs)

    def _record(self, *inputs):
        held = tuple(None if v is None else v.clone() for v in inputs)
        model, ema, rates = self.step.model, self.step.ema, [group["lr"] for group in self.step.optimizer.param_groups]
        live = [*model.parameters(), *model.buffers(), *ema.module.parameters(), *ema.module.buffers()]
        live += [v["momentum_buffer"] for v in self.step.optimizer.state.values()]
        before = [tensor.detach().clone() for tensor in live]
        outputs = tuple(v.detach() for v in self.run(*held))
        parameters = list(model.parameters())
        with torch.no_grad():
            for tensor, old in zip(live, before):
                tensor.copy_(old)

        def replay():
            assert all(group["lr"] is rate for group, rate in zip(self.step.optimizer.param_groups, rates))
            grads = [p.grad for p in parameters]
            for output, new in zip(outputs, self.run(*held)):
                output.copy_(new.detach())
            for p, grad in zip(parameters, grads):  # a replay assigns no attribute, it writes into tensors
                p.grad = grad

        return type("Recorded", (), {"replay": staticmethod(replay)}), held, outputs


class Scaled(Tiny):
    """Reads a number that a user may set."""

    factor = 1.0

    def forward(self, x):
        return super().forward(x * self.factor)


class Counting(Tiny):
    """Counts its calls, as a forward does that runs in Python; a replay runs none."""

    calls, counts = 0, True

    def forward(self, x):
        self.calls += type(self).counts
        return super().forward(x)


class Replacing(Tiny):
    """Replaces its buffer in each forward in train mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        if self.training:
            self.shift = 0.5 * self.shift + 0.5 * x.detach().mean()
        return super().forward(x - self.shift)


class WithoutPython(OnTheCPU):
    def _record(self, *inputs):
        recorded, held, outputs = super()._record(*inputs)

        def replay():
            Counting.counts = False
            recorded.replay()
            Counting.counts = True

        return type("Recorded", (), {"replay": staticmethod(replay)}), held, outputs


@pytest.mark.parametrize("kind", [Scaled, Counting, Replacing])
def test_what_a_recording_would_not_see(kind, capsys):
    """A number set between steps is recorded anew, a forward that replaces tensors is not recorded."""
    with torch.compiler.set_stance("force_eager"):
        plain, replayed = (afd_step(tiny(kind), "fast") for _ in range(2))
        replayed._replay(WithoutPython(replayed))
        for index, (x, y) in enumerate(batches(WARM_UPS + 6)):
            if kind is Scaled and index == WARM_UPS + 2:
                plain.model.backbone.factor = replayed.model.backbone.factor = 2.0
            plain(x, y)
            replayed(x, y)
    assert_close(replayed, plain, 1e-6)  # a recorded step keeps the learning rate in fp32
    err = capsys.readouterr().err
    assert ("the step is recorded anew: backbone.factor of the model has changed" in err) == (kind is Scaled)
    assert ("no CUDA graph, the compiled step is launched kernel by kernel: the forward replaces" in err) == (
        kind is Replacing
    )
    assert replayed.graphs.replays == {Scaled: 3, Counting: 6, Replacing: 0}[kind]


def test_launches_by_graphs_are_the_step():
    """A replay uses new inputs, learning rates and average weights; the next replay does not overwrite metrics."""
    plain, replayed = (afd_step(tiny(), "fast") for _ in range(2))
    replayed._replay(OnTheCPU(replayed))
    kept = {plain: [], replayed: []}
    for step in (plain, replayed):
        for index, batch in enumerate(batches(WARM_UPS + 4)):
            for group in step.optimizer.param_groups:
                group["lr"] = 0.02 if index < WARM_UPS + 2 else 0.01
            kept[step].append(step(*batch, probe=index == WARM_UPS + 2))
    assert replayed.graphs.replays == 4
    assert_close(replayed, plain, 1e-5)
    for ours, theirs in zip(kept[replayed], kept[plain], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name].float(), rtol=1e-4, atol=1e-6)
    state = copy.deepcopy(replayed.state_dict())
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.01)
    replayed.load_state_dict(state)
    plain.load_state_dict(copy.deepcopy(state))
    for step in (plain, replayed):
        for batch in batches(WARM_UPS + 1):
            step(*batch)
    assert (
        replayed.graphs.replays == 4 + WARM_UPS + 1 and len(replayed.graphs.recorded) == 1
    )  # the recording from before
    assert_close(replayed, plain, 1e-5)
    for step in (plain, replayed):  # the user loads the optimizer's state, so its tensors are others now
        step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
        for batch in batches(WARM_UPS + 1):
            step(*batch)
    assert replayed.graphs.replays == 4 + WARM_UPS + 2
    assert_close(replayed, plain, 1e-5)
    state["optimizer"]["param_groups"][0]["weight_decay"] = 0.5  # the recording has the old value
    for step in (plain, replayed):
        step.load_state_dict(copy.deepcopy(state))
        for batch in batches(WARM_UPS + 1):
            step(*batch)
    assert replayed.graphs.replays == 4 + WARM_UPS + 3
    assert_close(replayed, plain, 1e-5)


def test_a_resumed_run_records_once():
    """The state is loaded before the first step, so the warm-ups and the recording use its tensors."""
    first, second = (afd_step(tiny(), "fast") for _ in range(2))
    first(*batches(1)[0])
    second._replay(OnTheCPU(second))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in (first, second):
        for batch in batches(WARM_UPS + 2):
            step(*batch)
    assert second.graphs.replays == 2 and sum(second.graphs.calls.values()) == WARM_UPS + 2
    assert_close(second, first, 1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p),
        lambda p: torch.optim.Adam(p, amsgrad=True),
    ],
)
def test_an_optimizer_is_restored_in_place(optimizer):
    """`restore` loads like load_state_dict, but into the existing tensors; False tells that something else changed."""

    def train(optimizer, steps):
        for _ in range(steps):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = p.detach() + 1
            optimizer.step()

    def of(optimizer):
        return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]

    one, other = (optimizer([torch.nn.Parameter(torch.arange(3.0) + i) for i in range(2)]) for _ in range(2))
    train(one, 2)
    train(other, 3)
    tensors, state = of(other), copy.deepcopy(one.state_dict())
    assert restore(other, state)
    assert all(a is b for a, b in zip(tensors, of(other), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(of(one), of(other), strict=True))
    state["param_groups"][0]["lr"] = 0.5
    assert restore(other, state) and other.param_groups[0]["lr"] == 0.5
    state["param_groups"][0]["weight_decay"] = 0.5
    assert not restore(other, state) and other.param_groups[0]["weight_decay"] == 0.5
    assert not restore(other, optimizer([torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]).state_dict())


def test_a_step_that_cannot_be_recorded_still_runs(capsys):
    class Refuses(OnTheCPU):
        def _record(self, *inputs):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    plain, refused = (afd_step(tiny(), "fast") for _ in range(2))
    refused._replay(Refuses(refused))
    for batch in batches(WARM_UPS + 2):
        for step in (plain, refused):
            step(*batch)
    assert_close(refused, plain, 1e-5)
    lines = [line for line in capsys.readouterr().err.splitlines() if "no CUDA graph" in line]
    assert len(lines) == 1 and lines[0].endswith("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    "build, scaled, reason",
    [
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), False, ""),
        (lambda p: torch.optim.SGD(p, 0.1), True, ""),
        (lambda p: torch.optim.AdamW(p, capturable=True), False, ""),
        (lambda p: torch.optim.AdamW(p, fused=True, capturable=True), True, ""),
        (lambda p: torch.optim.AdamW(p), False, "reads its rate on the host"),
        (lambda p: torch.optim.AdamW(p, fused=True), False, "reads its rate on the host"),
        (lambda p: torch.optim.AdamW(p, capturable=True), True, "whether fp16 overflowed"),
    ],
)
def test_which_optimizers_a_graph_can_have(build, scaled, reason):
    optimizer = build(tiny().parameters())
    fuse(optimizer)
    answer = needs_host(optimizer, scaled)
    assert reason in answer and bool(reason) == bool(answer)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("amp", ["fp32", "bf16", "fp16"])
def test_recorded_steps_are_the_compiled_ones_and_wait_for_nothing(amp, monkeypatch):
    """Recording changes no result; a replay does not wait, and launches only the graph and the copies of its inputs."""
    plain, recorded = (afd_step(tiny(dtype=torch.float32), "fast", "cuda", amp=amp) for _ in range(2))
    plain.graphs.works = False
    for step in (plain, recorded):
        for x, y in batches(WARM_UPS + 1):
            step(x.cuda(), y.cuda())
    assert len(recorded.graphs.recorded) == 1
    assert_close(recorded, plain, 1e-3)
    more = [(x.cuda(), y.cuda()) for x, y in batches(3)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch in more:
                recorded(*batch, probe=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for batch in more:
        plain(*batch)
    assert_close(recorded, plain, 1e-3)


@pytest.mark.gpu
@needs_gpu
def test_natural_training_is_recorded():
    net = tiny(dtype=torch.float32).cuda()
    step = TrainStep(net, make_sgd(net, 0.05, 0.9, 1e-3), Natural(), engine="fast")
    for x, y in batches(WARM_UPS + 2):
        step(x.cuda(), y.cuda())
    assert step.graphs.works and len(step.graphs.recorded) == 1


@pytest.mark.gpu
@needs_gpu
def test_a_recorded_run_resumes_and_follows_the_learning_rate():
    first = afd_step(tiny(), "fast", "cuda")
    some = [(x.cuda(), y.cuda()) for x, y in batches(2 * WARM_UPS + 4)]
    for batch in some[: WARM_UPS + 2]:
        first(*batch)
    held = copy.deepcopy(first.state_dict())
    second = afd_step(tiny(), "fast", "cuda")
    second.load_state_dict(held)
    for step in (first, second):
        for index, batch in enumerate(some[WARM_UPS + 2 :]):
            for group in step.optimizer.param_groups:
                group["lr"] = 0.0 if index == WARM_UPS + 1 else 0.01  # both steps are replays
            before = step.model.d1.weight.clone()
            step(*batch)
            assert torch.equal(before, step.model.d1.weight) == (index == WARM_UPS + 1)
    assert_close(first, second, 1e-3)
    first.load_state_dict(copy.deepcopy(first.state_dict()))
    for batch in some[: WARM_UPS + 1]:
        first(*batch)
    assert all(step.graphs.works and len(step.graphs.recorded) == 1 for step in (first, second))


@pytest.mark.gpu
@needs_gpu
def test_a_step_that_waits_cannot_be_recorded_and_still_runs():
    """In a separate process: after a recording that fails, the stream and the generator are as before."""
    code = """
import sys, torch
sys.path.insert(0, "tests")
from tiny import Tiny, afd_step, batches, tiny
from fastafd.training.graphs import WARM_UPS
step = afd_step(tiny(dtype=torch.float32), "fast", "cuda")
average, stream = step.engine.average, torch.cuda.current_stream()
step.engine.average = lambda weight: average(float(weight))
for x, y in batches(WARM_UPS + 3):
    metrics = step(x.cuda(), y.cuda())
assert not step.graphs.works and bool(metrics["loss"].isfinite()) and torch.cuda.current_stream() == stream
torch.rand(3, device="cuda")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no CUDA graph, the compiled step is launched kernel by kernel") == 1
