"""The fast engine compared with the reference engine: the compiled step, resuming, and what it refuses."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from tiny import CLASSES, Wilful, afd_step, assert_close, batches, state_of, tiny, unsettled
from torch.utils._python_dispatch import TorchDispatchMode

import fastafd
from benchmarks.faults import kernels_on_a_cpu
from benchmarks.verify_rates import uncompiled
from fastafd.console import Console
from fastafd.methods import Natural
from fastafd.models import split
from fastafd.recipes import find_recipe
from fastafd.settings import UsageError
from fastafd.training.ema import EMA
from fastafd.training.engine import Compiled
from fastafd.training.optim import make_sgd
from fastafd.training.step import TrainStep
from fastafd.verification.kernel_checks import Watch


@pytest.fixture(scope="module")
def trained():
    """Both engines after the same steps, the last one with a probe; nothing is recompiled, and no graph breaks."""
    pair, metrics = {}, {}
    torch._dynamo.reset()  # else code that other tests compiled would not be compiled again
    torch._dynamo.utils.counters.clear()
    for engine in ("reference", "fast"):
        step = pair[engine] = afd_step(tiny(), engine)
        for index, batch in enumerate(batches(4)):
            with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
                metrics[engine] = step(*batch, probe=index == 3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4
    assert not torch._dynamo.utils.counters["graph_break"]
    return pair["reference"], pair["fast"], metrics


@pytest.mark.slow
def test_fast_step_is_the_reference(trained):
    reference, fast, metrics = trained
    assert_close(fast, reference)
    assert metrics["fast"].keys() == metrics["reference"].keys()
    for name, value in metrics["fast"].items():
        torch.testing.assert_close(value, metrics["reference"][name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: n)


def test_each_kernel_is_called_by_a_fast_step(trained):
    """The calls of a step with two attack steps: one augmentation, one head and one ascent an attack step, one loss."""
    _, fast, _ = trained
    with torch.profiler.profile() as profile:
        fast(*batches(1)[0])
    calls = {event.key: event.count for event in profile.key_averages() if event.key.startswith("fastafd::")}
    kernels = {"augment": 1, "attack_head": 2, "linf_step": 2, "afd_loss": 1, "afd_gradients": 1}
    assert calls == {f"fastafd::{name}": count for name, count in kernels.items()}


@pytest.mark.slow
def test_a_batch_of_another_size_is_compiled_once(trained, capsys):
    reference, fast, _ = trained
    fast = copy.deepcopy(fast.state_dict()), fast
    for step in (reference, fast[1]):
        step.load_state_dict(copy.deepcopy(fast[0]))
        for x, y in batches(2, batch=3):
            step(x, y)
    assert capsys.readouterr().err.count("compiled in") == 1
    assert_close(fast[1], reference)


def test_fast_run_resumes_bit_for_bit(trained):
    _, fast, _ = trained
    held = copy.deepcopy(fast.state_dict())
    more = batches(6)[4:]
    for batch in more:
        fast(*batch)
    expected = {name: value.clone() for name, value in state_of(fast).items()}
    resumed = afd_step(tiny(), "fast")
    resumed.load_state_dict(copy.deepcopy(held))
    for batch in more:
        resumed(*batch)
    for name, value in state_of(resumed).items():
        assert torch.equal(value, expected[name]), name
    reference = afd_step(tiny(), "reference")  # loads the fast engine's state, and the fast engine loads its state
    reference.load_state_dict(held)
    for batch in more:
        reference(*batch)
    assert_close(resumed, reference)


@pytest.mark.slow
def test_a_network_that_cannot_be_traced_is_attacked_in_eval_mode(capsys):
    reference, fast = (afd_step(tiny(Wilful), engine) for engine in ("reference", "fast"))
    for batch in batches(2):
        for step in (reference, fast):
            step(*batch)
    assert_close(fast, reference)
    log_text = capsys.readouterr().err
    assert "not folded: torch.fx cannot trace it" in log_text and "the update is compiled in pieces: " in log_text


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_the_average_compiled_with_a_tensor_weight(dtype, tolerance):
    """A GPU runs the compiled average; it must agree to the precision of the weights. A CPU runs the eager one."""
    net = tiny(dtype=dtype)
    step = afd_step(net, "fast")
    average, live = EMA(step.model, 0.99), [*step.model.parameters(), *step.model.buffers()]
    step.engine._average = Compiled("the average", step.ema.move, Console())
    weights = [average.advance() for _ in range(4)]
    assert len(set(weights)) == 4
    for index, weight in enumerate(weights):
        with torch.no_grad():
            for value in live:
                value.add_(1)
        average.move(weight)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            # On CUDA the weight is a tensor in a recorded step, and a number if the optimizer cannot be recorded.
            step.engine.average(weight if index % 2 else torch.tensor(weight, dtype=dtype))
    assert step.ema.module.backbone.bn1.num_batches_tracked == 4
    for a, b in zip(average.module.state_dict().values(), step.ema.module.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Reads(TorchDispatchMode):
    """Notes operations that read the teacher's features before the current stream waited for the teacher's stream."""

    def __init__(self, engine):
        super().__init__()
        self.engine, self.teacher_features = engine, engine.teacher_features
        self.features, self.early, self.reads = [], [], 0
        engine.teacher_features = self.teach

    def teach(self, x):
        self.features.append(self.teacher_features(x))
        return self.features[-1]

    def __torch_dispatch__(self, function, types, operands=(), named=None):
        reads = any(operand is features for operand in operands for features in self.features)
        self.reads += reads
        if reads and self.engine._teaching:
            self.early.append(str(function))
        return function(*operands, **(named or {}))


@pytest.mark.parametrize("recipe", ["released", "afkd", "arrest", "vaft"])
def test_nothing_reads_the_teachers_features_before_its_stream_is_waited_for(recipe, monkeypatch):
    """Stand-ins take the place of streams. With and without a probe, in a step without a CUDA graph."""
    waits = []
    here = SimpleNamespace(wait_stream=lambda other: waits.append((here, other)))
    side = SimpleNamespace(wait_stream=lambda other: waits.append((side, other)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    config = find_recipe(recipe)
    with uncompiled():
        net = tiny()
        model = fastafd.disentangle(net) if config.method.disentangled else split(net)
        attack = replace(config.attack, steps=2)
        step = TrainStep(
            model,
            make_sgd(model, 0.1, 0.9, 0.0),
            config.method,
            teacher=net,
            attack=attack,
            engine="fast",
            loader=range(1),
        )
        step.engine.side = side
        with Reads(step.engine) as reads:
            for index, batch in enumerate(batches(2)):
                step(*batch, probe=index == 1)
    assert reads.reads and not reads.early
    uses = 2 if config.method.uses_teacher else 1  # the probe alone uses the features
    assert waits == uses * [(side, here), (here, side)]


def test_cudnn_may_try_its_algorithms_where_there_is_no_graph(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)

    def tried(engine):
        step, seen = afd_step(tiny(), engine), []
        with mock.patch.object(step, "_attacked", lambda x, inputs: seen.append(torch.backends.cudnn.benchmark) or x):
            step(*batches(1)[0])
        return seen

    with uncompiled():
        assert tried("reference") == [False] and tried("fast") == [True]
    assert not torch.backends.cudnn.benchmark


def test_the_reference_engine_launches_no_kernel():
    """Even where operations launch kernels, the reference engine must not: a wrong kernel would prove itself right."""
    with kernels_on_a_cpu(), uncompiled():
        launches = {}
        for engine in ("reference", "fast"):
            step, watch = afd_step(tiny(dtype=torch.float32), engine), Watch()
            with watch():
                step(*batches(1)[0], probe=True)
            launches[engine] = watch.counts
    assert launches["reference"] == {}
    assert launches["fast"] == {"augment": 1, "attack_head": 2, "linf_step": 2, "afd_loss": 1, "afd_gradients": 1}


@pytest.mark.slow
def test_an_update_that_fp16_skips_leaves_momentum_as_it_was():
    step = afd_step(tiny(dtype=torch.float32), "fast", amp="fp16")
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)  # every gradient overflows
    before = [p.detach().clone() for p in step.model.parameters()]
    step(*batches(1)[0])
    assert all(torch.equal(old, new) for old, new in zip(before, step.model.parameters(), strict=True))
    momentum = [state["momentum_buffer"] for state in step.optimizer.state.values()]
    assert len(momentum) == len(before) and not any(buffer.any() for buffer in momentum)


def test_a_state_of_another_kind_of_device():
    step = afd_step(tiny(), "reference")
    state = step.state_dict() | {"cuda_rng": torch.get_rng_state()}
    with pytest.raises(UsageError, match="device: got cpu, and the saved state is that of a step on a GPU"):
        step.load_state_dict(state)


@pytest.mark.slow
def test_fast_step_on_a_torchvision_resnet():
    resnet = pytest.importorskip("torchvision").models.resnet
    net = unsettled(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)).double()
    reference, fast = (afd_step(net, engine) for engine in ("reference", "fast"))
    for step in (reference, fast):
        for batch in batches(2, side=32):
            step(*batch)
    assert fast.engine.snapshot.reason is None
    assert_close(fast, reference, 1e-6)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.slow
def test_low_precision_stays_near_fp32(amp):
    net = tiny(dtype=torch.float32)
    wide, low = afd_step(net, "reference"), afd_step(net, "fast", amp=amp)
    metrics = [step(*batches(1)[0]) for step in (wide, low)]
    for name in ("loss", "confused", "cross_entropy"):
        assert float(metrics[1][name]) == pytest.approx(float(metrics[0][name]), rel=0.02)
    assert low.scaler.is_enabled() == (amp == "fp16")
    assert {p.dtype for p in low.model.parameters()} == {torch.float32}


def test_natural_training():
    pair = []
    for engine in ("reference", "fast"):
        net = tiny()
        step = TrainStep(net, make_sgd(net, 0.05, 0.9, 1e-3), Natural(), amp="fp32", engine=engine)
        for batch in batches(3):
            metrics = step(*batch, probe=True)
        assert set(metrics) == {"loss", "cross_entropy", "clean_accuracy"}
        pair.append(net.state_dict())
    for name, value in pair[0].items():
        torch.testing.assert_close(value, pair[1][name], rtol=1e-9, atol=1e-12)


def test_mistakes():
    with pytest.raises(UsageError, match=r"engine: got 'fats', takes one of auto, reference, fast \(did you mean fast"):
        afd_step(tiny(), "fats")
    with pytest.raises(UsageError, match="attack_bn: got 'train', takes eval with engine fast"):
        afd_step(tiny(), "fast", attack_bn="train")
    with pytest.raises(UsageError, match="amp: got 'bf61', takes auto, bf16, fp16 or fp32"):
        afd_step(tiny(), "fast", amp="bf61")
