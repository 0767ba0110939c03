"""A classifier in two halves: the backbone that ends in pooled features, and the last linear layer that reads them."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn


class SplitNet(nn.Module):
    """A classifier as `backbone` (pooled features g) and `classifier`. Made by `split`."""

    def __init__(self, backbone: nn.Module, linear_name: str, classifier: nn.Linear):
        super().__init__()
        self.backbone = backbone
        self.linear_name = linear_name
        self.classifier = classifier

    def features(self, x: Tensor) -> Tensor:
        """The pooled features g(x): (B,3,H,W) in, (B,D) out."""
        return self.backbone(x)

    def f1(self, x: Tensor) -> Tensor:
        """The features that the classifier reads, here g(x): (B,3,H,W) in, (B,D) out."""
        return self.features(x)

    def forward(self, x: Tensor) -> Tensor:
        """The logits: (B,3,H,W) in, (B,C) out (the model that is attacked and evaluated)."""
        return self.classifier(self.f1(x))

    def merge(self) -> nn.Module:
        """The plain classifier, as a copy that shares no memory with this."""
        return self._whole(self.classifier.weight)

    @torch.no_grad()
    def _whole(self, weight: Tensor) -> nn.Module:
        """A copy in the unmodified architecture, with `weight` (C,D) in its last layer."""
        net = copy.deepcopy(self.backbone)
        linear = copy.deepcopy(self.classifier)
        linear.weight.copy_(weight)
        _set_submodule(net, self.linear_name, linear)
        return net


Halves = TypeVar("Halves", bound=SplitNet)


def split(net: nn.Module, into: type[Halves] = SplitNet) -> Halves:  # type: ignore[assignment]
    """A copy of `net` as backbone and classifier.

    `net` is any classifier that ends in one nn.Linear: those of `fastafd.models`, of torchvision, of timm.
    Raises ValueError where there is none, or where a layer with parameters is registered behind it.
    """
    if isinstance(net, SplitNet):
        raise ValueError("the network is split or disentangled already; merge() it first")
    net = copy.deepcopy(net)
    leaves = [(name, m) for name, m in net.named_modules() if next(m.children(), None) is None]
    weighted = [(name, m) for name, m in leaves if next(m.parameters(), None) is not None]
    if not weighted or not isinstance(weighted[-1][1], nn.Linear) or not weighted[-1][0]:
        found = (
            f"; its last layer with parameters is {weighted[-1][0]} ({type(weighted[-1][1]).__name__})"
            if weighted
            else ""
        )
        raise ValueError(f"{type(net).__name__} does not end in one nn.Linear behind its features{found}")
    name, classifier = weighted[-1]
    assert isinstance(classifier, nn.Linear)
    _set_submodule(net, name, nn.Identity())
    return into(net, name, classifier)


def _set_submodule(net: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, module)
