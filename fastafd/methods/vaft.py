"""Vanilla adversarial fine-tuning (Jeddi, Shafiee and Wong, arXiv 2012.13628): the cross-entropy on attacked images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fastafd.methods.base import Loss, cross_entropy


@dataclass(frozen=True)
class VAFT:
    """PGD adversarial training that begins with a natural model. It has no hyper-parameters of its own."""

    label: ClassVar[str] = "vAFT"
    adversarial: ClassVar[bool] = True
    uses_teacher: ClassVar[bool] = False
    disentangled: ClassVar[bool] = False

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, teacher_features: Tensor | None) -> Loss:
        return cross_entropy(model(x), y)
