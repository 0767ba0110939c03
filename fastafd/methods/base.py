"""What a method is: frozen hyper-parameters and a loss."""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Loss(NamedTuple):
    """`total` is differentiable; `terms` are detached scalars by name; `logits` (B,C) of the trained path, detached."""

    total: Tensor
    terms: dict[str, Tensor]
    logits: Tensor


class Method(Protocol):
    """A frozen dataclass of hyper-parameters with these facts and one function."""

    label: ClassVar[str]  # what tables call a model that it trained
    adversarial: ClassVar[bool]  # trains on attacked images
    uses_teacher: ClassVar[bool]  # needs the frozen natural model's features of the clean images
    disentangled: ClassVar[bool]  # trains fastafd.disentangle(net), the others fastafd.models.split(net)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, teacher_features: Tensor | None) -> Loss:
        """x (B,3,H,W): the attacked images of an adversarial method, else the clean ones; y (B,) int64."""
        ...


def cross_entropy(logits: Tensor, y: Tensor) -> Loss:
    """The mean cross-entropy of (B,C) logits and (B,) int64 labels, in fp32 at least, as a method's whole loss."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, y)
    return Loss(total, {"cross_entropy": total.detach()}, logits.detach())
