"""Natural training: the cross-entropy on clean images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fastafd.methods.base import Batch, Loss, Method, clean_cross_entropy


@dataclass(frozen=True)
class Natural(Method):
    """Training on clean images from fresh weights. It has no hyper-parameters."""

    label: ClassVar[str] = "natural"
    begins: ClassVar[str] = "scratch"
    adversarial: ClassVar[bool] = False

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return clean_cross_entropy(model, batch)
