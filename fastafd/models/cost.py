"""The arithmetic of a classifier, and the threads that it is worth."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from fastafd.models.modes import eval_mode

# Two threads wait for each other at every operation. Below this many multiplications of a batch for each thread that
# costs more than it saves, and beside other work on the same cores a multiple. Measured by benchmarks/threads.py.
WORTH_A_THREAD = 2e9


@torch.no_grad()
def multiplications(net: nn.Module, image_size: int) -> int:
    """The multiplications of a forward pass on one image of that side in pixels: convolutions and linear layers."""
    total = 0

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal total
        assert isinstance(layer.weight, Tensor)
        total += output.numel() * layer.weight[0].numel()

    layers = [layer for layer in net.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with eval_mode(net):
        net(torch.zeros(1, 3, image_size, image_size, device=next(net.parameters()).device))
    for hook in hooks:
        hook.remove()
    return total


def threads_for(multiplications: float) -> int:
    """The threads that a batch of so many multiplications is worth: one for each WORTH_A_THREAD, at most one a core."""
    return max(1, min(len(os.sched_getaffinity(0)), int(multiplications / WORTH_A_THREAD)))
