"""Classifiers by name, and the disentangler that is put before their last linear layer."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastafd.models.disentangle import Disentangled, disentangle
from fastafd.models.logits import check_copy
from fastafd.models.modes import Modes, eval_mode, examined, frozen
from fastafd.models.resnet import BasicBlock, Bottleneck, PreActBlock, ResNet
from fastafd.models.split import SplitNet, check_split, split
from fastafd.models.wideresnet import WideResNet
from fastafd.settings import UsageError, unknown

__all__ = [
    "ARCHS",
    "NORMALIZATIONS",
    "Disentangled",
    "Modes",
    "Normalize",
    "SplitNet",
    "build_model",
    "check_copy",
    "check_model",
    "check_split",
    "disentangle",
    "eval_mode",
    "examined",
    "frozen",
    "split",
]

ARCHS: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": lambda classes: ResNet(BasicBlock, (2, 2, 2, 2), classes),
    "resnet50": lambda classes: ResNet(Bottleneck, (3, 4, 6, 3), classes),
    "preactresnet18": lambda classes: ResNet(PreActBlock, (2, 2, 2, 2), classes),
    "resnet8": lambda classes: ResNet(BasicBlock, (1, 1, 1), classes, widths=(16, 32, 64)),
    "resnet8_half": lambda classes: ResNet(BasicBlock, (1, 1, 1), classes, widths=(8, 16, 32)),
}
WIDE = ("wrn34_10", "wrn28_10", "wrn10_2", "wrnN_K")  # examples of the names that WideResNet(N, K) takes

# Per-channel mean and standard deviation of the training pixels in [0,1].
# CIFAR: computed by most CIFAR training code to these four digits; ImageNet: torchvision's model documentation.
NORMALIZATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]] | None] = {
    "none": None,
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class Normalize(nn.Module):
    """(x - mean) / std for each channel. It is part of the model, so that eps is always in pixels of [0,1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def check_model(arch: str, normalize: str) -> None:
    """Raise UsageError, with the most similar name, for a classifier or a normalisation that cannot be built."""
    wide = re.fullmatch(r"wrn(\d+)_(\d+)", arch)
    if wide and (int(wide[1]) < 10 or (int(wide[1]) - 4) % 6 or int(wide[2]) < 1):
        raise UsageError(f"arch: got {arch!r}, takes wrnN_K with depth N = 6n + 4 (10, 16, 22, 28, 34, …), K >= 1")
    if not wide and arch not in ARCHS:
        raise unknown("arch", arch, [*ARCHS, *WIDE])
    if normalize not in NORMALIZATIONS:
        raise unknown("normalize", normalize, NORMALIZATIONS)


def build_model(arch: str, num_classes: int, normalize: str = "none") -> nn.Module:
    """A freshly initialised classifier from images (B,3,H,W) in [0,1] to logits (B,num_classes), channels-last.

    arch: a name of ARCHS, or wrnN_K for WRN-N-K. normalize: a name of NORMALIZATIONS; with a name other than "none" a
    normalisation layer comes first, as in RobustBench, and the keys are `normalize.mean`, `normalize.std`, `model.*`.
    Raises UsageError for an unknown name.
    """
    check_model(arch, normalize)
    if arch in ARCHS:
        net = ARCHS[arch](num_classes)
    else:
        depth, widen = arch.removeprefix("wrn").split("_")
        net = WideResNet(int(depth), int(widen), num_classes)
    statistics = NORMALIZATIONS[normalize]
    if statistics is not None:
        net = nn.Sequential(OrderedDict(normalize=Normalize(*statistics), model=net))
    return net.to(memory_format=torch.channels_last)
