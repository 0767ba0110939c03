"""ARREST: AFKD with noisy replay (Suzuki et al., ICCV 2023, arXiv 2308.16454), as the AFD authors' ARREST.py has it.

In the first epochs, a batch gets uniform noise instead of the attack if the student's features of the clean images have
turned away from the teacher's by the angle or more: 1 - mean cos(g_P(x), g(x)) >= 1 - cos(angle), the student in eval
mode. Every batch is attacked, and then one of the two is taken, so that nothing waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastafd.methods.afkd import AFKD, distance
from fastafd.methods.base import Batch
from fastafd.settings import number, setting


@dataclass(frozen=True)
class ARREST(AFKD):
    """AFKD, with noise instead of the attack in some batches of the first epochs."""

    label: ClassVar[str] = "ARREST"
    replays_noise: ClassVar[bool] = True

    replay_angle: float = setting(
        30.0, "degrees between the features and the teacher's from which on a batch gets noise", number(0, 180)
    )
    replay_epochs: int = setting(
        10, "first epochs, in which a batch may get noise instead of the attack", number(0, whole=True)
    )

    def replay(self, batch: Batch, noise: Tensor, features: Tensor, epoch: Tensor) -> Tensor:
        assert batch.teacher_features is not None
        turned = distance(batch.teacher_features, features) >= 1 - math.cos(math.radians(self.replay_angle))
        return torch.where(turned & (epoch <= self.replay_epochs), (batch.x + noise).clamp(0.0, 1.0), batch.x_adv)
