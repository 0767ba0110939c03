"""The exponential moving average of a model's weights and of BatchNorm's running statistics."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def ema_decay(t: int, limit: float) -> float:
    """The decay of update t, counted from 0: min(limit, (1+t)/(10+t)). Source: the released AFD code."""
    return min(limit, (1 + t) / (10 + t))


class EMA:
    """`module` is the average of `model`: parameters and floating buffers are averaged, integer buffers are copied.

    `module` is in eval mode and requires no gradient.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        live = [*model.parameters(), *model.buffers()]
        mean = [*self.module.parameters(), *self.module.buffers()]
        self._floats = [(m, p) for m, p in zip(mean, live, strict=True) if p.is_floating_point()]
        self._counts = [(m, p) for m, p in zip(mean, live, strict=True) if not p.is_floating_point()]

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
