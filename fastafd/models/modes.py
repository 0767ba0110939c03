"""Modes of a whole network for a while: train and eval mode, and frozen weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(net: nn.Module) -> Iterator[None]:
    """Put all layers into eval mode; afterwards each layer has its former mode again."""
    before = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def examined(net: nn.Module) -> Iterator[None]:
    """Put all layers into eval mode. Afterwards modes, weights, buffers and PyTorch's random state are as before.

    Even in eval mode a forward may draw numbers and change its statistics, and an attack may change weights.
    """
    held = [(module, dict(module._buffers)) for module in net.modules()]
    values = [(tensor, tensor.detach().clone()) for tensor in (*net.parameters(), *net.buffers())]
    try:
        with eval_mode(net), torch.random.fork_rng():
            yield
    finally:
        for module, buffers in held:
            module._buffers.update(buffers)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)


@contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    """Require no gradient of any weight, so that the gradient of an input is cheaper; the value is the same."""
    trained = [p for p in net.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def wholly_eval(net: nn.Module) -> bool:
    """Whether the network, or all of its layers with weights, are in eval mode, as those of a loaded model are.

    Then the mode means nothing: no layer was put into it on purpose. So it is too for a loaded model behind a layer
    that normalises.
    """
    layers = [module for module in net.modules() if next(module.parameters(recurse=False), None) is not None]
    return not net.training or (bool(layers) and not any(layer.training for layer in layers))


class Modes:
    """Switches a network between train and eval mode; layers that were in eval mode before stay in eval mode.

    No layer stays in it if the network is `wholly_eval`.
    """

    def __init__(self, net: nn.Module):
        self.net = net
        self.fixed = [module for module in net.modules() if not module.training] if not wholly_eval(net) else []

    def train(self) -> None:
        self.net.train()
        for module in self.fixed:
            module.training = False

    def eval(self) -> None:
        self.net.eval()

    def note(self) -> str | None:
        """A line that counts the layers that stay in eval mode; None if there are none."""
        kinds = Counter(type(module).__name__ for module in self.fixed if next(module.children(), None) is None)
        if not kinds:
            return None
        listed = ", ".join(f"{name} {count}" for name, count in kinds.most_common())
        return f"{sum(kinds.values())} layers stay in eval mode, as they are: {listed}"
