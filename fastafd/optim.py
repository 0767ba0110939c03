"""The optimizer and the learning rate as a pure function of the step."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fastafd.models import Disentangled


def make_sgd(
    model: nn.Module, lr: float, momentum: float, weight_decay: float, d2_weight_decay: float = 0.0
) -> torch.optim.SGD:
    """SGD with one group for D2, which has its own weight decay, and one for everything else."""
    d2 = list(model.d2.parameters()) if isinstance(model, Disentangled) else []
    own = {id(p) for p in d2}
    rest = [p for p in model.parameters() if id(p) not in own and p.requires_grad]
    groups = [{"params": rest, "weight_decay": weight_decay}]
    if d2:
        groups.append({"params": d2, "weight_decay": d2_weight_decay})
    return torch.optim.SGD(groups, lr=lr, momentum=momentum)


def learning_rate(
    epoch: float, epochs: int, lr: float, schedule: tuple[tuple[float, float], ...], between: str = "steps"
) -> float:
    """The rate at `epoch` (from 0, a fraction within one) by pairs (fraction of the run, factor on lr).

    between "steps": the factor of the last pair begun when this epoch began; "lines": a straight line to the next pair.
    """
    if between == "lines":
        starts, factors = zip(*schedule, strict=True)
        return lr * float(np.interp(epoch, np.multiply(starts, epochs), factors))
    begun = [factor for start, factor in schedule if int(epoch) + 1e-9 >= start * epochs]
    return lr * begun[-1]
