"""The l-infinity threat model: the ball and the start noise. `fastafd.kernels.linf_step` has the steps.

Pixels are in [0,1] everywhere outside the model; eps and step sizes are in the same unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastafd.settings import check, pixels, setting


@dataclass(frozen=True)
class Ball:
    """The l-infinity ball alone, for a method that makes its attacked images itself."""

    eps: float = setting(
        8 / 255, "radius of the l-infinity ball, in pixels of [0,1]; a fraction such as 8/255 too", pixels
    )

    def __post_init__(self) -> None:
        check(self)


def linf_noise(like: Tensor, eps: float, generator: torch.Generator | None = None) -> Tensor:
    """Uniform noise from [-eps, eps] of `like`'s shape, type and memory format."""
    return torch.empty_like(like).uniform_(-eps, eps, generator=generator)
