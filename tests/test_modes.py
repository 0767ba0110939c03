"""What a step trains: layers in eval mode stay so, the optimizer holds the model's weights, derived models train on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastafd
from fastafd.methods import PGDAT, Natural
from fastafd.models import Modes, split
from fastafd.training.step import TrainStep

X = torch.rand(6, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 4
ENGINES = ("reference", "fast")


def net_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 4))


def step_of(model, teacher, engine="reference", **fields):
    sgd = fastafd.make_sgd(model, 0.1, 0.9, 0.0)
    return fastafd.AFDStep(model, teacher, sgd, engine=engine, amp="fp32", **{"steps": 1} | fields)


def moved(before, model):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


# -- modes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("when", ["before disentangle", "after disentangle"])
def test_a_layer_in_eval_mode_stays_in_it(engine, when, capsys):
    """A frozen BatchNorm keeps its statistics and a frozen Dropout drops nothing; the other BatchNorm learns."""
    net = net_of()
    chosen = net if when == "before disentangle" else (model := fastafd.disentangle(net)).backbone
    for index in (1, 8):
        chosen[index].eval()
    model = fastafd.disentangle(net) if when == "before disentangle" else model
    before = copy.deepcopy(model.state_dict())
    step = step_of(model, net, engine)
    for _ in range(2):
        step(X, Y, probe=True)
        model.eval()  # as a user does to validate
    step(X, Y)
    changed = moved(before, model)
    assert "backbone.1.running_mean" not in changed and "backbone.4.running_mean" in changed
    assert {"backbone.1.weight", "backbone.0.weight"} <= changed  # in eval mode its weights train all the same
    assert not model.backbone[8].training and model.backbone[4].training
    assert "2 layers stay in eval mode, as they are: BatchNorm2d 1, Dropout 1" in capsys.readouterr().err


@pytest.mark.parametrize("attack_bn", ["eval", "train"])
def test_no_pass_of_a_step_moves_frozen_statistics(attack_bn):
    net = net_of()
    model = split(net)
    model.backbone[1].eval()
    before = copy.deepcopy(model.state_dict())
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    step = TrainStep(model, sgd, PGDAT(), attack=fastafd.PGD(steps=2), attack_bn=attack_bn, amp="fp32")
    step(X, Y)
    assert not {"backbone.1.running_mean", "backbone.1.num_batches_tracked"} & moved(before, model)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [fastafd.disentangle, split])
def test_the_mode_of_a_loaded_model_means_nothing(engine, kind, capsys):
    """A model that was loaded, and so is in eval mode, trains bit for bit as the same model in train mode."""
    states = []
    for mode in ("eval", "train", "eval after the split"):
        net = net_of().train(mode == "train")
        model = kind(net)
        assert all(m.training for m in model.modules())
        if mode == "eval after the split":
            model.eval()
        torch.manual_seed(0)
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        step = TrainStep(model, sgd, PGDAT(), attack=fastafd.PGD(steps=2), amp="fp32", engine=engine)
        for _ in range(3):
            step(X, Y)
        states.append(model.state_dict())
    for state in states[1:]:
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())
    # The statistics are those of the attacked batches in train mode: one update a step, and no other.
    assert states[0]["backbone.1.num_batches_tracked"] == 3
    assert "eval mode" not in capsys.readouterr().err


def test_a_natural_step_keeps_modes_too():
    net = net_of()
    net[1].eval()
    before = copy.deepcopy(net.state_dict())
    TrainStep(net, torch.optim.SGD(net.parameters(), 0.1), Natural(), amp="fp32")(X, Y)
    assert "1.running_mean" not in moved(before, net) and "4.running_mean" in moved(before, net)


def test_an_evaluation_gives_every_layer_its_mode_back():
    import numpy as np

    from fastafd.data import ArraySplit

    net = net_of()
    net[1].eval()
    before = [m.training for m in net.modules()]
    images = np.zeros((6, 6, 6, 3), np.uint8)
    fastafd.evaluate(net, ArraySplit(images, Y.numpy()), ("clean", "pgd20"))
    assert [m.training for m in net.modules()] == before


# -- the optimizer and the model ----------------------------------------------------------------------------------


def frozen(model, names):
    for name, p in model.named_parameters():
        if any(name.startswith(start) for start in names):
            p.requires_grad_(False)
    return model


BAD = {  # the model and the parameters of its optimizer; what the message names
    "made before disentangle": (lambda net: (fastafd.disentangle(net), net.parameters()), "lacks 12.*another network"),
    "another copy": (lambda net: (m := fastafd.disentangle(net), copy.deepcopy(m).parameters()), "another network"),
    "the backbone alone": (
        lambda net: (m := fastafd.disentangle(net), m.backbone.parameters()), r"classifier.weight.*a part"),
    "D1 and D2 alone": (
        lambda net: (m := fastafd.disentangle(net), [*m.d1.parameters(), *m.d2.parameters()]), r"backbone\.0\.weight"),
    "without one weight": (
        lambda net: (m := fastafd.disentangle(net), list(m.parameters())[1:]), r"lacks 1 .*backbone\.0\.weight"),
    "frozen before disentangle": (
        lambda net: (m := fastafd.disentangle(net.requires_grad_(False)), m.parameters()), "only D1 and D2"),
    "all frozen": (lambda net: (m := fastafd.disentangle(net).requires_grad_(False), m.parameters()), "no weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_optimizer_that_does_not_train_the_model_is_refused(name, engine):
    build, says = BAD[name]
    net = net_of()
    model, parameters = build(net)
    sgd = torch.optim.SGD(parameters, 0.1)
    with pytest.raises(ValueError, match=says) as raised:
        fastafd.AFDStep(model, net, sgd, engine=engine)
    assert "\n" not in str(raised.value)


def test_a_natural_step_refuses_the_optimizer_of_another_network():
    net = net_of()
    with pytest.raises(ValueError, match="another network"):
        TrainStep(net, torch.optim.SGD(net_of().parameters(), 0.1), Natural())


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_frozen_on_purpose_are_counted_and_stay(engine, capsys):
    net = net_of()
    model = frozen(fastafd.disentangle(net), ["backbone.0.", "backbone.1."])
    before = copy.deepcopy(model.state_dict())
    step = step_of(model, net, engine)
    step(X, Y)
    lines = capsys.readouterr().err
    assert "4 of 12 weights are frozen (requires_grad False): backbone.0.weight, backbone.0.bias" in lines
    assert "and 1 more" in lines
    changed = moved(before, model)
    assert not {"backbone.0.weight", "backbone.1.bias"} & changed and "backbone.3.weight" in changed
    merged = step.averaged().merge()
    assert [p.requires_grad for p in merged.parameters()] == [False] * 4 + [True] * 6


def test_weights_that_are_not_the_models_are_counted(capsys):
    net = net_of()
    model = fastafd.disentangle(net)
    sgd = torch.optim.SGD([*model.parameters(), *net.parameters()], 0.1)
    fastafd.AFDStep(model, net, sgd)
    assert "also holds 10 weights that are not the model's" in capsys.readouterr().err


# -- derived models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_second_stage_trains_every_weight(decay, engine):
    net = net_of()
    first = step_of(fastafd.disentangle(net), net, engine, ema_decay=decay)
    first(X, Y)
    robust = first.averaged().merge()
    assert all(p.requires_grad for p in robust.parameters())
    model = fastafd.disentangle(robust)
    before = copy.deepcopy(model.state_dict())
    second = step_of(model, robust, engine, ema_decay=decay)
    for _ in range(3):
        second(X, Y)
    assert moved(before, model) == set(before)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_averaged_is_a_copy_in_eval_mode(decay):
    net = net_of()
    model = fastafd.disentangle(net)
    step = step_of(model, net, ema_decay=decay)
    step(X, Y)
    averaged = step.averaged()
    before = copy.deepcopy(averaged.state_dict())
    assert not any(m.training for m in averaged.modules()) and model.training
    step(X, Y)
    assert not moved(before, averaged) and moved(before, step.averaged())


def test_weights_that_are_thawed_later_are_missed():
    """The optimizer was made over the head, the rest being frozen then; once it is thawed, it would never train."""
    net = net_of()
    model = fastafd.disentangle(net)
    model.backbone.requires_grad_(False)
    step = fastafd.AFDStep(
        model, net, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1), steps=1
    )
    step(X, Y)
    model.backbone.requires_grad_(True)
    with pytest.raises(ValueError, match="the optimizer lacks"):
        step(X, Y)


def test_weights_of_another_network_are_not_moved():
    net, other = net_of(), nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    before = other.weight.detach().clone()
    model = fastafd.disentangle(net)
    step = fastafd.AFDStep(model, net, torch.optim.SGD([*model.parameters(), *other.parameters()], 0.1), steps=1)
    step(X, Y)
    assert torch.equal(other.weight, before)


def test_a_loaded_model_behind_a_normalising_layer_trains_its_statistics():
    """Its root is in train mode, and all of its layers are as they were loaded."""
    inner = net_of().eval()
    assert Modes(nn.Sequential(nn.Identity(), inner)).note() is None
    assert all(module.training for module in fastafd.disentangle(nn.Sequential(nn.Identity(), inner)).modules())
    inner.train()
    for layer in inner.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    assert "stay in eval mode" in Modes(nn.Sequential(nn.Identity(), inner)).note()
