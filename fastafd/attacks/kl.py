"""The attack of TRADES (Zhang et al., arXiv 1901.08573): PGD on the divergence from the clean prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastafd.attacks.pgd import PGD

START = 0.001  # standard deviation of the start noise, in pixels of [0,1]


@dataclass(frozen=True)
class KLPGD(PGD):
    """An l-infinity attack that climbs KL(p(x) || p(x_adv)) from x + 0.001 N(0,1). It does not use labels."""

    def draw(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor | None:
        if not self.random_start:
            return None
        return torch.empty_like(like).normal_(0.0, START, generator=generator)

    def target(self, logits: Callable[[], Tensor], y: Tensor) -> Tensor:
        """The clean prediction p(x) (B,C): the divergence and the cross-entropy with p(x) have the same gradient."""
        return logits().softmax(1)

    def ascent(self, classifier: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        with torch.no_grad():
            clean = classifier(x)
            clean = clean.to(torch.promote_types(clean.dtype, torch.float32)).log_softmax(1)

        def gradient(x_adv: Tensor) -> Tensor:
            with torch.enable_grad():
                logits = classifier(x_adv)
                attacked = logits.to(clean.dtype).log_softmax(1)
                divergence = F.kl_div(attacked, clean, reduction="sum", log_target=True)
                (grad,) = torch.autograd.grad(divergence, x_adv)
            return grad

        return gradient
