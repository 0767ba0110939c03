"""What a method is: frozen hyper-parameters, a few facts, and a loss."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Batch(NamedTuple):
    """The tensors that a loss is computed from.

    x (B,3,H,W): the clean images after augmentation, in [0,1]. x_adv (B,3,H,W): the attacked images; equal to x for a
    method that attacks none. y (B,): int64 labels. teacher_features (B,D): the frozen natural model's features of x;
    None unless the method has `uses_teacher`.
    """

    x: Tensor
    x_adv: Tensor
    y: Tensor
    teacher_features: Tensor | None = None


class Loss(NamedTuple):
    """What a loss function returns.

    total (): differentiable. terms: the parts of the total by name, detached (). logits (B,C): the model's output for
    the images that it trains on, detached.
    """

    total: Tensor
    terms: dict[str, Tensor]
    logits: Tensor


class Method:
    """Base class of all methods: a frozen dataclass of hyper-parameters, the facts below, and `loss`.

    label: the method's name in tables.
    begins: the weights that training starts from: "natural" (a naturally trained model), "scratch" (fresh weights) or
        "robust" (an adversarially trained model).
    adversarial: True if it trains on attacked images, False if on clean ones.
    uses_recipe_attack: True if the recipe's attack makes those images, False if the method's step makes them itself.
    uses_teacher: True if the loss reads the frozen natural model's features of the clean images.
    disentangled: True if it trains `fastafd.disentangle(net)`, False if it trains `fastafd.models.split(net)`.
    replays_noise: True if some batches get the attack's start noise instead of the attack; `replay` decides which.
    only_reference: why the fast engine cannot run the method; empty if it can.
    held_out: how many training images are kept out of the training, for choices; 0 for most methods.
    """

    label: ClassVar[str]
    begins: ClassVar[str] = "natural"
    adversarial: ClassVar[bool] = True
    uses_recipe_attack: ClassVar[bool] = True
    uses_teacher: ClassVar[bool] = False
    disentangled: ClassVar[bool] = False
    replays_noise: ClassVar[bool] = False
    only_reference: ClassVar[str] = ""
    held_out: int = 0

    def longest_step(self, eps: float) -> float | None:
        """The longest step, in pixels of [0,1], of a method that attacks in one step itself; None if that is eps."""
        return None

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The loss of a batch. The model is in train mode (BatchNorm)."""
        raise NotImplementedError

    def replay(self, batch: Batch, noise: Tensor, features: Tensor, epoch: Tensor) -> Tensor:
        """The images to train on: `batch.x_adv`, or clean images with noise.

        noise (B,3,H,W): the attack's start. features (B,D): the student's features of x in eval mode. epoch (): int64,
        counted from 1.
        """
        raise NotImplementedError


def cross_entropy(logits: Tensor, y: Tensor) -> Loss:
    """The mean cross-entropy of logits (B,C) and labels (B,), computed in fp32 or wider, as the whole loss."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, y)
    return Loss(total, {"cross_entropy": total.detach()}, logits.detach())


def attacked_cross_entropy(model: nn.Module, batch: Batch) -> Loss:
    """The mean cross-entropy on the attacked images: the loss of plain adversarial training."""
    return cross_entropy(model(batch.x_adv), batch.y)


def clean_cross_entropy(model: nn.Module, batch: Batch) -> Loss:
    """The mean cross-entropy on the clean images: the loss of natural training."""
    return cross_entropy(model(batch.x), batch.y)
