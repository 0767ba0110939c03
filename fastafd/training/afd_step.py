"""The AFD step for any training loop: a recipe's step on the user's model, teacher and optimizer."""

from __future__ import annotations

from dataclasses import fields as fields_of
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastafd.attacks import PGD
from fastafd.config import TrainConfig
from fastafd.console import Console
from fastafd.data import Augment
from fastafd.methods import AFD
from fastafd.models import Disentangled
from fastafd.recipes import find_recipe
from fastafd.settings import UsageError, unknown
from fastafd.training.step import TrainStep, check_attack


class AFDStep(TrainStep):
    """The AFD step for any training loop: `metrics = AFDStep(model, teacher, optimizer)(x, y)`.

    - model: `fastafd.disentangle(net)`.
    - teacher: the natural classifier that `net` started from; the step makes a frozen copy of it.
    - optimizer: over model.parameters(); `fastafd.make_sgd` gives D2 a weight decay of its own, as the recipes do.
    - recipe: the name of a recipe, or a config.
    - attack: replaces the recipe's attack. A subclass of `PGD` may have its own `ascent`, `target`, `draw` or `climb`.
    - amp: "auto" (bf16 on a GPU that has it, else fp32), "bf16", "fp16" or "fp32".
    - engine: "fast" (compiled, the attack on a snapshot with folded BatchNorms, on CUDA one graph a step), "reference"
      (plain PyTorch), or "auto": fast on CUDA, reference on a CPU.
    - augment: crop and flip of uint8 batches, such as `fastafd.data.Augment(padding=4, flip=True, seed=0)`.
    - fields: replace fields of the recipe: alpha, beta, gamma, classifier_alpha, eps, step_size, steps, random_start,
      attack_bn, ema_decay, seed.

    The fast engine turns an SGD optimizer into a fused one and its learning rates into tensors; the weight decay and
    the momentum of the first steps stay in use. It puts weights that are not channels_last into that layout, in place,
    and says so. It compiles anew for each shape of a batch.
    A layer of the model in eval mode, such as a frozen BatchNorm, stays in it, unless the whole model is in eval mode.
    `averaged()` is the model to evaluate, `averaged().merge()` the plain classifier; both can be trained further.
    Raises UsageError for an unknown recipe or field, ValueError for a model without a disentangler and for an optimizer
    that lacks weights of the model.
    """

    def __init__(
        self,
        model: Disentangled,
        teacher: nn.Module,
        optimizer: torch.optim.Optimizer,
        recipe: str | TrainConfig = "released",
        attack: PGD | None = None,
        amp: str = "auto",
        engine: str = "auto",
        augment: Augment | None = None,
        console: Console | None = None,
        **fields: Any,
    ):
        if not isinstance(model, Disentangled):
            raise ValueError(f"AFDStep takes fastafd.disentangle(net), not {type(model).__name__}")
        config = find_recipe(recipe) if isinstance(recipe, str) else recipe
        if not isinstance(config.method, AFD):
            raise UsageError(f"recipe: {config.recipe} is of {config.method.label}, AFDStep takes a recipe of AFD")
        if attack is None:
            assert isinstance(config.attack, PGD)
            attack = config.attack
        attack = check_attack(attack, config.method)
        of_step: dict[str, Any] = {"attack_bn": config.attack_bn, "ema_decay": config.ema_decay}
        of_step["seed"] = config.task.seed
        of_method = vars(config.method).keys()
        of_attack = [field.name for field in fields_of(attack)]
        for name in fields:
            if name not in (*of_method, *of_attack, *of_step):
                raise unknown("AFDStep", name, [*of_method, *of_attack, *of_step])
        attack_fields = {name: fields[name] for name in fields if name in of_attack}
        super().__init__(
            model,
            optimizer,
            replace(config.method, **{name: fields[name] for name in fields if name in of_method}),
            teacher=teacher,
            attack=replaced(attack, attack_fields),
            amp=amp,
            engine=engine,
            augment=augment,
            console=console,
            **of_step | {name: fields[name] for name in fields if name in of_step},
        )

    def averaged(self) -> Disentangled:
        """The model to evaluate or merge: a copy of the weight average, or of the model if `ema_decay` is 0."""
        model = super().averaged()
        assert isinstance(model, Disentangled)
        return model


def replaced(attack: PGD, fields: dict[str, Any]) -> PGD:
    """The attack with other values of its fields. UsageError if only its own __init__ knows how to make it."""
    if not fields:
        return attack
    made = {kind for kind in type(attack).__mro__ if "__init__" in vars(kind) and issubclass(kind, PGD)}
    own = [kind for kind in made if "__dataclass_params__" not in vars(kind)]
    if own or vars(attack).keys() - {field.name for field in fields_of(attack)}:
        names = " and ".join(fields)
        raise UsageError(
            f"{names}: pass it to {type(attack).__name__}, not to AFDStep: it has an __init__ or attributes of its own"
        )
    return replace(attack, **fields)
