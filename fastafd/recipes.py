"""Recipes: functions that return a complete config, one for each published row and one for the embedded data set.

A variant changes fields of another recipe. The paper and its released code differ, so each has a recipe, `paper` and
`released`:

|                     | paper                          | released (github.com/changzhang777/AFD, tl+sl.py)            |
| lr                  | 0.0025                         | 0.025                                                        |
| beta, weight decay  | 0.25 and 5e-4, one step (Eq.6) | 0.25, 5e-4, but the rest is stepped twice: 2 beta and 1e-3   |
| L1 reaches          | D2 alone                       | D2, and the shared classifier twice: classifier_alpha 2alpha |
| training PGD's step | not given; 2/255 here          | 0.007                                                        |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType

from fastafd.attacks import KLPGD, PGD, Ball
from fastafd.config import SGD, PretrainConfig, Task, TrainConfig
from fastafd.methods import AFD, AFKD, ARREST, ATAS, PGDAT, TRADES, VAFT, FreeAT, GradAlign, RiFT
from fastafd.settings import UsageError, unknown

# Epochs 1-10 of 20 at lr, then x4/5 at 11, halved at 13, 15, 17 and 19 (released code; "the same as Suzuki et al.").
AFD_ATTACK = PGD(eps=8 / 255, step_size=0.007, steps=10, random_start=True)  # of the released code
FLAT_THEN_HALVING = ((0.0, 1.0), (0.5, 0.8), (0.6, 0.4), (0.7, 0.2), (0.8, 0.1), (0.9, 0.05))


def released() -> TrainConfig:
    """The released code, whose three optimizer steps for a batch are one step here: see the table above."""
    alpha, beta = 0.05, 0.25
    return TrainConfig(
        recipe="released",
        task=Task(),
        method=AFD(alpha=alpha, beta=2 * beta, gamma=25.0, classifier_alpha=2 * alpha),
        attack=AFD_ATTACK,
        sgd=SGD(20, 128, 0.025, FLAT_THEN_HALVING, weight_decay=1e-3),
        pretrain=PretrainConfig().sgd,
        d2_weight_decay=5e-4,
        ema_decay=0.999,
    )


def paper() -> TrainConfig:
    """Eq. 6 and the section "Optimization Details" as printed."""
    base = released()
    return replace(
        base,
        recipe="paper",
        method=AFD(alpha=0.05, beta=0.25, gamma=25.0, classifier_alpha=0.0),
        attack=replace(AFD_ATTACK, step_size=2 / 255),
        sgd=replace(base.sgd, lr=0.0025, weight_decay=5e-4),
    )


def released_cifar100() -> TrainConfig:
    """The released code's run on CIFAR-100; the names of its checkpoint folders say alpha 0.1, beta 1, gamma 50."""
    base = released()
    return replace(
        base,
        recipe="released_cifar100",
        task=replace(base.task, dataset="cifar100"),
        method=AFD(alpha=0.1, beta=2 * 1.0, gamma=50.0, classifier_alpha=2 * 0.1),
    )


def digits() -> TrainConfig:
    """The embedded data set, scikit-learn's digits, with a small ResNet: a minute on one CPU core.

    Within 8/255 a natural model of digits is half robust, so the ball is that of 45/255, where it is not at all.
    """
    base = released()
    return replace(
        base,
        recipe="digits",
        task=replace(base.task, arch="resnet8_half", dataset="digits", image_size=8, loader="resident"),
        attack=replace(AFD_ATTACK, eps=45 / 255, steps=5, step_size=15 / 255),
        sgd=replace(base.sgd, epochs=20, batch_size=64),
        pretrain=replace(base.pretrain, epochs=14, batch_size=64, lr=0.1),
        log_every=11,
        autoattack_n=50,
    )


def vaft() -> TrainConfig:
    """Vanilla adversarial fine-tuning as the AFD authors ran it: their ARREST.py with both of its terms off.

    Attack steps of 2/255, weight decay 5e-4, no weight average; the schedule and the epochs are those of `released`.
    """
    base = released()
    return replace(
        base,
        recipe="vaft",
        method=VAFT(),
        attack=replace(AFD_ATTACK, step_size=2 / 255),
        sgd=replace(base.sgd, weight_decay=5e-4),
        ema_decay=0.0,
    )


def afkd() -> TrainConfig:
    """vAFT and the distillation of representations, weight 50, as the AFD authors ran it (their ARREST.py --RGKD)."""
    return replace(vaft(), recipe="afkd", method=AFKD(rgkd=50.0))


def arrest() -> TrainConfig:
    """AFKD with noisy replay, 30 degrees in the first ten epochs, as the AFD authors ran it (ARREST.py --RGKD --NR)."""
    return replace(vaft(), recipe="arrest", method=ARREST(rgkd=50.0, replay_angle=30.0, replay_epochs=10))


def vaft_d() -> TrainConfig:
    """Table 3, vAFT+D: `released` without the pull towards the teacher."""
    base = released()
    return replace(base, recipe="vaft_d", method=AFD(alpha=0.05, beta=0.5, gamma=0.0, classifier_alpha=0.1))


def vaft_a() -> TrainConfig:
    """Table 3, vAFT+A: `released` with the pull towards the teacher alone, through D1."""
    return replace(released(), recipe="vaft_a", method=AFD(alpha=0.0, beta=0.0, gamma=25.0, classifier_alpha=0.0))


def pgd_at() -> TrainConfig:
    """PGD adversarial training by the paper's appendix: 120 epochs, lr x0.1 at 75, 90 and 100, weight decay 2e-4."""
    return replace(
        vaft(),
        recipe="pgd_at",
        method=PGDAT(),
        sgd=SGD(120, 128, 0.1, ((0.0, 1.0), (75 / 120, 0.1), (90 / 120, 0.01), (100 / 120, 0.001)), weight_decay=2e-4),
    )


def trades() -> TrainConfig:
    """TRADES by the paper's appendix; beta and attack of its released code, but eps 8/255 instead of 0.031."""
    attack = KLPGD(eps=8 / 255, step_size=0.007, steps=10, random_start=True)
    return replace(pgd_at(), recipe="trades", method=TRADES(kl_weight=6.0), attack=attack)


def free_at() -> TrainConfig:
    """Free-AT by locuslab/fast_adversarial: 10 epochs of 8 passes; lr rises to 0.04 at half time and falls to 0."""
    return replace(
        vaft(),
        recipe="free_at",
        method=FreeAT(replays=8),
        attack=Ball(8 / 255),
        sgd=SGD(10, 128, 0.04, ((0.0, 0.0), (0.5, 1.0), (1.0, 0.0)), "lines"),
    )


def fgsm_ga() -> TrainConfig:
    """FGSM with GradAlign by its released scripts for 8/255.

    30 epochs; lr rises to 0.3 at two fifths and falls to 0.
    """
    return replace(
        vaft(),
        recipe="fgsm_ga",
        method=GradAlign(align_weight=0.2, step_factor=1.25),
        attack=Ball(8 / 255),
        sgd=SGD(30, 128, 0.3, ((0.0, 0.0), (0.4, 1.0), (1.0, 0.0)), "lines"),
    )


def atas() -> TrainConfig:
    """ATAS by its released script for CIFAR: 30 epochs, lr x0.1 at 24 and 28."""
    return replace(
        vaft(),
        recipe="atas",
        method=ATAS(),
        attack=Ball(8 / 255),
        sgd=SGD(30, 128, 0.1, ((0.0, 1.0), (24 / 30, 0.1), (28 / 30, 0.01))),
    )


def rift() -> TrainConfig:
    """RiFT by its released code: 10 epochs of lr 0.001, x0.1 at the fifth; PGD of 10 steps of 2/255 to choose by."""
    return replace(
        vaft(), recipe="rift", method=RiFT(), sgd=SGD(10, 128, 0.001, ((0.0, 1.0), (0.5, 0.1)), weight_decay=5e-4)
    )


OF_AFD = (released, paper, released_cifar100, digits, vaft_d, vaft_a)
OF_OTHERS = (vaft, afkd, arrest, rift, pgd_at, trades, free_at, fgsm_ga, atas)
RECIPES: MappingProxyType[str, Callable[[], TrainConfig]] = MappingProxyType(
    {recipe.__name__: recipe for recipe in (*OF_AFD, *OF_OTHERS)}
)


def matched(config: TrainConfig) -> TrainConfig:
    """Another method under the conditions of `released`: schedule, weight decay, attack, BatchNorm mode, average.

    Of the attack, the radius, the steps and the start change; the loss that it climbs stays the method's. A method that
    makes its attacked images itself keeps its attack.
    """
    if isinstance(config.method, AFD):
        raise UsageError(
            f"matched: recipe {config.recipe} is AFD itself; takes a recipe of another method, such as vaft"
        )
    afd = released()
    attack = replace(config.attack, **vars(AFD_ATTACK)) if isinstance(config.attack, PGD) else config.attack
    return replace(config, matched=True, attack=attack, attack_bn=afd.attack_bn, sgd=afd.sgd, ema_decay=afd.ema_decay)


def find_recipe(name: object) -> TrainConfig:
    """The config of that name. UsageError, with the most similar name, if there is none."""
    if not isinstance(name, str) or name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]()
