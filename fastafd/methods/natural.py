"""Natural training: the cross-entropy on clean images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastafd.methods.base import Loss


@dataclass(frozen=True)
class Natural:
    adversarial: ClassVar[bool] = False
    uses_teacher: ClassVar[bool] = False

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, teacher_features: Tensor | None) -> Loss:
        logits = model(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(logits, y)
        return Loss(total, {"cross_entropy": total.detach()}, logits.detach())
