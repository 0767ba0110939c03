"""Projected gradient descent on the cross-entropy (Madry et al., arXiv 1706.06083): Eq. 2 of the AFD paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastafd.attacks.threat import linf_start
from fastafd.kernels import linf_step
from fastafd.settings import check, number, pixels, setting, switch


@dataclass(frozen=True)
class PGD:
    """An l-infinity PGD attack; call it with a classifier and a batch. `eps` and `step_size` also take "8/255"."""

    eps: float = setting(
        8 / 255, "radius of the l-infinity ball, in pixels of [0,1]; a fraction such as 8/255 too", pixels
    )
    step_size: float = setting(2 / 255, "length of one step, in pixels of [0,1]; a fraction such as 2/255 too", pixels)
    steps: int = setting(10, "number of gradient steps", number(0, whole=True))
    random_start: bool = setting(True, "start at a uniform point of the ball rather than at the image", switch)

    def __post_init__(self) -> None:
        check(self)

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
        Only the gradient of the input is formed, none of a weight, and nothing but x_adv is kept.
        """
        x = x.detach()
        x_adv = linf_start(x, self.eps, generator) if self.random_start else x.clone()
        for _ in range(self.steps):
            x_adv.requires_grad_()
            with torch.enable_grad():
                logits = classifier(x_adv)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                loss = F.cross_entropy(logits, y, reduction="sum")  # the sum: only the gradient's signs count
                (grad,) = torch.autograd.grad(loss, x_adv)
            x_adv = linf_step(x_adv.detach(), grad, x, self.eps, self.step_size)
        return x_adv.clamp(0.0, 1.0).detach()
