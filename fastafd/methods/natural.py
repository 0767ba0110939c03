"""Natural training: the cross-entropy on clean images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fastafd.methods.base import Loss, cross_entropy


@dataclass(frozen=True)
class Natural:
    label: ClassVar[str] = "natural"
    adversarial: ClassVar[bool] = False
    uses_teacher: ClassVar[bool] = False
    disentangled: ClassVar[bool] = False

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, teacher_features: Tensor | None) -> Loss:
        return cross_entropy(model(x), y)
