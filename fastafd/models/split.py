"""A classifier in two parts: the backbone, which ends in pooled features, and the last linear layer."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn


class SplitNet(nn.Module):
    """A classifier in two parts, `backbone` (pooled features g) and `classifier`. `split` makes it."""

    def __init__(self, backbone: nn.Module, linear_name: str, classifier: nn.Linear):
        super().__init__()
        self.backbone = backbone
        self.linear_name = linear_name
        self.classifier = classifier

    def features(self, x: Tensor) -> Tensor:
        """The pooled features g(x) (B,D) of images (B,3,H,W)."""
        return self.backbone(x)

    def f1(self, x: Tensor) -> Tensor:
        """The features (B,D) that the classifier reads, here g(x), of images (B,3,H,W)."""
        return self.features(x)

    def forward(self, x: Tensor) -> Tensor:
        """The logits (B,C) of images (B,3,H,W)."""
        return self.classifier(self.f1(x))

    def merge(self) -> nn.Module:
        """A new plain classifier. It shares no memory with this model."""
        return self._whole(self.classifier.weight)

    @torch.no_grad()
    def _whole(self, weight: Tensor) -> nn.Module:
        """A copy in the original architecture, with `weight` (C,D) in its last layer."""
        net = copy.deepcopy(self.backbone)
        linear = copy.deepcopy(self.classifier)
        linear.weight.copy_(weight)
        _set_submodule(net, self.linear_name, linear)
        return net


Halves = TypeVar("Halves", bound=SplitNet)


def split(net: nn.Module, into: type[Halves] = SplitNet) -> Halves:  # type: ignore[assignment]
    """A copy of `net` as backbone and classifier.

    net: any classifier that ends in one nn.Linear, such as those of `fastafd.models`, torchvision and timm.
    Raises ValueError if there is no such layer, or if a layer with parameters is registered after it.
    """
    if isinstance(net, SplitNet):
        raise ValueError("the network is already split or disentangled; call merge() first")
    net = copy.deepcopy(net)
    leaves = [(name, m) for name, m in net.named_modules() if next(m.children(), None) is None]
    weighted = [(name, m) for name, m in leaves if next(m.parameters(), None) is not None]
    if not weighted or not isinstance(weighted[-1][1], nn.Linear) or not weighted[-1][0]:
        reason = (
            f"; its last layer with parameters is {weighted[-1][0]} ({type(weighted[-1][1]).__name__})"
            if weighted
            else ""
        )
        raise ValueError(f"{type(net).__name__} does not end in one nn.Linear behind its features{reason}")
    name, classifier = weighted[-1]
    assert isinstance(classifier, nn.Linear)
    _set_submodule(net, name, nn.Identity())
    return into(net, name, classifier)


def _set_submodule(net: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, module)
