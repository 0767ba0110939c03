"""The l-infinity threat model: where an attack starts. How it steps is `fastafd.kernels.linf_step`.

Pixels are in [0,1] everywhere outside the model; eps and step sizes are in the same unit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linf_noise(like: Tensor, eps: float, generator: torch.Generator | None = None) -> Tensor:
    """Uniform noise from [-eps, eps] of `like`'s shape, type and memory format."""
    return torch.empty_like(like).uniform_(-eps, eps, generator=generator)
