"""Each method against its formulas: steps in float64 from one state and one noise, beside a literal transcription.

The transcriptions are written from the cited sources and import nothing of fastafd.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastafd import train
from fastafd.models import split
from fastafd.optim import make_sgd
from fastafd.recipes import find_recipe, matched
from fastafd.step import TrainStep

CLASSES, BATCH = 5, 6


def small_net() -> nn.Module:
    torch.manual_seed(1)
    convolution = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*convolution, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, CLASSES)).double()


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.rand(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(0, CLASSES, (BATCH,), generator=generator),
        )
        for _ in range(count)
    ]


def noises(xs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The uniform starts that a step seeded with 0 draws for these batches."""
    generator = torch.Generator().manual_seed(0)
    shape = {"memory_format": torch.channels_last}
    return [torch.empty_like(x, **shape).uniform_(-8 / 255, 8 / 255, generator=generator) for x in xs]


def floats(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in net.state_dict().items() if value.is_floating_point()}


def step_of(recipe: str, net: nn.Module, engine: str) -> TrainStep:
    """A step of the recipe, from the natural model `net`."""
    config = find_recipe(recipe)
    model = split(net)
    optimizer = make_sgd(model, config.sgd.lr, config.sgd.momentum, config.sgd.weight_decay)
    return TrainStep(
        model,
        optimizer,
        config.method,
        teacher=net,
        attack=config.attack,
        attack_bn=config.attack_bn,
        ema_decay=config.ema_decay,
        amp="fp32",
        engine=engine,
    )


def pgd(net, x, y, noise, eps=8 / 255, size=2 / 255, steps=10):
    """PGD on the cross-entropy with a uniform start, net in eval mode; the start is not clipped to [0,1]."""
    net.eval()
    x_adv = x + noise
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(net(x_adv), y), x_adv)
        x_adv = x_adv.detach() + size * grad.sign()
        x_adv = torch.clamp(torch.min(torch.max(x_adv, x - eps), x + eps), 0, 1)
    net.train()
    return x_adv


def vaft(net: nn.Module, data, starts) -> None:
    """Source: github.com/changzhang777/AFD, ARREST.py with --RGKD and --NR off; no average."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.025, momentum=0.9, weight_decay=5e-4)
    for (x, y), noise in zip(data, starts, strict=True):
        x_adv = pgd(net, x, y, noise)
        optimizer.zero_grad()
        F.cross_entropy(net(x_adv), y).backward()
        optimizer.step()


@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize("recipe, transcription", [("vaft", vaft)])
def test_method_is_its_transcription(recipe, transcription, engine):
    literal, data = small_net(), batches(8)
    step = step_of(recipe, copy.deepcopy(literal), engine)
    for x, y in data:
        metrics = step(x, y, probe=True)
    transcription(literal, data, noises([x for x, _ in data]))
    for name, value in floats(step.averaged().merge()).items():
        torch.testing.assert_close(
            value, floats(literal)[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n} {m}"
        )
    # Whether or not a method looks at the teacher, its distance from natural features is measured (Fig. 1a).
    assert {"gap_linf", "own_gap_linf", "clean_accuracy"} <= metrics.keys()


def test_matched_is_afds_own_conditions():
    ours, afd = matched(find_recipe("vaft")), find_recipe("released")
    assert (ours.sgd, ours.attack, ours.attack_bn, ours.ema_decay) == (afd.sgd, afd.attack, afd.attack_bn, 0.999)
    assert ours.method == find_recipe("vaft").method and find_recipe("vaft").ema_decay == 0


def test_flags_go_over_what_is_matched(tmp_path):
    given = train.parse(["--recipe", "vaft", "--matched", "--lr", "0.01", "--attack.steps", "3"])
    assert (given.sgd.lr, given.attack.steps, given.attack.step_size, given.sgd.weight_decay) == (0.01, 3, 0.007, 1e-3)
    written = tmp_path / "config.yaml"
    written.write_text("recipe: vaft\nmatched: true\nlr: 0.01\n")
    assert train.parse(["--config", str(written)]) == train.parse(["--recipe", "vaft", "--matched", "--lr", "0.01"])
    assert train.parse(["--recipe", "vaft"]).attack.step_size == 2 / 255


def test_vaft_run_has_no_disentangler(digit_tree, tmp_path):
    import json

    from safetensors.torch import load_file

    small = "--dataset imagefolder --arch resnet8 --batch-size 16 --epochs 1 --attack.steps 1 --log-every 5 --eval-n 10"
    small += " --pretrain.epochs 1 --pretrain.batch-size 16 --autoattack-n 0 --loader resident --device cpu"
    out = tmp_path / "vaft"
    train.main([*small.split(), "--recipe", "vaft", "--matched", "--data-dir", str(digit_tree), "--out", str(out)])
    result = json.loads((out / "result.json").read_text())
    assert set(result["models"]) == {"natural", "vAFT"} and result["config"]["matched"] is True
    assert load_file(out / "model.safetensors").keys() == load_file(out / "natural.safetensors").keys()
    assert "gap_linf" in json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
