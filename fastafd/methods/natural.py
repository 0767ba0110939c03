"""Natural training: the cross-entropy on clean images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fastafd.methods.base import Batch, Loss, Method, cross_entropy


@dataclass(frozen=True)
class Natural(Method):
    label: ClassVar[str] = "natural"
    begins: ClassVar[str] = "scratch"
    adversarial: ClassVar[bool] = False

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return cross_entropy(model(batch.x), batch.y)
