"""PGD adversarial training (Madry et al., arXiv 1706.06083): cross-entropy on attacked images, from fresh weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fastafd.methods.base import Batch, Loss, Method, attacked_cross_entropy


@dataclass(frozen=True)
class PGDAT(Method):
    """PGD adversarial training. It has no hyper-parameters."""

    label: ClassVar[str] = "PGD-AT"
    begins: ClassVar[str] = "scratch"

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return attacked_cross_entropy(model, batch)
