"""The attack of TRADES (Zhang et al., arXiv 1901.08573): PGD on the divergence from the clean prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
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
        """The clean prediction p(x) (B,K): the divergence and the cross-entropy with p(x) have the same gradient."""
        with torch.no_grad():
            clean = logits()
        return clean.to(torch.promote_types(clean.dtype, torch.float32)).softmax(1)
