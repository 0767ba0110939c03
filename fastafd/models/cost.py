"""The arithmetic of a classifier, and the threads that it is worth."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from fastafd.models.modes import eval_mode

# Threads wait for each other at every operation. With few multiplications in a batch that costs more than it saves, and
# beside other work on the same cores a multiple of it. By benchmarks/threads.py (results/threads-cpu.json, two cores),
# a second thread lost 3 to 14 per cent up to 0.2e9 multiplications, and gained 48 to 76 per cent from 0.8e9 on.
WORTH_A_THREAD = 1e9


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


def set_threads(net: nn.Module, image_size: int, batch_size: int, threads: int | None = None) -> int | None:
    """Let PyTorch use that many CPU threads for `net`; returns the number. On a GPU nothing changes, and it is None.

    threads: None takes as many as a batch is worth, one for each WORTH_A_THREAD multiplications of a forward pass, but
    not more than cores or OMP_NUM_THREADS. The number is a fixed function of network, batch and cores, since another
    number of threads rounds otherwise.
    """
    if next(net.parameters()).device.type != "cpu":
        return None
    if threads is None:
        most = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else len(os.sched_getaffinity(0))
        worth = multiplications(net, image_size) * batch_size / WORTH_A_THREAD
        threads = max(1, min(most, int(worth)))
    torch.set_num_threads(threads)
    return threads
