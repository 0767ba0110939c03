"""The SGD optimizer, its preparation for the fast engine and for CUDA graphs, and the learning rate schedule."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastafd.models import Disentangled


def make_sgd(
    model: nn.Module, lr: float, momentum: float, weight_decay: float, d2_weight_decay: float = 0.0
) -> torch.optim.SGD:
    """An SGD optimizer with two parameter groups: D2 with `d2_weight_decay`, all other trained weights with the rest.

    model: `fastafd.disentangle(net)`; any other module has no D2, and one group. The recipe `released` takes lr 0.025,
    momentum 0.9, weight decay 1e-3 and d2_weight_decay 5e-4.
    """
    d2 = list(model.d2.parameters()) if isinstance(model, Disentangled) else []
    in_d2 = {id(p) for p in d2}
    rest = [p for p in model.parameters() if id(p) not in in_d2 and p.requires_grad]
    groups = [{"params": rest, "weight_decay": weight_decay}]
    if d2:
        groups.append({"params": d2, "weight_decay": d2_weight_decay})
    return torch.optim.SGD(groups, lr=lr, momentum=momentum)


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Compare the optimizer's weights with the model's; returns lines about weights that will not train.

    Raises ValueError if the optimizer lacks a weight of the model that requires a gradient, if no weight except D1 and
    D2 requires one, and if the optimizer evaluates the loss itself, as LBFGS does.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} evaluates the loss several times a step, and a step has one loss; take SGD,"
            " AdamW or another optimizer whose step() needs no closure"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    weights = dict(model.named_parameters())
    trained = {name: p for name, p in weights.items() if p.requires_grad}
    missing = [name for name, p in trained.items() if id(p) not in held]
    frozen = [name for name in weights if name not in trained]
    if not set(trained) - {"d1.weight", "d2.weight"}:
        which = "only D1 and D2 require" if trained else "no weight of the model requires"
        raise ValueError(f"{which} a gradient: {listed(frozen)} are frozen; call model.requires_grad_() first")
    if missing:
        why = "it was made over another network" if len(missing) == len(trained) else "it was made over a part"
        raise ValueError(
            f"the optimizer lacks {len(missing)} of the model's {len(trained)} trainable weights: {listed(missing)};"
            f" {why}. Make it over model.parameters(), and freeze what shall not train with requires_grad_(False)"
        )
    lines = []
    if frozen:
        lines.append(f"{len(frozen)} of {len(weights)} weights are frozen (requires_grad False): {listed(frozen)}")
    others = held - {id(p) for p in weights.values()}
    if others:
        lines.append(f"the optimizer also holds {len(others)} weights that are not the model's; this step trains none")
    return lines


def listed(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def learning_rate(
    epoch: float, epochs: int, lr: float, schedule: tuple[tuple[float, float], ...], between: str = "steps"
) -> float:
    """The learning rate at `epoch`, which counts from 0 and has a fraction within an epoch.

    schedule: pairs (fraction of the run, factor on lr). between: with "steps", an epoch keeps the factor of the last
    pair at or before its start; with "lines", the factor goes in a straight line from each pair to the next.
    """
    if between == "lines":
        starts, factors = zip(*schedule, strict=True)
        return lr * float(np.interp(epoch, np.multiply(starts, epochs), factors))
    reached = [factor for start, factor in schedule if int(epoch) + 1e-9 >= start * epochs]
    return lr * reached[-1]


@torch.no_grad()
def align_state(optimizer: torch.optim.Optimizer) -> bool:
    """Put every tensor of the optimizer's state into the memory layout of its weight. True if one was not in it.

    PyTorch's fused SGD and Adam read weight, gradient and state by their places in memory, whatever their strides are.
    """
    moved = False
    for p, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                aligned = torch.empty_like(p, dtype=value.dtype)
                if aligned.stride() != value.stride():
                    values[name] = aligned.copy_(value)
                    moved = True
    return moved


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> bool:
    """Load a state into the tensors that the optimizer already has, because recorded CUDA graphs use those tensors.

    Returns True if the recordings stay valid: all tensors are the same objects as before, and all settings except the
    learning rates are equal. Returns False if the step must be recorded anew.
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
    """The settings of each parameter group, without the learning rate and without those that `fuse` sets."""
    ignored = ("params", "lr", "fused", "foreach")
    return [{name: value for name, value in group.items() if name not in ignored} for group in optimizer.param_groups]


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Let SGD update all weights in one launch, which can read its rate from the device.

    Other optimizers stay as they are.
    """
    if type(optimizer) is not torch.optim.SGD:
        return
    for group in optimizer.param_groups:
        group |= {"fused": True, "foreach": False}
        if group["momentum"] and not group["dampening"]:
            # The first update would start from zeros too, but fp16 may skip it, and then the buffer would stay unset.
            for p in group["params"]:
                if p.requires_grad and optimizer.state[p].get("momentum_buffer") is None:
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    optimizer._step_supports_amp_scaling = True


def to_channels_last(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Put the weights and the optimizer's state into channels_last, in place.

    True if any weight was not in it before.
    """
    if all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.dim() == 4):
        return False
    model.to(memory_format=torch.channels_last)
    align_state(optimizer)
    return True


def needs_host(optimizer: torch.optim.Optimizer, scaled: bool) -> str:
    """Why this optimizer cannot be captured in a CUDA graph; empty if it can.

    scaled: True if a GradScaler scales the gradients (fp16).
    """
    if not all(group.get("capturable", group.get("fused")) for group in optimizer.param_groups):
        return "reads its rate on the host; take SGD, or capturable=True"
    if scaled and not getattr(optimizer, "_step_supports_amp_scaling", False):
        return "asks the host whether fp16 overflowed; take SGD, or fused=True"
    return ""
