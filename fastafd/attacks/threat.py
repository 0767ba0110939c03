"""The l-infinity threat model: where an attack starts. How it steps is `fastafd.kernels.linf_step`.

Pixels are in [0,1] everywhere outside the model; eps and step sizes are in the same unit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linf_start(x: Tensor, eps: float, generator: torch.Generator | None = None) -> Tensor:
    """x plus uniform noise from [-eps, eps], in x's memory format; not clipped to [0,1], as in the released code."""
    noise = torch.empty_like(x).uniform_(-eps, eps, generator=generator)
    return x + noise
