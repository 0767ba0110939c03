"""ATAS (Huang et al., arXiv 2206.02417): one step of adaptive length from the perturbation that an image had before.

Every training image i has a perturbation of its zero-padded pixels, which is cropped and flipped with the image, and a
running mean v_i of the squared length of its gradient:

    v_i <- decay v_i + (1 - decay) |grad|^2    a_i = clip(16/255 / (1 + sqrt(v_i) / c), low, high)

The gradient is that of the batch mean, in eval mode; v has no other scale. Read from HuangZhiChao95/ATAS, ATAS.py,
adv_attack.py and data_aug.py (its CIFAR branch): in the first epochs the step is eps and v stays 0; the padding is
perturbed too; the perturbation outside the crop is kept; all perturbations are drawn anew every tenth epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastafd.methods.base import Batch, Loss, Method, attacked_cross_entropy
from fastafd.settings import UsageError, check, in_255ths, number, pixels, setting


@dataclass(frozen=True)
class ATAS(Method):
    """The loss of PGD-AT. The attack is `fastafd.training.fast_at.ATASStep`."""

    label: ClassVar[str] = "ATAS"
    begins: ClassVar[str] = "scratch"
    uses_recipe_attack: ClassVar[bool] = False
    only_reference: ClassVar[str] = "it keeps a perturbation of every image"

    step_c: float = setting(0.01, "c, the length of a gradient that halves the step", number(1e-12))
    step_decay: float = setting(0.5, "beta, decay of the mean of squared gradients", number(0, 1))
    step_low: float = setting(4 / 255, "shortest step, in pixels of [0,1]", pixels)
    step_high: float = setting(14 / 255, "longest step, in pixels of [0,1]", pixels)
    warm_up: int = setting(5, "first epochs, in which the step is eps", number(0, whole=True))
    redraw_every: int = setting(10, "epochs from one new draw of all perturbations to the next", number(1, whole=True))

    def __post_init__(self) -> None:
        check(self)
        if self.step_low > self.step_high:
            low, high = in_255ths(self.step_low), in_255ths(self.step_high)
            raise UsageError(f"step_low: got {low}, takes at most step_high, {high}")

    def longest_step(self, eps: float) -> float:
        return self.step_high

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return attacked_cross_entropy(model, batch)

    def mean_square(self, v: Tensor, gradient: Tensor) -> Tensor:
        """The running means v (B,) after this batch's gradients (B,3,H,W)."""
        return self.step_decay * v + (1 - self.step_decay) * gradient.flatten(1).square().sum(1)

    def step_sizes(self, v: Tensor) -> Tensor:
        """The length of each image's step in pixels of [0,1], from its v: (B,) -> (B,1,1,1)."""
        return (2 * 8 / 255 / (1 + v.sqrt() / self.step_c)).clamp(self.step_low, self.step_high)[:, None, None, None]


def window(offsets: Tensor, flips: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices that cut the crops out of padded images (B,C,S,S).

    Image, row, column; they broadcast to (B,side,side).
    """
    along = torch.arange(side, device=offsets.device)
    rows = offsets[:, :1] + along
    columns = offsets[:, 1:] + torch.where(flips[:, None], side - 1 - along, along)
    return torch.arange(len(offsets), device=offsets.device)[:, None, None], rows[:, :, None], columns[:, None, :]
