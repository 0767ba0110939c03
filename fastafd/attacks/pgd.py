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
        """x_adv inside the eps-ball around x and inside [0,1].

        classifier: (B,3,H,W) -> logits (B,C), differentiable; its mode (BatchNorm) is the caller's business.
        x: (B,3,H,W) in [0,1]; y: (B,) int64. The generator draws the start and lives on x's device.
        Only the gradient of the input is formed, none of a weight, and nothing but x_adv is kept. Plain PyTorch, on
        CUDA too: no kernel of fastafd runs.
        """
        return self.climb(self.ascent(classifier, x, y), x, self.draw(x, generator))

    def ascent(self, classifier: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        """What to climb along at x_adv, a leaf that requires grad: the gradient of the cross-entropy."""
        return lambda x_adv: input_gradient(classifier, x_adv, y)

    def target(self, logits: Callable[[], Tensor], y: Tensor) -> Tensor:
        """What a `Snapshot` climbs away from: the labels. logits: a call gives those of the clean images, (B,C)."""
        return y

    def draw(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor | None:
        """The start's distance from an image of this shape, type, memory format and device; None without one."""
        return linf_noise(like, self.eps, generator) if self.random_start else None

    def climb(
        self,
        gradient: Callable[[Tensor], Tensor],
        x: Tensor,
        noise: Tensor | None,
        step: Callable[[Tensor, Tensor, Tensor, float, float], object] = linf_step_reference,
    ) -> Tensor:
        """x_adv from the start x + noise. gradient: (B,3,H,W), a leaf that requires grad -> what to climb along.

        step: `linf_step`, in plain PyTorch unless the caller names the operation with the kernel.
        """
        x = x.detach()
        x_adv = x.clone() if noise is None else x + noise  # not clipped to [0,1], as in the released code
        for _ in range(self.steps):
            grad = gradient(x_adv.requires_grad_())
            x_adv = x_adv.detach()
            step(x_adv, grad, x, self.eps, self.step_size)
        return x_adv if self.steps else x_adv.clamp(0.0, 1.0)  # a step ends inside [0,1]


def input_gradient(classifier: Callable[[Tensor], Tensor], x_adv: Tensor, y: Tensor) -> Tensor:
    """The gradient of the summed cross-entropy with respect to x_adv, a leaf; only its signs count, so no mean."""
    with torch.enable_grad():
        logits = classifier(x_adv)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x_adv)
    return grad
