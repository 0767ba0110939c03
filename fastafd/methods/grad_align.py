"""FGSM with gradient alignment (Andriushchenko and Flammarion, arXiv 2007.02617).

    CE(h(x + delta), y) + weight (1 - mean cos(grad CE(x), grad CE(x + eta))),  delta by one step from x, eta uniform

The gradient at x is the one that delta comes from, a constant; the one at x + eta is differentiated once more. All in
train mode. Read from tml-epfl/understanding-fast-adv-training, train.py and utils.py; there a batch in which no sample
has two gradients gives NaN, here nothing is added for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastafd.methods.pgd_at import PGDAT
from fastafd.settings import check, number, setting


@dataclass(frozen=True)
class GradAlign(PGDAT):
    label: ClassVar[str] = "FGSM-GA"
    attacks: ClassVar[bool] = False
    only_reference: ClassVar[str] = "it differentiates a gradient"

    align_weight: float = setting(0.2, "lambda, weight of the misalignment of gradients (0.2 is for 8/255)", number(0))
    step_factor: float = setting(1.25, "length of the one step in units of eps, before the ball cuts it", number(0))

    def __post_init__(self) -> None:
        check(self)


def misalignment(u: Tensor, v: Tensor) -> Tensor:
    """The mean of 1 - cos over the samples of which neither is zero, 0 where there are none: (B,…), (B,…) -> ()."""
    u, v = u.flatten(1), v.flatten(1)
    both = (u != 0).any(1) & (v != 0).any(1)
    # Without a gradient of its own for zero rows, whose length has none.
    one = torch.ones((), dtype=v.dtype, device=v.device)
    lengths = torch.where(both, u.norm(dim=1), one) * torch.where(both[:, None], v, one).norm(dim=1)
    distances = torch.where(both, 1 - (u * v).sum(1) / lengths, 0.0)
    return distances.sum() / both.sum().clamp_min(1)
