"""A network of two blocks, batches and AFD steps, for the tests of the fast engine."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastafd
from fastafd.data import Augment
from fastafd.training.optim import make_sgd
from fastafd.training.step import TrainStep

CLASSES, BATCH = 5, 8
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Tiny(nn.Module):
    """Two blocks with BatchNorm behind the convolution and before it, a residual sum, and a pool behind a ReLU."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        return self.linear(F.relu(x + self.conv2(F.relu(self.bn2(x)))).mean((2, 3)))


class Wilful(Tiny):
    """A network that torch.fx cannot trace: it branches on the images' values."""

    def forward(self, x):
        return super().forward(x if bool(x.max() > 2) else x * 1.0)


def unsettled(net: nn.Module) -> nn.Module:
    """Give the network statistics and BatchNorm parameters like those of a trained one."""
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.3, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.3, 0.3),
            ):
                tensor.uniform_(low, high)
    return net.eval()


def tiny(kind: type[nn.Module] = Tiny, dtype: torch.dtype = torch.float64) -> nn.Module:
    """In float64, because different rounding errors would change signs of the attack's gradient."""
    torch.manual_seed(0)
    return unsettled(kind()).to(dtype, memory_format=torch.channels_last)


def batches(count: int, batch: int = BATCH, side: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8, generator=generator),
            torch.randint(0, CLASSES, (batch,), generator=generator),
        )
        for _ in range(count)
    ]


def afd_step(net: nn.Module, engine: str, device: str = "cpu", **more) -> fastafd.AFDStep:
    net = copy.deepcopy(net).to(device)
    model = fastafd.disentangle(net)
    optimizer = make_sgd(model, 0.02, 0.9, 1e-3)
    more = {"amp": "fp32", "augment": Augment(1, True, 0), "steps": 2} | more
    return fastafd.AFDStep(model, net, optimizer, engine=engine, **more)


def state_of(step: TrainStep) -> dict[str, torch.Tensor]:
    momentum = {str(i): v["momentum_buffer"] for i, v in enumerate(step.optimizer.state.values())}
    return {**step.model.state_dict(), **{f"ema.{k}": v for k, v in step.averaged().state_dict().items()}, **momentum}


def assert_close(ours: TrainStep, theirs: TrainStep, tolerance: float = 1e-9) -> None:
    a, b = state_of(ours), state_of(theirs)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
