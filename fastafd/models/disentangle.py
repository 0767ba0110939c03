"""The disentangler of AFD (Eq. 1): two linear maps without bias before a classifier's last linear layer, and their
merge.

f1 = D1 g(x) are the intrinsic features, which the classifier reads. f2 = D2 g(x) are the confused features, which only
the training losses read. Both maps start as the identity, so a disentangled network starts with the outputs of the
network that it was made from. After training, W·W_D1 replaces W, and nothing of the disentangler remains.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastafd.models.split import SplitNet, split


class Disentangled(SplitNet):
    """A classifier with a disentangler.

    `backbone` (pooled features g), `d1`, `d2`, `classifier`. `disentangle` makes it.
    """

    def __init__(self, backbone: nn.Module, linear_name: str, classifier: nn.Linear):
        super().__init__(backbone, linear_name, classifier)
        features = classifier.in_features
        self.d1 = nn.Linear(features, features, bias=False)
        self.d2 = nn.Linear(features, features, bias=False)
        for block in (self.d1, self.d2):
            nn.init.eye_(block.weight)
            block.to(classifier.weight)

    def f1(self, x: Tensor) -> Tensor:
        """The intrinsic features D1 g(x) (B,D) of images (B,3,H,W); the classifier reads them."""
        return self.d1(self.features(x))

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """A new plain classifier with the weight W·W_D1 and the same bias. It shares no memory with this model.

        The product is computed in float64. The state dict loads with strict=True into the original architecture.
        """
        return self._whole(self.classifier.weight.double() @ self.d1.weight.double())

    @torch.no_grad()
    def merge_confused(self) -> nn.Module:
        """A new plain classifier with the weight W·W_D2, which predicts from the confused features f2 (Table 4)."""
        return self._whole(self.classifier.weight.double() @ self.d2.weight.double())


def disentangle(net: nn.Module, *, classifier: str | None = None, example: Tensor | None = None) -> Disentangled:
    """Put D1 and D2 (D x D, no bias, identity) before the last linear layer of a copy of `net`.

    net: any classifier whose output is that of one nn.Linear, such as those of `fastafd.models`, torchvision and timm;
    DataParallel, DistributedDataParallel and torch.compile around it are taken off. classifier: the name of that layer.
    example: images (B,3,H,W) to find it by, where torch.fx cannot trace `net`, and to compare both networks on. Without
    them they are compared at the first batch of a step.
    The copy keeps the mode of each layer; if `net` itself is in eval mode, the whole copy is in train mode.
    Raises ValueError, which names the layer and the reason, if something else computes the output.
    Source: the AFD paper, Eq. 1; the start as the identity is that of the released code.
    """
    return split(net, Disentangled, classifier=classifier, example=example)
