"""Other forms of the attack's convolutions.

Where a form applies it equals the plain form; elsewhere it changes nothing.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from test_snapshot import torchvision_net
from tiny import CLASSES, Tiny, afd_step, assert_close, batches, tiny, unsettled
from torch import nn

import fastafd
from fastafd.attacks import Choice, Snapshot, input_gradient
from fastafd.attacks.arms import (
    ARMS,
    goes_together,
    pack,
    turned_gradient,
    turned_weights,
    unpack,
)
from fastafd.attacks.conv_relu import conv_relu, conv_relu_by_cudnn
from fastafd.attacks.folded import Folded
from fastafd.console import Console
from fastafd.models import build_model

CPU = torch.device("cpu")


class Mixed(nn.Module):
    """Convolutions that arms apply to, and convolutions that they must not change, with odd sizes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 32, 5, stride=2, padding=2)
        self.long = nn.Conv2d(32, 32, (3, 1), stride=(1, 2), padding=(1, 0))
        self.groups = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.dilated = nn.Conv2d(32, 32, 3, padding=2, dilation=2)
        self.mirrored = nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect")
        self.same = nn.Conv2d(32, 32, 3, padding="same")
        self.twice = nn.Conv2d(32, 32, 1)
        self.itself = nn.Conv2d(32, 32, 3, padding=1)
        self.narrow = nn.Conv2d(32, 8, 3, stride=3, padding=2)
        self.norm, self.offset = nn.BatchNorm2d(32), nn.Parameter(torch.tensor(0.3))
        self.linear = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = self.long(x).relu()
        x = F.relu(self.groups(x), inplace=True)
        x = torch.relu(self.dilated(x) + x)
        x = F.relu(self.mirrored(x))
        x = F.relu(self.same(x))
        x = F.relu(self.twice(F.relu(self.twice(x))))
        x = F.relu(self.itself(x) + x)
        x = F.relu(self.narrow(x) + self.offset)
        return self.linear(F.relu(x - 0.1).mean((2, 3)))


class Writing(nn.Module):
    """A sum that is written into a tensor that is read again."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.linear = nn.Linear(32, CLASSES)

    def forward(self, x):
        x = self.conv1(x)
        doubled = x * 2
        total = doubled.add_(self.conv2(x))
        return self.linear((F.relu(total) + doubled).mean((2, 3)))


def network(net: nn.Module) -> nn.Module:
    model = fastafd.disentangle(unsettled(net)).double().eval()
    nn.init.normal_(model.d1.weight, std=0.05)
    return model


def snapshot_of(model: nn.Module) -> Snapshot:
    snapshot = Snapshot(model.backbone, torch.float64, model.classifier, model.d1)
    assert snapshot.reason is None
    return snapshot


def forms_in(snapshot: Snapshot) -> list[str]:
    """The arms of the snapshot's convolutions, with repetitions."""
    return [name for m in snapshot.modules() if isinstance(m, Folded) for form in m.forms.values() for name in form]


FORMS = [(name,) for name in ARMS] + [("fused", "turned"), ("turned", "bits", "padded"), ("fused", "padded")]
NETS = {  # the number of convolutions with each arm at 33 x 31 pixels
    "resnet18": (lambda: build_model("resnet18", CLASSES, "cifar10"), {"fused": 16, "turned": 20, "bits": 16}),
    "preactresnet18": (lambda: build_model("preactresnet18", CLASSES), {"fused": 8, "turned": 20, "bits": 8}),
    "wrn10_2": (lambda: build_model("wrn10_2", CLASSES), {"fused": 4, "turned": 10, "bits": 3}),
    "torchvision": (lambda: torchvision_net("resnet18"), {"fused": 16, "turned": 20, "bits": 16}),
    "torchvision50": (lambda: torchvision_net("resnet50"), {"fused": 48, "turned": 53, "bits": 48}),
    "mobilenet": (lambda: torchvision_net("mobilenet_v2"), {"fused": 0, "turned": 35, "bits": 0}),
    "mixed": (Mixed, {"fused": 2, "turned": 4, "bits": 2}),
    "writing": (Writing, {"fused": 0, "turned": 2, "bits": 0}),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.slow
def test_every_form_is_the_network(name):
    """Features and the input's gradient in float64, also after the weights have moved and for another shape."""
    torch.manual_seed(0)
    build, expected = NETS[name]
    padded = 1  # the first convolution
    model = network(build())
    for form in FORMS:
        snapshot = snapshot_of(model)
        choice = Choice(snapshot, CPU, Console())
        choice.forced = form
        for shape, factor in (((2, 3, 33, 31), 1.01), ((1, 3, 32, 32), 1 / 1.01)):
            x, y = torch.rand(shape, dtype=torch.float64, requires_grad=True), torch.arange(shape[0])
            choice.choose(x.detach())
            snapshot.refresh()
            torch.testing.assert_close(snapshot.features(x), model.features(x), rtol=1e-9, atol=1e-12)
            expected_gradient = input_gradient(model, x, y)
            off = (snapshot.gradient(x, y) - expected_gradient).norm() / expected_gradient.norm()
            assert off < 1e-9, form
            with torch.no_grad():
                for tensor in (*model.parameters(), *model.buffers()):
                    if tensor.is_floating_point():
                        tensor.mul_(factor)
        counts = {arm: forms_in(snapshot).count(arm) / 2 for arm in form}  # two shapes
        assert counts == {arm: (expected | {"padded": padded})[arm] for arm in form}


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 3), (2, 2)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 2), (4, 4)])
def test_turned_convolutions_are_the_input_gradient(kernel, stride):
    """In float64 against autograd, with paddings larger than the kernel and sizes that the stride does not divide."""
    torch.manual_seed(0)
    for padding, size in itertools.product([(0, 0), (1, 1), (2, 0), (3, 3)], [(8, 8), (9, 7), (11, 10)]):
        x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
        w = torch.randn(4, 3, *kernel, dtype=torch.float64)
        out = F.conv2d(x, w, None, stride, padding)
        g = torch.randn_like(out)
        (expected,) = torch.autograd.grad(out, x, g)
        gradient = turned_gradient(g, turned_weights(w, stride, padding), kernel, stride, padding, size)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_bits_are_those_of_their_channels():
    on = torch.rand(2, 64, 3, 5) > 0.5
    words = pack(on)
    assert words.shape == (2, 3, 5, 2) and words.dtype == torch.int32
    assert torch.equal(unpack(words), on)
    assert (words[1, 2, 4, 1].item() >> 7) & 1 == on[1, 39, 2, 4]


@pytest.mark.parametrize("residual", [False, True])
def test_conv_relu_is_an_operation_that_compiles(residual):
    x, w, b = torch.randn(2, 3, 9, 7), torch.randn(8, 3, 3, 3), torch.randn(8)
    z = torch.randn(2, 8, 5, 4) if residual else None
    expected = F.conv2d(x, w, b, 2, 1)
    expected = (expected if z is None else expected + z).relu()
    output = conv_relu(x, w, b, z, [2, 2], [1, 1])
    torch.testing.assert_close(output, expected)
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(conv_relu, (x, w, b, z, [2, 2], [1, 1]))


@pytest.mark.parametrize("residual", [False, True])
def test_cudnn_is_called_with_what_it_takes(residual, monkeypatch):
    """Plain PyTorch in place of cuDNN's operations, with the argument names of their schemas."""

    def played(name):
        names = [argument.name for argument in getattr(torch.ops.aten, name).default._schema.arguments]

        def run(*operands):
            called.append(name)
            of = dict(zip(names, operands, strict=True))
            geometry = (of[key] for key in ("stride", "padding", "dilation", "groups"))
            out = F.conv2d(of["self"], of["weight"], of["bias"], *geometry)
            return (out + of["alpha"] * of["z"] if "z" in of else out).relu()

        return run

    called = []
    for name in ("cudnn_convolution_relu", "cudnn_convolution_add_relu"):
        monkeypatch.setattr(torch.ops.aten, name, played(name))
    x, w, b = torch.randn(2, 3, 9, 7), torch.randn(8, 3, 3, 1), torch.randn(8)
    z = torch.randn(2, 8, 5, 7) if residual else None
    output = conv_relu_by_cudnn(x, w, b, z, [2, 1], [1, 0])
    torch.testing.assert_close(output, conv_relu(x, w, b, z, [2, 1], [1, 0]))
    assert called == ["cudnn_convolution_add_relu" if residual else "cudnn_convolution_relu"]


def test_arms_in_one_anothers_place_do_not_go_together():
    assert goes_together(("fused", "turned", "padded")) and goes_together(("turned", "bits"))
    assert not goes_together(("fused", "bits"))


@pytest.mark.parametrize("form", [("turned", "bits"), ("fused", "padded")])
@pytest.mark.slow
def test_a_fast_step_with_arms_is_the_reference(form):
    """Compiled without a graph break, at two batch sizes, for a network whose ReLUs have 32 channels."""
    reference, fast = (afd_step(tiny(Wide), engine) for engine in ("reference", "fast"))
    fast.engine.choice.forced = form
    torch._dynamo.utils.counters.clear()
    for batch in (*batches(2), *batches(1, batch=3), *batches(1)):
        for step in (reference, fast):
            step(*batch)
    assert set(forms_in(fast.engine.snapshot)) == set(form)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert_close(fast, reference)


class Wide(Tiny):
    """A network with a ReLU behind a folded convolution, and with strides."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32)
        self.linear = nn.Linear(32, CLASSES)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))
