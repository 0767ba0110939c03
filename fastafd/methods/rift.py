"""RiFT (Zhu et al., ICCV 2023, arXiv 2308.02533): clean fine-tuning of the one module that robustness needs least.

Its three parts are in `fastafd.training.rift`: the criticality of each module, the fine-tuning, and the mixture of both
models' weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fastafd.methods.base import Batch, Loss, Method, clean_cross_entropy
from fastafd.settings import check, number, setting


@dataclass(frozen=True)
class RiFT(Method):
    """The loss of natural training, for one module of a robust model."""

    label: ClassVar[str] = "RiFT"
    begins: ClassVar[str] = "robust"
    adversarial: ClassVar[bool] = False

    held_out: int = setting(
        1000, "training images, class-balanced, that choose module and mixture", number(1, whole=True)
    )
    radius: float = setting(0.1, "how far a module's weight is moved, in units of its length", number(0))
    climbs: int = setting(10, "epochs of that move, each a pass over the held-out images", number(1, whole=True))
    robust_drop: float = setting(0.1, "per cent of robust accuracy that the mixture may cost", number(0, 100))

    def __post_init__(self) -> None:
        check(self)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return clean_cross_entropy(model, batch)
