"""A small float64 network, batches and random draws, for the tests that compare methods with transcriptions."""

from __future__ import annotations

import torch
from torch import nn

CLASSES, BATCH, EPS = 5, 6, 8 / 255


def small_net() -> nn.Module:
    """A network whose statistics make adversarial fine-tuning turn its features."""
    torch.manual_seed(1)
    convolution = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    net = nn.Sequential(*convolution, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, CLASSES)).double()
    net[1].running_mean.fill_(0.6)
    net[1].running_var.fill_(0.02)
    return net


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.rand(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(0, CLASSES, (BATCH,), generator=generator),
        )
        for _ in range(count)
    ]


def draws(data, normal: bool = False) -> list[torch.Tensor]:
    """The uniform (or standard normal) draws that a step seeded with 0 makes for these batches."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for x, _ in data:
        like = torch.empty_like(x, memory_format=torch.channels_last)
        if normal:
            batches.append(like.normal_(0.0, 0.001, generator=generator) / 0.001)
        else:
            batches.append(like.uniform_(-EPS, EPS, generator=generator))
    return batches


def floats(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in net.state_dict().items() if value.is_floating_point()}


def assert_same(ours: nn.Module, literal: nn.Module, tolerance: float = 1e-9) -> None:
    assert floats(ours).keys() == floats(literal).keys()
    for name, value in floats(ours).items():
        torch.testing.assert_close(
            value, floats(literal)[name], rtol=tolerance, atol=1e-2 * tolerance, msg=lambda m, n=name: f"{n} {m}"
        )
