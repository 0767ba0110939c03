"""The learning rate, the EMA and the Wilson interval against hand-computed values and an independent implementation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastafd.config import PretrainConfig
from fastafd.data import balanced_draw
from fastafd.evaluation import wilson
from fastafd.recipes import RECIPES, find_recipe
from fastafd.training.ema import EMA, ema_decay
from fastafd.training.optim import learning_rate

# Epochs counted from 1, as the released script's adjust_learning_rate prints them.
RELEASED = [0.025] * 10 + [0.020] * 2 + [0.010] * 2 + [0.005] * 2 + [0.0025] * 2 + [0.00125] * 2
PRETRAIN = [0.1] * 75 + [0.01] * 15 + [0.001] * 10


@pytest.mark.parametrize("config, rates", [(find_recipe("released").sgd, RELEASED), (PretrainConfig().sgd, PRETRAIN)])
def test_learning_rate_of_every_epoch(config, rates):
    ours = [learning_rate(epoch, config.epochs, config.lr, config.lr_schedule) for epoch in range(config.epochs)]
    assert ours == pytest.approx(rates)


def test_schedule_scales_with_the_run():
    sgd = find_recipe("released").sgd
    assert [learning_rate(e, 40, sgd.lr, sgd.lr_schedule) for e in (19, 20, 24, 39)] == pytest.approx(
        [0.025, 0.02, 0.01, 0.00125]
    )


def test_published_settings():
    """The numbers of the sources, written a second time, so that a wrong number in a recipe shows."""
    released, paper, hundred = (find_recipe(name) for name in ("released", "paper", "released_cifar100"))
    assert (released.method.alpha, released.method.beta, released.method.gamma) == (0.05, 0.5, 25.0)
    assert released.method.classifier_alpha == pytest.approx(0.1)
    assert (released.sgd.lr, released.sgd.weight_decay, released.d2_weight_decay) == (0.025, 1e-3, 5e-4)
    assert (released.attack.eps, released.attack.step_size, released.attack.steps) == (8 / 255, 0.007, 10)
    assert (paper.method.alpha, paper.method.beta, paper.method.gamma, paper.method.classifier_alpha) == (
        0.05,
        0.25,
        25,
        0,
    )
    assert (paper.sgd.lr, paper.sgd.weight_decay, paper.attack.step_size) == (0.0025, 5e-4, 2 / 255)
    assert (hundred.method.alpha, hundred.method.beta, hundred.method.gamma) == (0.1, 2.0, 50.0)
    for config in (released, paper, hundred):
        assert (config.sgd.epochs, config.sgd.batch_size, config.sgd.momentum, config.ema_decay) == (
            20,
            128,
            0.9,
            0.999,
        )
        assert config.attack.random_start and config.attack_bn == "eval"
        assert (config.pretrain.epochs, config.pretrain.lr, config.pretrain.weight_decay) == (100, 0.1, 5e-4)
    assert all(RECIPES[name]().recipe == name for name in RECIPES)


@pytest.mark.parametrize(
    "t, decay", [(0, 1 / 10), (1, 2 / 11), (90, 91 / 100), (8989, 8990 / 8999), (8990, 0.999), (10**6, 0.999)]
)
def test_ema_decay(t, decay):
    assert ema_decay(t, 0.999) == pytest.approx(decay, abs=1e-15)


def test_ema_against_torchs_averaged_model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).double()
    ema = EMA(net, 0.99)
    updates = {"t": 0}

    def average(mean, new, _):
        decay = min(0.99, (1 + updates["t"]) / (10 + updates["t"]))
        return decay * mean + (1 - decay) * new

    reference = torch.optim.swa_utils.AveragedModel(copy.deepcopy(net), avg_fn=average, use_buffers=True)
    reference.n_averaged.fill_(1)  # at 0 it would copy instead of averaging
    for _ in range(200):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.1 * torch.randn_like(p))
        net(torch.randn(8, 3, 8, 8, dtype=torch.float64))
        ema.move(ema.advance())
        reference.update_parameters(net)
        updates["t"] += 1
    expected = reference.module.state_dict()
    for name, value in ema.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)
        else:
            assert value == 200  # num_batches_tracked is copied, not averaged


@pytest.mark.parametrize(
    "correct, n, low, high",
    [(4740, 10_000, 0.4642, 0.4838), (474, 1000, 0.4432, 0.5050), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)],
)
def test_wilson(correct, n, low, high):
    assert wilson(correct, n) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 200), st.integers(0, 50))
def test_draws_are_balanced_nested_and_seeded(n, seed):
    labels = np.repeat(np.arange(10), 20)  # sorted by class, as image trees are
    draw = balanced_draw(labels, n, seed)
    counts = np.bincount(labels[draw], minlength=10)
    assert len(draw) == n == len(set(draw.tolist())) and counts.max() - counts.min() <= 1
    assert np.array_equal(draw, balanced_draw(labels, n, seed))
    assert set(balanced_draw(labels, max(1, n // 2), seed)) <= set(draw)


def test_another_seed_draws_other_images():
    labels = np.repeat(np.arange(10), 20)
    assert not np.array_equal(balanced_draw(labels, 30, 0), balanced_draw(labels, 30, 1))
