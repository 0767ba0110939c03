"""What a method is: frozen hyper-parameters and a loss."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Batch(NamedTuple):
    """x (B,3,H,W): the clean images as they were augmented; x_adv: the attacked ones (x where a method attacks none).

    y (B,) int64. teacher_features (B,D): the frozen natural model's features of x, for a method that `uses_teacher`.
    """

    x: Tensor
    x_adv: Tensor
    y: Tensor
    teacher_features: Tensor | None = None


class Loss(NamedTuple):
    """`total` is differentiable; `terms` are detached scalars by name; `logits` (B,C) of the trained path, detached."""

    total: Tensor
    terms: dict[str, Tensor]
    logits: Tensor


class Method:
    """The base of every method: a frozen dataclass of hyper-parameters, these facts and one function."""

    label: ClassVar[str]  # what tables call a model that it trained
    begins: ClassVar[str] = "natural"  # with which weights: "natural", "scratch", or "robust" (adversarially trained)
    adversarial: ClassVar[bool] = True  # trains on attacked images
    attacks: ClassVar[bool] = True  # by the attack of its recipe; else it perturbs images in a way of its own
    uses_teacher: ClassVar[bool] = False  # needs the frozen natural model's features of the clean images
    disentangled: ClassVar[bool] = False  # trains fastafd.disentangle(net), the others fastafd.models.split(net)
    replays_noise: ClassVar[bool] = False  # some batches get noise in the place of the attack: `replay` says which
    only_reference: ClassVar[str] = ""  # why the fast engine does not run it, if it does not

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The model is in train mode (BatchNorm)."""
        raise NotImplementedError

    def replay(self, batch: Batch, noise: Tensor, features: Tensor, epoch: Tensor) -> Tensor:
        """The images to train on: batch.x_adv or others. features (B,D): of x, in eval mode; epoch: () from 1."""
        raise NotImplementedError


def cross_entropy(logits: Tensor, y: Tensor) -> Loss:
    """The mean cross-entropy of (B,C) logits and (B,) int64 labels, in fp32 at least, as a method's whole loss."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, y)
    return Loss(total, {"cross_entropy": total.detach()}, logits.detach())
