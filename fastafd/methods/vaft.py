"""Vanilla adversarial fine-tuning (Jeddi, Shafiee and Wong, arXiv 2012.13628): the cross-entropy on attacked images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fastafd.methods.base import Batch, Loss, Method, attacked_cross_entropy


@dataclass(frozen=True)
class VAFT(Method):
    """PGD adversarial training that starts from a natural model. It has no hyper-parameters."""

    label: ClassVar[str] = "vAFT"

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return attacked_cross_entropy(model, batch)
