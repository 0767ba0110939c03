"""Free adversarial training (Shafahi et al., arXiv 1904.12843): each batch several times, one backward pass for both.

Each pass trains on x + delta. One backward pass gives the gradients of the weights and of delta, and both move. delta
is kept from pass to pass and from batch to batch. Read from locuslab/fast_adversarial, CIFAR10/train_free.py: x + delta
is not clipped to [0,1] (in the first pass of a batch, delta still belongs to the last batch), everything is in train
mode, delta starts as zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fastafd.methods.base import Batch, Loss, Method, attacked_cross_entropy
from fastafd.settings import check, number, setting


@dataclass(frozen=True)
class FreeAT(Method):
    """The loss of PGD-AT. The attack is `fastafd.training.fast_at.FreeStep`."""

    label: ClassVar[str] = "Free-AT"
    begins: ClassVar[str] = "scratch"
    uses_recipe_attack: ClassVar[bool] = False
    only_reference: ClassVar[str] = "its perturbation is kept from batch to batch"

    replays: int = setting(8, "passes over each batch", number(1, whole=True))

    def __post_init__(self) -> None:
        check(self)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return attacked_cross_entropy(model, batch)

    @staticmethod
    def moved(delta: Tensor, gradient: Tensor, x: Tensor, eps: float) -> Tensor:
        """delta (B,3,H,W) after a step of eps along the gradient's sign, in the ball, with x + delta in [0,1]."""
        return (delta + eps * gradient.sign()).clamp(-eps, eps).clamp(-x, 1 - x)
