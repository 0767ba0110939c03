"""Free adversarial training (Shafahi et al., arXiv 1904.12843): every batch several times, one backward for both.

Each pass trains on x + delta and moves the weights and delta by the gradients of one backward; delta is kept from pass
to pass and from batch to batch. Read from locuslab/fast_adversarial, CIFAR10/train_free.py: x + delta is not clipped to
[0,1] (in a batch's first pass delta is still the last batch's), everything is in train mode, delta begins as zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastafd.methods.pgd_at import PGDAT
from fastafd.settings import check, number, setting


@dataclass(frozen=True)
class FreeAT(PGDAT):
    label: ClassVar[str] = "Free-AT"
    attacks: ClassVar[bool] = False
    only_reference: ClassVar[str] = "its perturbation outlives the batch"

    replays: int = setting(8, "passes over each batch", number(1, whole=True))

    def __post_init__(self) -> None:
        check(self)

    @staticmethod
    def moved(delta: Tensor, gradient: Tensor, x: Tensor, eps: float) -> Tensor:
        """delta one step of eps up the gradient, back into the eps-ball, then x + delta into [0,1]."""
        return (delta + eps * gradient.sign()).clamp(-eps, eps).clamp(-x, 1 - x)
