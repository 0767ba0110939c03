"""The optimizer, what the fast engine asks of it, and the learning rate as a pure function of the step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> bool:
    """`optimizer.load_state_dict(state)`, written into the tensors that the optimizer has, as CUDA graphs need it.

    Returns whether all tensors are the same ones as before and all settings but the learning rates are equal, so that
    what was recorded before holds.
    """
    tensors = {p: dict(values) for p, values in optimizer.state.items()}
    settings = _settings(optimizer)
    optimizer.load_state_dict(state)
    same = settings == _settings(optimizer) and tensors.keys() == optimizer.state.keys()
    for p, values in optimizer.state.items():
        before = tensors.get(p, {})
        same &= before.keys() == values.keys()
        for name, value in values.items():
            old = before.get(name)
            if isinstance(value, Tensor) and isinstance(old, Tensor) and old.shape == value.shape:
                values[name] = old.copy_(value)
            else:
                same &= old is value is None
    return same


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Of each group, but for the rate and for what `fuse` sets."""
    aside = ("params", "lr", "fused", "foreach")
    return [{name: value for name, value in group.items() if name not in aside} for group in optimizer.param_groups]


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Let SGD update all weights in one launch, one that can read its rate from the device; others are left alone."""
    if type(optimizer) is not torch.optim.SGD:
        return
    for group in optimizer.param_groups:
        group |= {"fused": True, "foreach": False}
        if group["momentum"] and not group["dampening"]:
            # Zeros now are what the first update would make; one that fp16 skips would leave them unset.
            for p in group["params"]:
                if p.requires_grad and optimizer.state[p].get("momentum_buffer") is None:
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    optimizer._step_supports_amp_scaling = True


def to_channels_last(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Put weights, and what the optimizer keeps of them, into channels_last, in place; whether any was not."""
    if all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.dim() == 4):
        return False
    model.to(memory_format=torch.channels_last)
    for p, kept in optimizer.state.items():
        for name, value in kept.items():
            if p.dim() == 4 and isinstance(value, torch.Tensor) and value.shape == p.shape:
                kept[name] = value.contiguous(memory_format=torch.channels_last)
    return True


def needs_host(optimizer: torch.optim.Optimizer, scaled: bool) -> str:
    """What every step of the optimizer needs the host for, so that no CUDA graph can hold it; or nothing.

    scaled: whether its gradients are (fp16).
    """
    if not all(group.get("capturable", group.get("fused")) for group in optimizer.param_groups):
        return "reads its rate on the host; take SGD, or capturable=True"
    if scaled and not getattr(optimizer, "_step_supports_amp_scaling", False):
        return "asks the host whether fp16 overflowed; take SGD, or fused=True"
    return ""
