"""The optimizer and the learning rate as a pure function of the step."""

from __future__ import annotations

import torch
from torch import nn

from fastafd.models import Disentangled


def make_sgd(
    model: nn.Module, lr: float, momentum: float, weight_decay: float, d2_weight_decay: float = 0.0
) -> torch.optim.SGD:
    """SGD with one group for D2, which has its own weight decay, and one for everything else."""
    d2 = list(model.d2.parameters()) if isinstance(model, Disentangled) else []
    own = {id(p) for p in d2}
    groups = [{"params": [p for p in model.parameters() if id(p) not in own], "weight_decay": weight_decay}]
    if d2:
        groups.append({"params": d2, "weight_decay": d2_weight_decay})
    return torch.optim.SGD(groups, lr=lr, momentum=momentum)


def learning_rate(epoch: int, epochs: int, lr: float, schedule: tuple[tuple[float, float], ...]) -> float:
    """The rate in `epoch` (from 0): lr times the factor of the last pair (fraction of the run, factor) begun."""
    begun = [factor for start, factor in schedule if epoch + 1e-9 >= start * epochs]
    return lr * begun[-1]
