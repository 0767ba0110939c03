"""Recipes: functions that return a complete config, one for each published row and one for the embedded data set.

A variant changes fields of another recipe. Where the paper and its released code differ there are two, `paper` and
`released`; the numbers of both and their sources:

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

from fastafd.attacks import PGD
from fastafd.config import SGD, PretrainConfig, Task, TrainConfig
from fastafd.methods import AFD, VAFT
from fastafd.settings import UsageError, unknown

# Epochs 1-10 of 20 at lr, then x4/5 at 11 and halved at 13, 15, 17 and 19 (released code; "the same as Suzuki et al.").
FLAT_THEN_HALVING = ((0.0, 1.0), (0.5, 0.8), (0.6, 0.4), (0.7, 0.2), (0.8, 0.1), (0.9, 0.05))


def released() -> TrainConfig:
    """What one step of the released code amounts to, as one step: see the table above."""
    alpha, beta = 0.05, 0.25
    return TrainConfig(
        recipe="released",
        task=Task(),
        method=AFD(alpha=alpha, beta=2 * beta, gamma=25.0, classifier_alpha=2 * alpha),
        attack=PGD(eps=8 / 255, step_size=0.007, steps=10, random_start=True),
        sgd=SGD(20, 128, 0.025, FLAT_THEN_HALVING, momentum=0.9, weight_decay=1e-3),
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
        attack=replace(base.attack, step_size=2 / 255),
        sgd=replace(base.sgd, lr=0.0025, weight_decay=5e-4),
    )


def released_cifar100() -> TrainConfig:
    """The released code's CIFAR-100 run, from the names of its checkpoint folders: alpha 0.1, beta 1, gamma 50."""
    base = released()
    return replace(
        base,
        recipe="released_cifar100",
        task=replace(base.task, dataset="cifar100"),
        method=AFD(alpha=0.1, beta=2 * 1.0, gamma=50.0, classifier_alpha=2 * 0.1),
    )


def digits() -> TrainConfig:
    """The embedded data set: scikit-learn's digits and a small ResNet, minutes on two CPU cores."""
    base = released()
    return replace(
        base,
        recipe="digits",
        task=replace(base.task, arch="resnet8_half", dataset="digits"),
        attack=replace(base.attack, steps=7, step_size=2 / 255),
        sgd=replace(base.sgd, epochs=7, batch_size=64),
        pretrain=replace(base.pretrain, epochs=8, batch_size=64, lr=0.1),
        log_every=11,
        autoattack_n=20,
    )


def vaft() -> TrainConfig:
    """Vanilla adversarial fine-tuning as the AFD authors ran it (their ARREST.py with both of its terms off).

    Steps of 2/255, weight decay 5e-4 and no average; schedule, rate and epochs are those of `released`.
    """
    base = released()
    return replace(
        base,
        recipe="vaft",
        method=VAFT(),
        attack=replace(base.attack, step_size=2 / 255),
        sgd=replace(base.sgd, weight_decay=5e-4),
        ema_decay=0.0,
    )


RECIPES: MappingProxyType[str, Callable[[], TrainConfig]] = MappingProxyType(
    {recipe.__name__: recipe for recipe in (released, paper, released_cifar100, digits, vaft)}
)


def matched(config: TrainConfig) -> TrainConfig:
    """Another method under the conditions of `released`: schedule, weight decay, attack, BatchNorm mode, average."""
    if isinstance(config.method, AFD):
        raise UsageError(f"matched: recipe {config.recipe} is AFD itself; takes another method's, such as vaft")
    afd = released()
    return replace(
        config, matched=True, attack=afd.attack, attack_bn=afd.attack_bn, sgd=afd.sgd, ema_decay=afd.ema_decay
    )


def find_recipe(name: str) -> TrainConfig:
    """The config of that name, or UsageError with the nearest one."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]()
