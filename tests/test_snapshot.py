"""The snapshot that the fast engine attacks: the network in eval mode, with BatchNorms folded if possible."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import CLASSES, Tiny, Wilful, tiny, unsettled
from torch import nn

import fastafd
from fastafd.attacks import Snapshot, input_gradient
from fastafd.models import build_model


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
    """Logits and the input's gradient in float64, also after the weights have moved."""
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
    """Modules that must not be folded.

    One with a hook, one with a keyword argument, one whose weight the forward reads.
    """

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


@pytest.mark.parametrize(
    "build, leaf",
    [
        (lambda: build_model("resnet8_half", CLASSES), torch.bfloat16),
        (lambda: build_model("preactresnet18", CLASSES), torch.bfloat16),
        (lambda: build_model("resnet8_half", CLASSES, "cifar10"), None),  # normalised before it is cast
        (Wilful, None),
    ],
)
def test_images_in_the_type_of_the_first_convolution(build, leaf):
    """If nothing else reads the images, the gradient is bit for bit the same, without its cast."""
    torch.manual_seed(0)
    model = fastafd.disentangle(unsettled(build()))
    snapshot = Snapshot(model.backbone, torch.bfloat16, model.classifier, model.d1)
    snapshot.refresh()
    assert snapshot.leaf == leaf
    assert Snapshot(model.backbone, torch.float32).leaf in (
        torch.float32,
        None,
    )  # the same type as the images, so nothing is cast
    if leaf is not None:
        x, y = torch.rand(2, 3, 16, 16), torch.tensor([1, 3])
        wide = snapshot.gradient(x.clone().requires_grad_(), y)
        narrow = snapshot.gradient(x.to(leaf).requires_grad_(), y)
        assert (wide.dtype, narrow.dtype) == (torch.float32, leaf)
        assert wide.any() and torch.equal(narrow.float(), wide)
