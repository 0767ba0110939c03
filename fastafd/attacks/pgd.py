"""Projected gradient descent on the cross-entropy (Madry et al., arXiv 1706.06083): Eq. 2 of the AFD paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastafd.attacks.threat import Ball, linf_noise
from fastafd.kernels.linf_step import linf_step_reference
from fastafd.settings import number, pixels, setting, switch


@dataclass(frozen=True)
class PGD(Ball):
    """An l-infinity PGD attack; call it with a classifier and a batch. `eps` and `step_size` also take "8/255"."""

    step_size: float = setting(2 / 255, "length of one step, in pixels of [0,1]; a fraction such as 2/255 too", pixels)
    steps: int = setting(10, "number of gradient steps", number(0, whole=True))
    random_start: bool = setting(True, "start at a random point of the ball rather than at the image", switch)

    def __call__(
        self,
        classifier: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Attack the images; returns x_adv (B,3,H,W), inside the eps-ball around x and inside [0,1].

        - classifier: maps (B,3,H,W) to logits (B,C); the caller sets its train or eval mode.
        - x: (B,3,H,W) in [0,1]. y: (B,) int64.
        - generator: draws the start; it is on x's device.

        Only the gradient of the input is computed, none of a weight. The attack is plain PyTorch, on CUDA too: no
        kernel of fastafd runs.
        """
        return self.climb(self.ascent(classifier, x, y), x, self.draw(x, generator))

    def ascent(self, classifier: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        """A function that gives the gradient to climb at x_adv, a leaf that requires grad.

        That of the cross-entropy.
        """
        return lambda x_adv: input_gradient(classifier, x_adv, y)

    def target(self, logits: Callable[[], Tensor], y: Tensor) -> Tensor:
        """The target whose cross-entropy a `Snapshot` climbs: the labels. logits(): those of the clean images (B,C)."""
        return y

    def draw(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor | None:
        """The start noise, with the shape, type, memory format and device of `like`; None without a random start."""
        return linf_noise(like, self.eps, generator) if self.random_start else None

    def climb(
        self,
        gradient: Callable[[Tensor], Tensor],
        x: Tensor,
        noise: Tensor | None,
        step: Callable[[Tensor, Tensor, Tensor, float, float], object] = linf_step_reference,
    ) -> Tensor:
        """x_adv after all steps from the start x + noise (from x if noise is None).

        gradient: maps x_adv, a leaf that requires grad, to the direction to climb, (B,3,H,W). step: `linf_step`; in
        plain PyTorch unless the caller passes the operation with the kernel.
        """
        x = x.detach()
        x_adv = x.clone() if noise is None else x + noise  # not clipped to [0,1], as in the released code
        for _ in range(self.steps):
            grad = gradient(x_adv.requires_grad_())
            x_adv = x_adv.detach()
            step(x_adv, grad, x, self.eps, self.step_size)
        return x_adv if self.steps else x_adv.clamp(0.0, 1.0)  # a step ends inside [0,1]


def input_gradient(classifier: Callable[[Tensor], Tensor], x_adv: Tensor, y: Tensor) -> Tensor:
    """The gradient of the summed cross-entropy with respect to the leaf x_adv. Only its signs count, so no mean."""
    with torch.enable_grad():
        logits = classifier(x_adv)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x_adv)
    return grad
