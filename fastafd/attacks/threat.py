"""The l-infinity threat model: where an attack starts, how it steps, and what it may not leave.

Pixels are in [0,1] everywhere outside the model; eps and step sizes are in the same unit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linf_start(x: Tensor, eps: float, generator: torch.Generator | None = None) -> Tensor:
    """x plus uniform noise from [-eps, eps], in x's memory format; not clipped to [0,1], as in the released code."""
    noise = torch.empty_like(x).uniform_(-eps, eps, generator=generator)
    return x + noise


def linf_step(x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, step_size: float) -> Tensor:
    """One ascent step along sign(grad), back into the eps-ball around x and then into [0,1]. All (B,3,H,W)."""
    stepped = x_adv + step_size * grad.sign()
    return torch.clamp(torch.clamp(stepped, x - eps, x + eps), 0.0, 1.0)
