"""The classifiers' shapes and keys, the disentangler, and the merge."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastafd
from fastafd.models import ARCHS, build_model, split
from fastafd.settings import UsageError

# (arch, parameters in millions for ten classes, features); counts of the papers' tables and performance.md
SIZES = [
    ("resnet18", 11.17, 512),
    ("resnet50", 23.52, 2048),
    ("preactresnet18", 11.17, 512),
    ("wrn34_10", 46.16, 640),
    ("wrn28_10", 36.48, 640),
    ("wrn10_2", 0.30, 128),
    ("resnet8", 0.08, 64),
    ("resnet8_half", 0.02, 32),
]

# Keys that RobustBench's classes of the same names have (architectures/resnet.py, wide_resnet.py), and their shapes.
ROBUSTBENCH_KEYS = {
    "resnet18": {
        "conv1.weight": (64, 3, 3, 3),
        "bn1.running_var": (64,),
        "layer1.1.conv2.weight": (64, 64, 3, 3),
        "layer2.0.shortcut.0.weight": (128, 64, 1, 1),
        "layer2.0.shortcut.1.running_mean": (128,),
        "layer4.1.bn2.bias": (512,),
        "linear.weight": (10, 512),
    },
    "resnet50": {"layer1.0.shortcut.0.weight": (256, 64, 1, 1), "layer3.5.conv3.weight": (1024, 256, 1, 1)},
    "preactresnet18": {
        "layer1.0.bn1.weight": (64,),
        "layer2.0.shortcut.0.weight": (128, 64, 1, 1),
        "bn.weight": (512,),
        "linear.bias": (10,),
    },
    "wrn34_10": {
        "conv1.weight": (16, 3, 3, 3),
        "block1.layer.0.convShortcut.weight": (160, 16, 1, 1),
        "block3.layer.4.conv2.weight": (640, 640, 3, 3),
        "bn1.weight": (640,),
        "fc.weight": (10, 640),
    },
}
# In a state dict, by hand: a convolution has one tensor, a BatchNorm five, the linear layer two.
TENSORS = {"resnet18": 6 + 8 * 12 + 3 * 6 + 2, "wrn34_10": 1 + 15 * 12 + 3 + 5 + 2}


@pytest.mark.parametrize("arch, millions, features", SIZES)
def test_sizes(arch, millions, features):
    with torch.device("meta"):
        net = build_model(arch, 10)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    assert [m for m in net.modules() if isinstance(m, nn.Linear)][-1].in_features == features


@pytest.mark.parametrize("arch", ROBUSTBENCH_KEYS)
def test_keys_are_robustbenchs(arch):
    with torch.device("meta"):
        state = build_model(arch, 10).state_dict()
    for name, shape in ROBUSTBENCH_KEYS[arch].items():
        assert tuple(state[name].shape) == shape
    if arch in TENSORS:
        assert len(state) == TENSORS[arch]


@pytest.mark.parametrize("arch", ["resnet18", "preactresnet18", "wrn10_2", "resnet8"])
@pytest.mark.parametrize("side", [32, 64])
def test_every_image_gets_one_row_of_logits(arch, side):
    """A fixed 8x8 pool and a reshape would turn 4 images of 64x64 into 16 rows."""
    net = build_model(arch, 7).eval()
    assert net(torch.rand(4, 3, side, side)).shape == (4, 7)


def test_channels_last_weights_and_activations():
    net = build_model("wrn10_2", 10).eval()
    assert net.block2.layer[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    seen = []
    net.block3.register_forward_hook(lambda module, args, out: seen.append(out))
    net(torch.rand(2, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_normalisation_is_a_layer_inside_with_robustbenchs_keys():
    net = build_model("resnet8", 10, "cifar10").eval()
    assert {"normalize.mean", "normalize.std", "model.conv1.weight"} <= set(net.state_dict())
    x = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2471, 0.2435, 0.2616])
    torch.testing.assert_close(net(x), net.model((x - mean.view(3, 1, 1)) / std.view(3, 1, 1)))


@pytest.mark.parametrize(
    "arch, hint", [("resnet81", "resnet18|resnet8"), ("wrn35_10", "6n \\+ 4"), ("wrn-34-10", "wrn34_10")]
)
def test_an_unknown_arch_is_named_with_the_nearest(arch, hint):
    with pytest.raises(UsageError, match=hint):
        build_model(arch, 10)


# -- disentangle and merge ----------------------------------------------------------------------------------------


def trained_like(model: fastafd.Disentangled, seed: int = 0) -> fastafd.Disentangled:
    """The model with D1, D2 and the classifier moved away from their starts."""
    generator = torch.Generator().manual_seed(seed)
    for weight in (model.d1.weight, model.d2.weight, model.classifier.weight):
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("arch", [*ARCHS, "wrn34_10", "wrn10_2"])
@pytest.mark.slow
def test_merge_gives_the_plain_classifier(arch):
    net = build_model(arch, 10).eval()
    model = trained_like(fastafd.disentangle(net))
    merged = model.merge().eval()
    fresh = build_model(arch, 10).eval()
    fresh.load_state_dict(merged.state_dict(), strict=True)
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        for plain in (merged, fresh):
            torch.testing.assert_close(plain(x), expected, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in net.parameters())
    moved = merged.state_dict()
    last = [name for name, m in net.named_modules() if isinstance(m, nn.Linear)][-1]
    torch.testing.assert_close(moved[f"{last}.bias"], model.classifier.bias)
    assert not torch.allclose(moved[f"{last}.weight"], model.classifier.weight)


@given(st.integers(1, 24), st.integers(2, 12), st.booleans(), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_merge_for_any_head(features, classes, bias, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, features), nn.Tanh(), nn.Linear(features, classes, bias=bias))
    model = trained_like(fastafd.disentangle(net), seed)
    x = torch.rand(5, 3, 2, 2)
    torch.testing.assert_close(model.merge()(x), model(x), atol=1e-5, rtol=1e-5)


def test_disentangling_copies_and_starts_as_the_identity():
    net = build_model("resnet8", 10).eval()
    model = fastafd.disentangle(net)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), net(x))
    model.classifier.weight.data.zero_()
    model.backbone.conv1.weight.data.zero_()
    assert net.linear.weight.abs().sum() > 0 and net.conv1.weight.abs().sum() > 0
    merged = model.merge()
    merged.conv1.weight.data.fill_(1.0)
    assert model.backbone.conv1.weight.abs().sum() == 0


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "vgg11", "vit_b_32"])
def test_torchvisions_classifiers(name):
    import torchvision

    net = torchvision.models.get_model(name, num_classes=6).eval()
    model = trained_like(fastafd.disentangle(net))
    side = 224 if name == "vit_b_32" else 64
    x = torch.rand(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(model.merge()(x), model(x), atol=1e-4, rtol=1e-4)


def test_split_is_the_network_in_two_halves():
    net = build_model("resnet8", 10).eval()
    model = split(net).eval()
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model(x), net(x))
    torch.testing.assert_close(model.classifier(model.f1(x)), net(x))
    model.classifier.weight.data *= 2
    merged = model.merge()
    assert merged.state_dict().keys() == net.state_dict().keys()
    torch.testing.assert_close(merged.eval()(x) - net.linear.bias, 2 * (net(x) - net.linear.bias), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_disentangled_says_why():
    with pytest.raises(ValueError, match="BatchNorm1d"):
        fastafd.disentangle(nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4)))
    with pytest.raises(ValueError, match="Flatten"):
        fastafd.disentangle(nn.Sequential(nn.Flatten()))
    with pytest.raises(ValueError, match="merge"):
        fastafd.disentangle(fastafd.disentangle(nn.Sequential(nn.Flatten(), nn.Linear(12, 4))))


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch.startswith("resnet8")])
@pytest.mark.parametrize("side", [32, 64, 96])
def test_gradients_stay_within_their_memory(arch, side):
    """In a process of its own: on some CPUs PyTorch overran it, and the process died some operations later."""
    code = f"""
import torch
from fastafd.models import build_model
net = build_model({arch!r}, 2)
x = torch.rand(4, 3, {side}, {side}).contiguous(memory_format=torch.channels_last)
for _ in range(30):
    net(x).sum().backward()
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0


def test_narrow_shortcuts_are_those_with_a_stride():
    """Every other pixel and no stride is what the convolution with its stride computes."""
    net = build_model("resnet8_half", 10).double().eval()
    strided = copy.deepcopy(net)
    block = strided.layer2[0]
    assert block.every_other and block.shortcut[0].stride == (1, 1)
    block.every_other, block.shortcut[0].stride = False, (2, 2)
    x = torch.rand(2, 3, 17, 16, dtype=torch.float64)
    torch.testing.assert_close(net(x), strided(x), rtol=1e-12, atol=1e-12)
    assert not any(getattr(module, "every_other", False) for module in build_model("resnet18", 10).modules())
