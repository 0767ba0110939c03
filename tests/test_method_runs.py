"""The other methods' recipes: their published settings, AFD's own conditions, and a whole run of each."""

from __future__ import annotations

import json
import math

import pytest

from fastafd import train
from fastafd.attacks import PGD
from fastafd.recipes import OF_OTHERS, find_recipe, matched
from fastafd.training.optim import learning_rate


def test_published_settings_of_the_others():
    """The numbers of their sources, once more, so that a slip in a recipe is seen."""
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
def test_matched_is_afds_own_conditions(recipe):
    own, afd = find_recipe(recipe), find_recipe("released")
    ours = matched(own)
    assert (ours.sgd, ours.attack_bn, ours.ema_decay, ours.method) == (afd.sgd, afd.attack_bn, 0.999, own.method)
    assert type(ours.attack) is type(own.attack) and ours.attack.eps == afd.attack.eps
    if isinstance(own.attack, PGD):
        assert vars(ours.attack) == vars(afd.attack)


def test_flags_go_over_what_is_matched(tmp_path):
    given = train.parse(["--recipe", "vaft", "--matched", "--lr", "0.01", "--attack.steps", "3"])
    assert (given.sgd.lr, given.attack.steps, given.attack.step_size, given.sgd.weight_decay) == (0.01, 3, 0.007, 1e-3)
    written = tmp_path / "config.yaml"
    written.write_text("recipe: vaft\nmatched: true\nlr: 0.01\n")
    assert train.parse(["--config", str(written)]) == train.parse(["--recipe", "vaft", "--matched", "--lr", "0.01"])
    assert train.parse(["--recipe", "vaft"]).attack.step_size == 2 / 255


SMALL = "--dataset imagefolder --arch resnet8 --batch-size 16 --epochs 1 --log-every 5 --eval-n 10 --autoattack-n 0"
SMALL += " --loader resident --device cpu --pretrain.epochs 1 --pretrain.batch-size 16"


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
    if recipe == "pgd_at":
        out = robust_run
    else:
        given = ["--recipe", recipe, "--matched", *more, "--data-dir", str(digit_tree), "--out", str(out)]
        train.main([*SMALL.split(), *given])
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
        found = result["rift"]
        assert found["module"] in found["criticality"] and len(found["mixtures"]) == 11 and 0 <= found["share"] <= 1
        assert len(found["criticality"]) == 10  # seven 3x3 convolutions, two shortcuts, the classifier
    if recipe == "free_at":
        assert lines[-1]["step"] == 8 * (240 // 16)


@pytest.mark.parametrize(
    "words, said",
    [
        ("--recipe rift --held-out 40", "begins with an adversarially trained model"),
        ("--recipe pgd_at --pretrained example", "begins with fresh weights"),
        ("--recipe arrest --attack.random-start false", "ARREST, which replays its noise"),
        ("--recipe free_at --attack.steps 3", "no such flag"),
    ],
)
def test_mistakes(words, said, digit_tree, tmp_path):
    from fastafd.settings import UsageError

    with pytest.raises(UsageError, match=said):
        train.main([*SMALL.split(), *words.split(), "--data-dir", str(digit_tree), "--out", str(tmp_path / "x")])
