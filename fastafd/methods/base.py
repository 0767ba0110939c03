"""What a method is: frozen hyper-parameters and a loss."""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor, nn


class Loss(NamedTuple):
    """`total` is differentiable; `terms` are detached scalars by name; `logits` (B,C) of the trained path, detached."""

    total: Tensor
    terms: dict[str, Tensor]
    logits: Tensor


class Method(Protocol):
    """A frozen dataclass of hyper-parameters with these two facts and one function."""

    adversarial: ClassVar[bool]  # trains on attacked images
    uses_teacher: ClassVar[bool]  # needs the frozen natural model's features of the clean images

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, teacher_features: Tensor | None) -> Loss:
        """x (B,3,H,W): the attacked images of an adversarial method, else the clean ones; y (B,) int64."""
        ...
