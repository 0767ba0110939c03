"""The other methods' recipes: their published settings, AFD's conditions, and a whole run of each."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastafd
from fastafd import cli, train
from fastafd.attacks import PGD
from fastafd.console import Console
from fastafd.data import ArraySplit, Augment
from fastafd.data.loaders import ResidentLoader
from fastafd.methods import Loss, Method
from fastafd.models import build_model
from fastafd.recipes import OF_OTHERS, RECIPES, find_recipe, matched
from fastafd.settings import number, setting
from fastafd.training import build
from fastafd.training.optim import learning_rate
from fastafd.training.step import TrainStep


def test_published_settings_of_the_others():
    """The numbers of the sources, written a second time, so that a wrong number in a recipe shows."""
    of = {recipe.__name__: recipe() for recipe in OF_OTHERS}
    for name in ("vaft", "afkd", "arrest"):
        config = of[name]
        assert (config.sgd.epochs, config.sgd.lr, config.sgd.weight_decay, config.ema_decay) == (20, 0.025, 5e-4, 0)
        assert (config.attack.step_size, config.attack.steps, config.attack_bn) == (2 / 255, 10, "eval")
    assert of["afkd"].method.rgkd == of["arrest"].method.rgkd == 50
    assert (of["arrest"].method.replay_angle, of["arrest"].method.replay_epochs) == (30, 10)
    for name in ("pgd_at", "trades"):
        sgd = of[name].sgd
        rates = [learning_rate(e, sgd.epochs, sgd.lr, sgd.lr_schedule) for e in range(120)]
        assert rates == pytest.approx([0.1] * 75 + [0.01] * 15 + [0.001] * 10 + [0.0001] * 20)
        assert (sgd.weight_decay, sgd.batch_size, of[name].ema_decay) == (2e-4, 128, 0)
    assert of["trades"].method.kl_weight == 6 and of["trades"].attack.step_size == 0.007
    assert of["pgd_at"].attack.step_size == 2 / 255
    free, align, atas, rift = (of[name] for name in ("free_at", "fgsm_ga", "atas", "rift"))
    assert (free.sgd.epochs, free.method.replays, free.sgd.lr, free.sgd.weight_decay) == (10, 8, 0.04, 5e-4)
    assert (align.sgd.epochs, align.sgd.lr, align.method.align_weight) == (30, 0.3, 0.2)
    assert [learning_rate(e, 30, 0.3, align.sgd.lr_schedule, "lines") for e in (0, 6, 12, 21, 30)] == pytest.approx(
        [0, 0.15, 0.3, 0.15, 0]
    )
    rates = [learning_rate(e, 30, 0.1, atas.sgd.lr_schedule) for e in range(30)]
    assert rates == pytest.approx([0.1] * 24 + [0.01] * 4 + [0.001] * 2)
    method = atas.method
    assert (method.step_c, method.step_decay, method.step_low, method.step_high) == (0.01, 0.5, 4 / 255, 14 / 255)
    assert (method.warm_up, method.redraw_every) == (5, 10)
    rates = [learning_rate(e, 10, 0.001, rift.sgd.lr_schedule) for e in range(10)]
    assert rates == pytest.approx([0.001] * 5 + [0.0001] * 5)
    assert (rift.method.radius, rift.method.climbs, rift.sgd.weight_decay) == (0.1, 10, 5e-4)
    for config in of.values():
        assert config.attack.eps == 8 / 255 and config.sgd.momentum == 0.9 and config.sgd.batch_size == 128


@pytest.mark.parametrize("recipe", [recipe.__name__ for recipe in OF_OTHERS])
def test_matched_takes_the_conditions_of_afd(recipe):
    published, afd = find_recipe(recipe), find_recipe("released")
    ours = matched(published)
    assert (ours.sgd, ours.attack_bn, ours.ema_decay, ours.method) == (afd.sgd, afd.attack_bn, 0.999, published.method)
    assert type(ours.attack) is type(published.attack) and ours.attack.eps == afd.attack.eps
    if isinstance(published.attack, PGD):
        assert vars(ours.attack) == vars(afd.attack)


def test_flags_override_the_matched_settings(tmp_path):
    config = train.parse(["--recipe", "vaft", "--matched", "--lr", "0.01", "--attack.steps", "3"])
    assert (config.sgd.lr, config.attack.steps, config.attack.step_size, config.sgd.weight_decay) == (
        0.01,
        3,
        0.007,
        1e-3,
    )
    written = tmp_path / "config.yaml"
    written.write_text("recipe: vaft\nmatched: true\nlr: 0.01\n")
    assert train.parse(["--config", str(written)]) == train.parse(["--recipe", "vaft", "--matched", "--lr", "0.01"])
    assert train.parse(["--recipe", "vaft"]).attack.step_size == 2 / 255


@pytest.mark.parametrize(
    "words, recipe, lr, gamma",
    [
        ("--recipe vaft --recipe paper", "paper", 0.0025, 25.0),  # the last one counts, as for every other flag
        ("--recipe=vaft --lr 1 --recipe=paper --lr 2", "paper", 2.0, 25.0),
        ("--lr 3 --config FILE", "paper", 3.0, 7.0),  # flags go over the file, wherever they stand
        ("--config=FILE --lr 3", "paper", 3.0, 7.0),
        ("--config FILE --recipe paper", "paper", 0.5, 7.0),
        ("--gamma 4 --config FILE --config OTHER", "paper", 0.25, 4.0),  # the last file counts
    ],
)
def test_both_flags_that_choose_the_recipe(words, recipe, lr, gamma, tmp_path):
    (tmp_path / "FILE").write_text("recipe: paper\nlr: 0.5\ngamma: 7\n")
    (tmp_path / "OTHER").write_text("lr: 0.25\n")
    argv = words.replace("FILE", str(tmp_path / "FILE")).replace("OTHER", str(tmp_path / "OTHER")).split()
    config = train.parse(argv)
    assert (config.recipe, config.sgd.lr, config.method.gamma) == (recipe, lr, gamma)


def test_a_new_method_is_one_class_and_one_recipe(capsys):
    """No other file knows it: `TrainStep` trains a method that the registry does not list."""

    @dataclass(frozen=True)
    class Smoothed(Method):
        label: ClassVar[str] = "smoothed"
        smoothing: float = setting(0.1, "share of the other classes in a label", number(0, 1))

        def loss(self, model, batch):
            logits = model(batch.x_adv)
            total = F.cross_entropy(logits, batch.y, label_smoothing=self.smoothing)
            return Loss(total, {}, logits.detach())

    config = replace(find_recipe("vaft"), recipe="smoothed", method=Smoothed(smoothing=0.2))
    assert "smoothing: 0.2" in cli.to_yaml(config)
    torch.manual_seed(0)
    net = build_model("resnet8_half", 10)
    loader = ResidentLoader(
        ArraySplit(np.zeros((8, 32, 32, 3), np.uint8), np.arange(8)),
        n=8,
        batch_size=4,
        seed=0,
        drop_last=True,
        device=torch.device("cpu"),
    )
    step = build.build_step(config, net, loader, Augment(4, True, 0), Console())
    assert type(step) is TrainStep and "loss" in step(*next(loader.epoch(0)))


def test_every_method_has_the_step_of_the_registry():
    """A method that makes its attacked images itself needs a step that does so."""
    for recipe in RECIPES:
        method = find_recipe(recipe).method
        assert (type(method) in build.STEPS) == (not method.uses_recipe_attack), recipe


SMALL = "--dataset imagefolder --arch resnet8 --batch-size 16 --epochs 1 --log-every 5 --eval-n 10 --autoattack-n 0"
SMALL += " --loader resident --device cpu"
PRETRAIN = "--pretrain.epochs 1 --pretrain.batch-size 16".split()


@pytest.fixture(scope="module")
def robust_run(digit_tree, tmp_path_factory):
    """A run of PGD-AT, from scratch."""
    out = tmp_path_factory.mktemp("runs") / "pgd_at"
    recipe = ["--recipe", "pgd_at", "--attack.steps", "1"]
    train.main([*SMALL.split(), *recipe, "--data-dir", str(digit_tree), "--out", str(out)])
    return out


@pytest.mark.parametrize("recipe", [recipe.__name__ for recipe in OF_OTHERS])
def test_a_run_of_each_recipe(recipe, digit_tree, robust_run, tmp_path):
    from safetensors.torch import load_file

    out = tmp_path / recipe
    more = {"rift": ["--held-out", "40", "--climbs", "1", "--pretrained", str(robust_run)]}.get(recipe, [])
    config = find_recipe(recipe)
    if isinstance(config.attack, PGD):
        more = [*more, "--attack.steps", "1"]
    if config.method.begins == "natural":
        more = [*more, *PRETRAIN]
    if recipe == "pgd_at":
        out = robust_run
    else:
        flags = ["--recipe", recipe, "--matched", *more, "--data-dir", str(digit_tree), "--out", str(out)]
        train.main([*SMALL.split(), *flags])
    result = json.loads((out / "result.json").read_text())
    label, begins = config.method.label, config.method.begins
    assert set(result["models"]) == {label} | ({begins} - {"scratch"})
    assert (out / f"{begins}.safetensors").exists() == (begins != "scratch")
    assert result["models"][label]["pgd20"]["n"] == 10 and math.isfinite(result["seconds"]["finetuning"]["wall"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert ("gap_linf" in lines[-1]) == (begins == "natural") and ("own_gap_linf" in lines[-1]) == (recipe != "rift")
    assert load_file(out / "model.safetensors").keys() == load_file(robust_run / "model.safetensors").keys()
    if recipe == "rift":
        choices = result["rift"]
        assert (
            choices["module"] in choices["criticality"]
            and len(choices["mixtures"]) == 11
            and 0 <= choices["share"] <= 1
        )
        assert len(choices["criticality"]) == 10  # seven 3x3 convolutions, two shortcuts, the classifier
    assert callable(fastafd.evaluate)  # training does not import the verb of the same name
    if recipe == "free_at":
        assert lines[-1]["step"] == 8 * (240 // 16)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--recipe rift --held-out 40", "starts from an adversarially trained model"),
        ("--recipe pgd_at --pretrained example", "starts from fresh weights"),
        ("--recipe arrest --attack.random-start false", "got false, takes true with ARREST"),
        ("--recipe free_at --attack.steps 3", "no such flag"),
    ],
)
def test_mistakes(words, message, digit_tree, tmp_path):
    from fastafd.settings import UsageError

    with pytest.raises(UsageError, match=message):
        train.main([*SMALL.split(), *words.split(), "--data-dir", str(digit_tree), "--out", str(tmp_path / "x")])
