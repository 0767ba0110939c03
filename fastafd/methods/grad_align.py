"""FGSM with gradient alignment (Andriushchenko and Flammarion, arXiv 2007.02617).

    CE(h(x + delta), y) + weight (1 - mean cos(grad CE(x), grad CE(x + eta)))

delta is one step from x along the gradient's sign; eta is uniform noise. The gradient at x, from which delta is made,
is a constant; the gradient at x + eta is differentiated once more. All passes are in train mode. Read from
tml-epfl/understanding-fast-adv-training, train.py and utils.py. One difference: a batch in which no image has both
gradients gives NaN there; here it adds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastafd.methods.base import Batch, Loss, Method, attacked_cross_entropy
from fastafd.settings import check, number, setting


@dataclass(frozen=True)
class GradAlign(Method):
    """The loss of PGD-AT. The attack and the alignment are `fastafd.training.fast_at.GradAlignStep`."""

    label: ClassVar[str] = "FGSM-GA"
    begins: ClassVar[str] = "scratch"
    uses_recipe_attack: ClassVar[bool] = False
    only_reference: ClassVar[str] = "it differentiates a gradient"

    align_weight: float = setting(0.2, "lambda, weight of the misalignment of gradients (0.2 is for 8/255)", number(0))
    step_factor: float = setting(1.25, "length of the one step in units of eps, before the ball cuts it", number(0))

    def __post_init__(self) -> None:
        check(self)

    def longest_step(self, eps: float) -> float:
        return self.step_factor * eps

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return attacked_cross_entropy(model, batch)


def misalignment(u: Tensor, v: Tensor) -> Tensor:
    """The mean () of 1 - cos(u, v) over the images for which both (B,…) are non-zero; 0 if there are none."""
    u, v = u.flatten(1), v.flatten(1)
    both = (u != 0).any(1) & (v != 0).any(1)
    # A row of zeros has no gradient of its length, so its length is replaced by a constant.
    one = torch.ones((), dtype=v.dtype, device=v.device)
    lengths = torch.where(both, u.norm(dim=1), one) * torch.where(both[:, None], v, one).norm(dim=1)
    distances = torch.where(both, 1 - (u * v).sum(1) / lengths, 0.0)
    return distances.sum() / both.sum().clamp_min(1)
