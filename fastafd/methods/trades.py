"""TRADES (Zhang et al., arXiv 1901.08573): CE(h(x), y) + beta KL(p(x) || p(x')), x' from the attack on the KL.

The clean and the attacked images go through the model in two passes in train mode, each with its own batch statistics.
The released code passes the clean images a second time for the KL's p(x). The value and the gradient are the same, but
BatchNorm's running statistics move once more there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fastafd.kernels import kl_loss
from fastafd.methods.base import Batch, Loss, Method, cross_entropy
from fastafd.settings import check, number, setting


@dataclass(frozen=True)
class TRADES(Method):
    """The cross-entropy on clean images, and the divergence of the attacked predictions from the clean ones."""

    label: ClassVar[str] = "TRADES"
    begins: ClassVar[str] = "scratch"

    kl_weight: float = setting(6.0, "beta, weight of the divergence between clean and attacked predictions", number(0))

    def __post_init__(self) -> None:
        check(self)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        clean, attacked = model(batch.x), model(batch.x_adv)
        classification = cross_entropy(clean, batch.y)
        divergence = kl_loss(attacked, clean)
        terms = classification.terms | {"divergence": divergence.detach()}
        return Loss(classification.total + self.kl_weight * divergence, terms, attacked.detach())
