"""Each method compared with a literal transcription of its source: float64 steps from the same state and noise."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
import transcriptions
from float64 import EPS, assert_same, batches, draws, small_net
from torch import nn

from fastafd.attacks import PGD, Snapshot, input_gradient
from fastafd.methods import VAFT
from fastafd.models import disentangle, split
from fastafd.recipes import find_recipe
from fastafd.settings import UsageError
from fastafd.training.optim import make_sgd
from fastafd.training.step import TrainStep

BOTH = ("reference", "fast")
STEPS = 12
EPOCHS = [10] * 8 + [11] * 4  # the epoch of each batch, from 1; noisy replay ends after the tenth epoch


def step_of(recipe: str, net: nn.Module, engine: str = "reference") -> TrainStep:
    """A step of the recipe, from the weights of `net`, without an average."""
    config = find_recipe(recipe)
    model = disentangle(net) if config.method.disentangled else split(net)
    sgd = config.sgd
    return TrainStep(
        model,
        make_sgd(model, sgd.lr, sgd.momentum, sgd.weight_decay, config.d2_weight_decay),
        config.method,
        teacher=net if config.method.begins == "natural" else None,
        attack=config.attack,
        attack_bn=config.attack_bn,
        loader=range(1),
        amp="fp32",
        engine=engine,
    )


@pytest.mark.parametrize(
    "recipe, engine",
    list(product(("vaft", "afkd", "arrest", "vaft_d", "vaft_a", "pgd_at", "trades"), BOTH)),
)
def test_method_is_its_transcription(recipe, engine):
    literal, data = small_net(), batches(STEPS)
    start = copy.deepcopy(literal)
    step = step_of(recipe, literal, engine)
    for (x, y), epoch in zip(data, EPOCHS, strict=True):
        step.steps = step.steps if recipe != "arrest" else epoch - 1  # an epoch has one step
        metrics = step(x, y, probe=True)
    transcription = getattr(transcriptions, recipe)
    if recipe == "arrest":
        replayed = transcription(literal, data, draws(data), EPOCHS)
        assert True in replayed[:8] and False in replayed[:8]
        plain = copy.deepcopy(start)
        transcriptions.afkd(plain, data, draws(data))
        assert not torch.allclose(plain[-1].weight, literal[-1].weight, rtol=1e-3)  # noisy replay changes the result
    else:
        layers = transcription(literal, data, draws(data, normal=recipe == "trades"))
        if layers is not None:  # the transcription has D1
            _, d1, d2, linear = layers
            torch.testing.assert_close(step.model.d2.weight, d2.weight, rtol=1e-9, atol=1e-11)
            linear.weight.data = linear.weight @ d1.weight
    assert not torch.allclose(start[-1].weight, literal[-1].weight)
    # vaft_d: the two optimizers of the source are one here, so the weights agree up to the order of weight decay.
    assert_same(step.averaged().merge(), literal)
    wanted = {"own_gap_linf", "clean_accuracy"} | ({"gap_linf"} if step.has_teacher else set())
    assert (
        wanted <= metrics.keys()
    )  # the distance from natural features (Fig. 1a), also for methods that do not use them


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", ["vaft", "afkd", "arrest", "vaft_d", "pgd_at", "trades"])
def test_recorded_steps_are_the_reference(recipe):
    """In float64: warm-ups, a recording, replays; ARREST during and after the epochs of noisy replay."""
    both = []
    for engine in BOTH:
        step = step_of(recipe, small_net().cuda(), engine)
        for (x, y), epoch in zip(batches(STEPS), EPOCHS, strict=True):
            step.steps = step.steps if recipe != "arrest" else epoch - 1
            metrics = step(x.cuda(), y.cuda(), probe=True)
        both.append((step, metrics))
    (reference, expected), (fast, measured) = both
    assert fast.graphs.works and len(fast.graphs.recorded) == 1 and measured.keys() == expected.keys()
    assert_same(fast.averaged().merge(), reference.averaged().merge(), 1e-6)


def test_what_the_fast_engine_does_not_run_says_so(capsys):
    step = step_of("fgsm_ga", small_net(), "fast")
    assert not step.fast
    assert "FGSM-GA runs uncompiled, on the reference engine: it differentiates" in capsys.readouterr().err


class Untargeted(PGD):
    """Climbs down: the images become easier."""

    def ascent(self, classifier, x, y):
        return lambda x_adv: -input_gradient(classifier, x_adv, y)


class Towards(PGD):
    """Climbs the loss of the next class."""

    def target(self, logits, y):
        return (y + 1) % 5


class Calls(PGD):
    def __call__(self, classifier, x, y, generator=None):
        return x


@pytest.mark.parametrize("attack", [Untargeted, Towards])
def test_both_engines_climb_the_gradient_of_the_attack(attack, capsys):
    x, y = batches(1)[0]
    trained = {}
    for kind, engine in [(attack, "reference"), (attack, "fast"), (PGD, "fast")]:
        torch.manual_seed(0)
        model = split(small_net())
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        step = TrainStep(model, sgd, VAFT(), attack=kind(steps=2), amp="fp32", engine=engine)
        step(x, y)
        trained[kind, engine] = step.averaged()
    assert_same(trained[attack, "fast"], trained[attack, "reference"], 1e-6)
    with pytest.raises(AssertionError):
        assert_same(trained[PGD, "fast"], trained[attack, "reference"], 1e-6)
    lines = capsys.readouterr().err
    assert ("the attack Untargeted has its own gradient: its loss runs uncompiled" in lines) == (attack is Untargeted)


@pytest.mark.parametrize("attack, name", [(Calls(), "Calls has its own __call__"), (lambda model, x, y: x, "<lambda>")])
@pytest.mark.parametrize("engine", BOTH)
def test_an_attack_that_no_step_can_run_is_refused_by_name(attack, name, engine):
    model = split(small_net())
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(UsageError, match=name):
        TrainStep(model, sgd, VAFT(), attack=attack, amp="fp32", engine=engine)


@pytest.mark.parametrize("head", ["pooled", "flat"])
def test_a_snapshot_climbs_away_from_probabilities(head):
    """The gradient of TRADES' divergence, for networks with and without a ReLU and a pool at the end."""
    body = small_net()[:3]
    net = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten()) if head == "pooled" else small_net()[:-1]
    linear = nn.Linear(8 if head == "pooled" else 32, 5).double()
    snapshot = Snapshot(net.eval(), torch.float64, linear)
    snapshot.refresh()
    assert snapshot.pools == (head == "pooled")
    x = batches(1)[0][0]
    probabilities = linear(net(x)).softmax(1).detach()
    x_adv = (x + 0.03 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    divergence = F.kl_div(linear(net(x_adv)).log_softmax(1), probabilities, reduction="sum")
    (expected,) = torch.autograd.grad(divergence, x_adv)
    torch.testing.assert_close(snapshot.gradient(x_adv, probabilities), expected, rtol=1e-9, atol=1e-12)


def test_the_kl_attack_climbs_the_divergence():
    from fastafd.attacks import KLPGD

    net, (x, y) = small_net().eval(), batches(1)[0]
    attack = KLPGD(eps=EPS, step_size=0.007, steps=10)
    x_adv = attack(net, x, y, torch.Generator().manual_seed(0))
    assert (x_adv - x).abs().max() <= EPS + 1e-12 and x_adv.min() >= 0 and x_adv.max() <= 1
    begun = PGD(steps=0)(net, x, y, torch.Generator().manual_seed(0))
    with torch.no_grad():
        clean, attacked, other = (net(images).log_softmax(1) for images in (x, x_adv, begun))
        gained = F.kl_div(attacked, clean, reduction="sum", log_target=True)
        assert (
            gained > 10 * F.kl_div(other, clean, reduction="sum", log_target=True) > 0
        )  # more than uniform noise of the same size
    assert torch.equal(attack(net, x, 0 * y, torch.Generator().manual_seed(0)), x_adv)  # labels do not matter
