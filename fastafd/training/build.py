"""Which step trains a method, and the whole training: from the weights that it starts from to the model to evaluate.

A method without an entry in `STEPS` is trained by `TrainStep`, one without an entry in `TRAININGS` by `fine_tune`.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastafd.attacks import PGD
from fastafd.config import TrainConfig
from fastafd.console import Console
from fastafd.data import Augment, Dataset, Loader, Split
from fastafd.device import true_fp32
from fastafd.files import as_json, save_text
from fastafd.methods import ATAS, FreeAT, GradAlign, Method, RiFT
from fastafd.models import SplitNet, disentangle, split
from fastafd.training.fast_at import ATASStep, FreeStep, GradAlignStep
from fastafd.training.loop import fit
from fastafd.training.optim import make_sgd
from fastafd.training.rift import attacked_images, choose_mixture, criticality
from fastafd.training.step import TrainStep

STEPS: dict[type[Method], type[TrainStep]] = {FreeAT: FreeStep, GradAlign: GradAlignStep, ATAS: ATASStep}


class Trained(NamedTuple):
    """model: the one to evaluate; seconds of the training by phase; extra: what the training adds to result.json."""

    model: SplitNet
    seconds: dict[str, float]
    extra: dict[str, Any]


def train(
    config: TrainConfig,
    start: nn.Module,
    held_out: Split | None,
    loader: Loader,
    dataset: Dataset,
    folder: Path,
    console: Console,
) -> Trained:
    """Train the weights of `start` by the config's method.

    held_out: the images that the method keeps out of its training, None if it keeps none. loader: the training images
    of `dataset`. folder: the run folder, which gets the log and the checkpoint.
    """
    training = TRAININGS.get(type(config.method), fine_tune)
    return training(config, start, held_out, loader, dataset, folder, console)


def build_step(
    config: TrainConfig, start: nn.Module, loader: Loader, augment: Augment, console: Console, module: str = ""
) -> TrainStep:
    """The step of the config's method, from the weights of `start`.

    module: the name of the one module to train, all others being frozen; empty: train all of the model.
    """
    task, sgd, method = config.task, config.sgd, config.method
    if module:
        model: nn.Module = copy.deepcopy(start).requires_grad_(False)
        model.get_submodule(module).requires_grad_()
    else:
        model = disentangle(start) if method.disentangled else split(start)
    return STEPS.get(type(method), TrainStep)(
        model,
        make_sgd(model, sgd.lr, sgd.momentum, sgd.weight_decay, config.d2_weight_decay),
        method,
        teacher=start if method.begins == "natural" else None,
        attack=config.attack,
        attack_bn=config.attack_bn,
        ema_decay=config.ema_decay,
        amp=task.amp,
        engine=task.engine,
        augment=augment,
        seed=task.seed,
        loader=loader,
        epochs=sgd.epochs,
        console=console,
    )


def fine_tune(
    config: TrainConfig,
    start: nn.Module,
    held_out: Split | None,
    loader: Loader,
    dataset: Dataset,
    folder: Path,
    console: Console,
) -> Trained:
    """The training of every method that trains the whole model."""
    torch.manual_seed(config.task.seed)  # for networks that draw random numbers; all else has its own generators
    step = build_step(config, start, loader, Augment(dataset.padding, dataset.flip, config.task.seed), console)
    seconds = run_epochs(config, step, loader, dataset, folder, console)
    model = step.averaged()
    assert isinstance(model, SplitNet)
    return Trained(model, seconds, {})


def fine_tune_one_module(
    config: TrainConfig,
    start: nn.Module,
    held_out: Split | None,
    loader: Loader,
    dataset: Dataset,
    folder: Path,
    console: Console,
) -> Trained:
    """RiFT: the mixture of the robust model `start` and of the one whose least critical module was fine-tuned.

    `criticality.json` in the run folder keeps the first part for a resumed run. `extra` says which module and which
    mixture were chosen on the held-out images, and why.
    """
    task, sgd, method, attack = config.task, config.sgd, config.method, config.attack
    assert isinstance(method, RiFT) and isinstance(attack, PGD) and held_out is not None
    began = time.monotonic()
    file = folder / "criticality.json"
    if not file.exists():
        with true_fp32():
            x_adv, y = attacked_images(start, held_out, attack, sgd.batch_size, task.seed)
            radius, climbs = method.radius, method.climbs
            rises = criticality(start, x_adv, y, radius=radius, climbs=climbs, batch_size=512, console=console)
        save_text(file, as_json({"criticality": rises, "seconds": time.monotonic() - began}))
    saved = json.loads(file.read_text())
    by_module: dict[str, float] = saved["criticality"]
    module = min(by_module, key=lambda name: by_module[name])
    console.line(f"RiFT: {module} is the least critical of {len(by_module)} modules")

    augment = Augment(dataset.padding, dataset.flip, task.seed)
    step = build_step(config, start, loader, augment, console, module)
    seconds = run_epochs(config, step, loader, dataset, folder, console)
    began = time.monotonic()
    with true_fp32():
        drop = method.robust_drop / 100
        mixed, rows, share = choose_mixture(start, step.averaged(), held_out, attack, drop, task.seed, console)
    console.line(f"RiFT: {share:.1f} of the fine-tuned weights, {1 - share:.1f} of the robust ones")
    seconds |= {"criticality": saved["seconds"], "mixing": time.monotonic() - began}
    seconds["wall"] += seconds["criticality"] + seconds["mixing"]
    choices = {"module": module, "share": share, "mixtures": rows, "criticality": by_module}
    return Trained(split(mixed), seconds, {"rift": choices})


TRAININGS: dict[type[Method], Callable[..., Trained]] = {RiFT: fine_tune_one_module}


def run_epochs(
    config: TrainConfig, step: TrainStep, loader: Loader, dataset: Dataset, folder: Path, console: Console
) -> dict[str, float]:
    """Train for the config's epochs; returns seconds by phase."""
    return fit(
        step,
        step.feed(loader),
        config.sgd,
        folder,
        console,
        label=config.method.label,
        log_every=config.log_every,
        save_every=config.save_every,
        identity=dataset.train.fingerprint,
    )
