"""The fast engine against the reference: the snapshot, the compiled step, its resume, and the launches by graphs."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

import fastafd
from fastafd.attacks import Snapshot, input_gradient
from fastafd.console import Console
from fastafd.data import Augment
from fastafd.ema import EMA
from fastafd.engine import Compiled
from fastafd.graphs import WARM_UPS, Graphs
from fastafd.methods import Natural
from fastafd.models import build_model
from fastafd.optim import fuse, make_sgd, needs_host
from fastafd.settings import UsageError
from fastafd.step import TrainStep

CLASSES, BATCH = 5, 8
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Tiny(nn.Module):
    """Two blocks with BatchNorm behind the convolution and before it, a residual sum, and a pool behind a ReLU."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        return self.linear(F.relu(x + self.conv2(F.relu(self.bn2(x)))).mean((2, 3)))


class Wilful(Tiny):
    """What torch.fx cannot trace: a branch on the images' values."""

    def forward(self, x):
        return super().forward(x if bool(x.max() > 2) else x * 1.0)


def unsettled(net: nn.Module) -> nn.Module:
    """The network with statistics and BatchNorm parameters of its own, as a trained one has."""
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.3, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.3, 0.3),
            ):
                tensor.uniform_(low, high)
    return net.eval()


def tiny(kind: type[nn.Module] = Tiny, dtype: torch.dtype = torch.float64) -> nn.Module:
    """In float64: where two engines round otherwise, signs of the attack's gradient would part their ways."""
    torch.manual_seed(0)
    return unsettled(kind()).to(dtype, memory_format=torch.channels_last)


def batches(count: int, batch: int = BATCH, side: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8, generator=generator),
            torch.randint(0, CLASSES, (batch,), generator=generator),
        )
        for _ in range(count)
    ]


def afd_step(net: nn.Module, engine: str, device: str = "cpu", **more) -> fastafd.AFDStep:
    net = copy.deepcopy(net).to(device)
    model = fastafd.disentangle(net)
    optimizer = make_sgd(model, 0.02, 0.9, 1e-3)
    more = {"amp": "fp32", "augment": Augment(1, True, 0), "steps": 2} | more
    return fastafd.AFDStep(model, net, optimizer, engine=engine, **more)


def state_of(step: TrainStep) -> dict[str, torch.Tensor]:
    momentum = {str(i): v["momentum_buffer"] for i, v in enumerate(step.optimizer.state.values())}
    return {**step.model.state_dict(), **{f"ema.{k}": v for k, v in step.averaged().state_dict().items()}, **momentum}


def assert_close(ours: TrainStep, theirs: TrainStep, tolerance: float = 1e-9) -> None:
    a, b = state_of(ours), state_of(theirs)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# -- the snapshot -------------------------------------------------------------------------------------------------


def torchvision_net(name: str) -> nn.Module:
    return getattr(pytest.importorskip("torchvision").models, name)(num_classes=CLASSES)


@pytest.mark.parametrize(
    "build, folded, affine, pools",
    [
        (lambda: build_model("resnet18", CLASSES, "cifar10"), 20, 0, True),
        (lambda: build_model("resnet50", CLASSES), 53, 0, True),
        (lambda: build_model("preactresnet18", CLASSES), 20, 9, True),
        (lambda: build_model("wrn10_2", CLASSES), 10, 3, True),
        (lambda: torchvision_net("resnet18"), 20, 0, True),
        (lambda: torchvision_net("mobilenet_v2"), 52, 0, False),
        (Tiny, 2, 1, True),
        (Wilful, 0, 0, False),
    ],
)
def test_snapshot_is_the_network_in_eval_mode(build, folded, affine, pools):
    """Logits and the input's gradient, in float64, also after the weights have moved."""
    torch.manual_seed(0)
    model = fastafd.disentangle(unsettled(build())).double().eval()
    nn.init.normal_(model.d1.weight, std=0.05)
    snapshot = Snapshot(model.backbone, torch.float64, model.classifier, model.d1)
    convolutions = [m for m in snapshot.modules() if type(m).__name__ == "Folded"]
    assert (len(convolutions), len(snapshot._affines), snapshot.pools) == (folded, affine, pools)
    assert (snapshot.reason is None) == (folded > 0)
    x, y = torch.rand(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 3])
    for _ in range(2):
        snapshot.refresh()
        features = model.features(x)
        torch.testing.assert_close(snapshot.features(x), features, rtol=1e-9, atol=1e-12)
        f1, logits = snapshot.f1(x)
        torch.testing.assert_close(f1, model.d1(features), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(logits, model(x), rtol=1e-9, atol=1e-12)
        expected = input_gradient(model, x.requires_grad_(), y)
        torch.testing.assert_close(snapshot.gradient(x, y), expected, rtol=1e-7, atol=1e-12)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.mul_(1.01)


def test_snapshot_forms_no_gradient_of_a_weight_and_shares_no_memory():
    model = fastafd.disentangle(tiny())
    snapshot = Snapshot(model.backbone, torch.bfloat16, model.classifier, model.d1)
    assert not any(tensor.requires_grad for tensor in (*snapshot.parameters(), *snapshot.buffers()))
    live = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert not live & {tensor.data_ptr() for tensor in (*snapshot.parameters(), *snapshot.buffers())}
    weights = [m.conv.weight for m in snapshot.modules() if type(m).__name__ == "Folded"]
    assert {w.dtype for w in weights} == {torch.bfloat16}
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


class Odd(Tiny):
    """What the folding must leave alone: a hook, an operand by its name, a weight that the forward reads."""

    def __init__(self):
        super().__init__()
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.conv4, self.bn4 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.conv5, self.bn5 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.bn3.register_forward_hook(lambda module, operands, out: 2 * out)
        self.linear = self._modules.pop("linear")  # the last of its layers

    def forward(self, x):
        x = self.bn3(self.conv3(self.bn1(self.conv1(x))))
        x = self.bn4(input=self.conv4(x))
        x = self.bn5(self.conv5(x)) * self.conv5.weight.mean()
        return self.linear(F.relu(x).mean((2, 3)))


def test_what_cannot_be_folded_is_left_as_it_is():
    model = fastafd.disentangle(unsettled(Odd())).double().eval()
    snapshot = Snapshot(model.backbone, torch.float64, model.classifier, model.d1)
    x, y = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True), torch.tensor([1, 3])
    snapshot.refresh()
    torch.testing.assert_close(snapshot.features(x), model.features(x), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(snapshot.gradient(x, y), input_gradient(model, x, y), rtol=1e-7, atol=1e-12)


# -- the compiled step --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """Both engines after the same steps, probed at the last; no recompile after the first, and no graph breaks."""
    pair, metrics = {}, {}
    torch._dynamo.utils.counters.clear()
    for engine in ("reference", "fast"):
        step = pair[engine] = afd_step(tiny(), engine)
        for index, batch in enumerate(batches(4)):
            with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
                metrics[engine] = step(*batch, probe=index == 3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4
    assert not torch._dynamo.utils.counters["graph_break"]
    return pair["reference"], pair["fast"], metrics


def test_fast_step_is_the_reference(trained):
    reference, fast, metrics = trained
    assert_close(fast, reference)
    assert metrics["fast"].keys() == metrics["reference"].keys()
    for name, value in metrics["fast"].items():
        torch.testing.assert_close(value, metrics["reference"][name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: n)


def test_each_kernel_is_called_by_a_fast_step(trained):
    """Calls of a step with two attack steps: one augmentation, a head and an ascent an attack step, one loss."""
    _, fast, _ = trained
    with torch.profiler.profile() as profile:
        fast(*batches(1)[0])
    calls = {event.key: event.count for event in profile.key_averages() if event.key.startswith("fastafd::")}
    kernels = {"augment": 1, "attack_head": 2, "linf_step": 2, "afd_loss": 1, "afd_gradients": 1}
    assert calls == {f"fastafd::{name}": count for name, count in kernels.items()}


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
    reference = afd_step(tiny(), "reference")  # takes over from the fast engine, and is taken over by it
    reference.load_state_dict(held)
    for batch in more:
        reference(*batch)
    assert_close(resumed, reference)


class OnTheCPU(Graphs):
    """Graphs for a machine without CUDA: a recording computes nothing, and its replay writes into the same outputs."""

    def __init__(self, step):
        self.run, self.console, self.calls, self.recorded, self.works = step._recorded, step.console, {}, {}, True
        self.step, self.replays = step, 0

    def clear(self):
        self.recorded.clear()
        self.calls.clear()

    def _aside(self, *inputs):
        return self.run(*inputs)

    def _record(self, *inputs):
        held = tuple(None if v is None else v.clone() for v in inputs)
        model, ema, rates = self.step.model, self.step.ema, [group["lr"] for group in self.step.optimizer.param_groups]
        live = [*model.parameters(), *model.buffers(), *ema.module.parameters(), *ema.module.buffers()]
        live += [v["momentum_buffer"] for v in self.step.optimizer.state.values()]
        before = [tensor.detach().clone() for tensor in live]
        outputs = tuple(v.detach() for v in self.run(*held))
        with torch.no_grad():
            for tensor, old in zip(live, before):
                tensor.copy_(old)

        def replay():
            self.replays += 1
            assert all(group["lr"] is rate for group, rate in zip(self.step.optimizer.param_groups, rates))
            for own, new in zip(outputs, self.run(*held)):
                own.copy_(new.detach())

        return type("Recorded", (), {"replay": staticmethod(replay)}), held, outputs


def test_launches_by_graphs_are_the_step(trained):
    """Inputs, learning rates and the average's weight reach a recording; metrics are not overwritten by the next."""
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
    assert replayed.graphs.replays == 5 and len(replayed.graphs.recorded) == 1
    assert_close(replayed, plain, 1e-5)
    for step in (plain, replayed):  # the optimizer alone, by its user: its tensors are others now
        step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
        for batch in batches(WARM_UPS + 1):
            step(*batch)
    assert replayed.graphs.replays == 6
    assert_close(replayed, plain, 1e-5)


def test_what_cannot_be_recorded_runs_all_the_same(capsys):
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


def test_a_network_that_cannot_be_traced_is_attacked_in_eval_mode(capsys):
    reference, fast = (afd_step(tiny(Wilful), engine) for engine in ("reference", "fast"))
    for batch in batches(2):
        for step in (reference, fast):
            step(*batch)
    assert_close(fast, reference)
    said = capsys.readouterr().err
    assert "not folded: torch.fx cannot trace it" in said and "the update is compiled in pieces: " in said


def test_the_average_compiled_with_a_tensor_weight():
    """As a GPU runs it; a CPU's fast step takes the average as it is."""
    net = tiny(dtype=torch.float32)
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
            # On CUDA a tensor from a recorded step, a number from one whose optimizer cannot be recorded.
            step.engine.average(weight if index % 2 else torch.tensor(weight))
    assert step.ema.module.backbone.bn1.num_batches_tracked == 4
    for a, b in zip(average.module.state_dict().values(), step.ema.module.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_an_update_that_fp16_skips_leaves_momentum_as_it_was():
    step = afd_step(tiny(dtype=torch.float32), "fast", amp="fp16")
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)  # every gradient overflows
    before = [p.detach().clone() for p in step.model.parameters()]
    step(*batches(1)[0])
    assert all(torch.equal(old, new) for old, new in zip(before, step.model.parameters(), strict=True))
    momentum = [state["momentum_buffer"] for state in step.optimizer.state.values()]
    assert len(momentum) == len(before) and not any(buffer.any() for buffer in momentum)


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
    found = needs_host(optimizer, scaled)
    assert reason in found and bool(reason) == bool(found)


def test_a_state_of_another_kind_of_device():
    step = afd_step(tiny(), "reference")
    state = step.state_dict() | {"cuda_rng": torch.get_rng_state()}
    with pytest.raises(UsageError, match="device: got cpu, and the state to go on from is that of a step on a GPU"):
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


# -- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("amp", ["fp32", "bf16", "fp16"])
def test_recorded_steps_are_the_compiled_ones_and_wait_for_nothing(amp, monkeypatch):
    """Recording changes nothing; a replay neither waits nor launches anything but the graph and its inputs."""
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
    some = [(x.cuda(), y.cuda()) for x, y in batches(WARM_UPS + 5)]
    for batch in some[: WARM_UPS + 2]:
        first(*batch)
    held = copy.deepcopy(first.state_dict())
    second = afd_step(tiny(), "fast", "cuda")
    second.load_state_dict(held)
    for step in (first, second):
        for index, batch in enumerate(some[WARM_UPS + 2 :]):
            for group in step.optimizer.param_groups:
                group["lr"] = 0.0 if index == 2 else 0.01
            before = step.model.d1.weight.clone()
            step(*batch)
            assert torch.equal(before, step.model.d1.weight) == (index == 2)
    assert_close(first, second, 1e-3)
    first.load_state_dict(copy.deepcopy(first.state_dict()))
    for batch in some[: WARM_UPS + 1]:
        first(*batch)
    assert all(step.graphs.works and len(step.graphs.recorded) == 1 for step in (first, second))


@pytest.mark.gpu
@needs_gpu
def test_a_step_that_waits_cannot_be_recorded_and_runs_all_the_same():
    """In a process of its own: a recording that breaks must leave neither the stream nor the generator behind it."""
    code = """
import sys, torch
sys.path.insert(0, "tests")
from test_fast import WARM_UPS, afd_step, batches, tiny
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
