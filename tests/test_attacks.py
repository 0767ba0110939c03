"""Properties of the attack: inside the ball, inside [0,1], exact on a linear model, stronger than its start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastafd.attacks import PGD
from fastafd.settings import UsageError


def network(seed: int, channels_last: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)).eval()
    return net.to(memory_format=torch.channels_last) if channels_last else net


@given(
    eps=st.floats(0.0, 0.3),
    step_size=st.floats(0.0, 0.3),
    steps=st.integers(0, 4),
    random_start=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_stays_inside_the_ball_and_inside_the_pixel_range(eps, step_size, steps, random_start, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 3, 8, 8, generator=generator).mul(1.4).sub(0.2).clamp(0, 1)  # some pixels on the bounds
    y = torch.randint(0, 5, (3,), generator=generator)
    x_adv = PGD(eps, step_size, steps, random_start)(network(seed), x, y, generator)
    assert x_adv.shape == x.shape and not x_adv.requires_grad
    assert (x_adv - x).abs().max() <= eps + 1e-6
    assert x_adv.min() >= 0 and x_adv.max() <= 1


def test_exact_maximiser_on_a_linear_model():
    """For two classes and linear logits the worst point of the box is known in closed form."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 48, generator=generator)

    def linear(x):
        return x.flatten(1) @ weight.T

    x = 0.2 + 0.6 * torch.rand(4, 3, 4, 4, generator=generator)
    y = torch.tensor([0, 1, 0, 1])
    eps = 8 / 255
    x_adv = PGD(eps, eps / 2, steps=5, random_start=True)(linear, x, y, generator)
    away = torch.stack([weight[1 - label] - weight[label] for label in y]).view_as(x)
    torch.testing.assert_close(x_adv, x + eps * away.sign())


def test_mean_loss_rises_on_a_trained_model():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(64, 3, 8, 8, generator=generator)
    y = (x.mean(dim=(2, 3)).argmax(1)).long()
    net = network(0).train()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        clean = F.cross_entropy(net(x), y)
        losses = [
            F.cross_entropy(net(PGD(steps=k)(net, x, y, torch.Generator().manual_seed(1))), y) for k in (0, 1, 5, 20)
        ]
    assert clean < losses[1] < losses[2] <= losses[3] + 1e-3
    assert losses[0] < losses[1]  # the start alone is weaker than one step from it


def test_same_generator_same_start_and_no_trace_elsewhere():
    net, x, y = network(0), torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    for parameter in net.parameters():
        assert parameter.grad is None
    before = torch.get_rng_state()
    first, again, other = (PGD()(net, x, y, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_keeps_channels_last():
    x = torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    x_adv = PGD(steps=2)(network(0, channels_last=True), x, torch.tensor([0, 1]))
    assert x_adv.is_contiguous(memory_format=torch.channels_last)


def test_works_inside_no_grad_and_on_bf16_logits():
    net, x, y = network(0), torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        x_adv = PGD(steps=2)(net, x, y)
    assert x_adv.dtype == torch.float32 and not torch.equal(x_adv, x)


@pytest.mark.parametrize("text, value", [("8/255", 8 / 255), (8 / 255, 8 / 255), ("0.03", 0.03), (0, 0.0), ("1", 1.0)])
def test_eps_takes_fractions(text, value):
    assert PGD(eps=text).eps == pytest.approx(value)


@pytest.mark.parametrize(
    "wrong, hint",
    [
        (8, "8/255"),
        ("8", "8/255"),
        (-0.1, "pixels"),
        ("x", "pixels"),
        ("1/0", "pixels"),
        (float("nan"), "pixels"),
        (None, "pixels"),
    ],
)
def test_eps_that_is_no_pixel_distance_is_refused(wrong, hint):
    with pytest.raises(UsageError, match=f"eps: got .*{hint}"):
        PGD(eps=wrong)


@pytest.mark.parametrize("steps", [-1, 2.5, "many"])
def test_steps_is_a_count(steps):
    with pytest.raises(UsageError, match="steps"):
        PGD(steps=steps)
