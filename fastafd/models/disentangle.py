"""The disentangler of AFD (Eq. 1): two bias-free linear maps before a classifier's last linear layer, and their merge.

f1 = D1 g(x) are the intrinsic features, which the classifier reads; f2 = D2 g(x) the confused ones, which only the
training losses see. Both start as the identity, so a disentangled network begins as the network it was made from.
After training W·W_D1 takes W's place and nothing of the disentangler is left.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastafd.models.split import SplitNet, split


class Disentangled(SplitNet):
    """A classifier as `backbone` (pooled features g), `d1`, `d2` and `classifier`. Made by `disentangle`."""

    def __init__(self, backbone: nn.Module, linear_name: str, classifier: nn.Linear):
        super().__init__(backbone, linear_name, classifier)
        features = classifier.in_features
        self.d1 = nn.Linear(features, features, bias=False)
        self.d2 = nn.Linear(features, features, bias=False)
        for block in (self.d1, self.d2):
            nn.init.eye_(block.weight)
            block.to(classifier.weight)

    def f1(self, x: Tensor) -> Tensor:
        """The intrinsic features D1 g(x), which the classifier reads: (B,3,H,W) in, (B,D) out."""
        return self.d1(self.features(x))

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The plain classifier with weight W·W_D1 and its bias unchanged, as a copy that shares no memory with this.

        The product is formed in float64. Its state dict loads with strict=True into the unmodified architecture.
        """
        return self._whole(self.classifier.weight.double() @ self.d1.weight.double())

    @torch.no_grad()
    def merge_confused(self) -> nn.Module:
        """The plain classifier that reads f2, with weight W·W_D2: what the confused features predict (Table 4)."""
        return self._whole(self.classifier.weight.double() @ self.d2.weight.double())


def disentangle(net: nn.Module) -> Disentangled:
    """Put D1 and D2 (D x D, no bias, identity) before the last linear layer of a copy of `net`.

    `net` is any classifier that ends in one nn.Linear: those of `fastafd.models`, of torchvision, of timm.
    Raises ValueError where there is none, or where a layer with parameters is registered behind it.
    Source: the AFD paper, Eq. 1; the identity start is the released code's.
    """
    return split(net, Disentangled)
