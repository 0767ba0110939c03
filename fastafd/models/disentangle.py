"""The disentangler of AFD (Eq. 1): two bias-free linear maps before a classifier's last linear layer, and their merge.

f1 = D1 g(x) are the intrinsic features, which the classifier reads; f2 = D2 g(x) the confused ones, which only the
training losses see. Both start as the identity, so a disentangled network begins as the network it was made from.
After training W·W_D1 takes W's place and nothing of the disentangler is left.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Disentangled(nn.Module):
    """A classifier as `backbone` (pooled features g), `d1`, `d2` and `classifier`. Made by `disentangle`."""

    def __init__(self, backbone: nn.Module, linear_name: str, classifier: nn.Linear):
        super().__init__()
        features = classifier.in_features
        self.backbone = backbone
        self.linear_name = linear_name
        self.d1 = nn.Linear(features, features, bias=False)
        self.d2 = nn.Linear(features, features, bias=False)
        self.classifier = classifier
        for block in (self.d1, self.d2):
            nn.init.eye_(block.weight)
            block.to(classifier.weight)

    def features(self, x: Tensor) -> Tensor:
        """The pooled features g(x): (B,3,H,W) in, (B,D) out."""
        return self.backbone(x)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of f1: (B,3,H,W) in, (B,C) out (the model that is attacked and evaluated)."""
        return self.classifier(self.d1(self.features(x)))

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The plain classifier with weight W·W_D1 and its bias unchanged, as a copy that shares no memory with this.

        The product is formed in float64. Its state dict loads with strict=True into the unmodified architecture.
        """
        net = copy.deepcopy(self.backbone)
        linear = copy.deepcopy(self.classifier)
        weight = self.classifier.weight.double() @ self.d1.weight.double()
        linear.weight.copy_(weight)
        _set_submodule(net, self.linear_name, linear)
        return net


def disentangle(net: nn.Module) -> Disentangled:
    """Put D1 and D2 (D x D, no bias, identity) before the last linear layer of a copy of `net`.

    `net` is any classifier that ends in one nn.Linear: those of `fastafd.models`, of torchvision, of timm.
    Raises ValueError where there is none, or where a layer with parameters is registered behind it.
    Source: the AFD paper, Eq. 1; the identity start is the released code's.
    """
    if isinstance(net, Disentangled):
        raise ValueError("the network is disentangled already; merge() it first")
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
    return Disentangled(net, name, classifier)


def _set_submodule(net: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, module)
