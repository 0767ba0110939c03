"""The exponential moving average of a model's weights and of BatchNorm's running statistics."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def ema_decay(t: int, limit: float) -> float:
    """The decay of update t, counted from 0: min(limit, (1+t)/(10+t)). Source: the released AFD code."""
    return min(limit, (1 + t) / (10 + t))


def named_tensors(net: nn.Module) -> dict[str, Tensor]:
    """The network's parameters and buffers, each once."""
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def tensors_held(net: nn.Module) -> list[Any]:
    """Which modules, parameters and buffers a network holds, and their names: cheaper than `named_tensors`."""
    held: list[Any] = []
    for module in net.modules():
        for part in (module._modules, module._parameters, module._buffers):
            held += part.keys()
            held += map(id, part.values())
    return held


def copied_now(net: nn.Module) -> Any:
    """A copy of the network; of a result that it keeps, such as its last features, the values alone are copied."""
    results = [
        value
        for module in net.modules()
        for value in (*vars(module).values(), *module._buffers.values())
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    return copy.deepcopy(net, {id(value): value.detach().clone() for value in results})


class EMA:
    """`module` is the average of `model`: parameters and floating buffers are averaged, integer buffers are copied.

    `module` is in eval mode and requires no gradient.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.model = model
        self._held: list[Any] = []
        self.module = copied_now(model).eval().requires_grad_(False)
        self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """Average the tensors that the model holds now.

        It may have replaced some since. A tensor that is new, or has another shape, starts with its value.
        """
        if (held := tensors_held(self.model)) == self._held:
            return
        self._held = held
        before, live = named_tensors(self.module), named_tensors(self.model)
        kinds = [{name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (before, live)]
        if kinds[0] != kinds[1]:
            self.module = copied_now(self.model).eval().requires_grad_(False)
            for name, tensor in named_tensors(self.module).items():
                if name in before and before[name].shape == tensor.shape:
                    tensor.copy_(before[name])
        mean = named_tensors(self.module)
        numbers = [name for name, p in live.items() if p.is_floating_point() or p.is_complex()]
        self._floats = [(mean[name], live[name]) for name in numbers]
        self._counts = [(mean[name], p) for name, p in live.items() if name not in numbers]

    def advance(self) -> float:
        """Count an update; returns the share by which it moves the average towards the model."""
        weight = 1 - ema_decay(self.updates, self.decay)
        self.updates += 1
        return weight

    @torch.no_grad()
    def move(self, weight: float | Tensor) -> None:
        """Move the average towards the model; call it once a step, after the optimizer.

        weight: the share to move by, a number or a tensor () on the device.
        """
        torch._foreach_lerp_([m for m, _ in self._floats], [p.detach() for _, p in self._floats], weight)  # type: ignore[arg-type]
        if self._counts:
            torch._foreach_copy_([m for m, _ in self._counts], [p for _, p in self._counts])

    def state_dict(self) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.updates = state["updates"]
