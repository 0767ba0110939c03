"""From the weights that a method begins with to the model that is evaluated: each method's step, RiFT's three parts."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastafd.attacks import PGD
from fastafd.config import TrainConfig
from fastafd.console import Console
from fastafd.data import Augment, Dataset, Loader, Split
from fastafd.device import true_fp32
from fastafd.files import as_json, save_text
from fastafd.methods import ATAS, FreeAT, GradAlign, RiFT
from fastafd.models import SplitNet, disentangle, split
from fastafd.training.fast_at import ATASStep, FreeStep, GradAlignStep, Replayed
from fastafd.training.loop import fit
from fastafd.training.optim import make_sgd
from fastafd.training.rift import attacked_images, choose_mixture, criticality
from fastafd.training.step import TrainStep


def step_of(
    config: TrainConfig, start: nn.Module, loader: Loader, augment: Augment, console: Console, module: str = ""
) -> TrainStep:
    """The step of the config's method, from the weights of `start`; of RiFT one that trains `module` alone."""
    task, sgd, method, attack = config.task, config.sgd, config.method, config.attack
    around: dict[str, Any] = {"ema_decay": config.ema_decay, "amp": task.amp, "engine": task.engine}
    around |= {"augment": augment, "seed": task.seed, "console": console}
    if isinstance(method, RiFT):
        net = copy.deepcopy(start).requires_grad_(False)
        net.get_submodule(module).requires_grad_()
        return TrainStep(net, make_sgd(net, sgd.lr, sgd.momentum, sgd.weight_decay), method, **around)
    model = disentangle(start) if method.disentangled else split(start)
    optimizer = make_sgd(model, sgd.lr, sgd.momentum, sgd.weight_decay, config.d2_weight_decay)
    around["teacher"] = start if method.begins == "natural" else None
    if isinstance(method, FreeAT):
        return FreeStep(model, optimizer, method, ball=attack, **around)
    if isinstance(method, GradAlign):
        return GradAlignStep(model, optimizer, method, ball=attack, **around)
    if isinstance(method, ATAS):
        return ATASStep(model, optimizer, method, ball=attack, loader=loader, epochs=sgd.epochs, **around)
    assert isinstance(attack, PGD)
    around |= {"attack": attack, "attack_bn": config.attack_bn, "per_epoch": len(loader)}
    return TrainStep(model, optimizer, method, **around)


def fit_by(
    config: TrainConfig, step: TrainStep, loader: Loader, dataset: Dataset, folder: Path, console: Console
) -> dict[str, float]:
    """The epochs of the config; seconds by phase."""
    return fit(
        step,
        Replayed(loader, config.method.replays) if isinstance(config.method, FreeAT) else loader,
        config.sgd,
        folder,
        console,
        label=config.method.label,
        log_every=config.log_every,
        save_every=config.save_every,
        identity=dataset.train.identity,
    )


def train_by(
    config: TrainConfig, start: nn.Module, loader: Loader, dataset: Dataset, folder: Path, console: Console
) -> tuple[SplitNet, dict[str, float]]:
    """Train `start` by the config's method: the average that is evaluated, seconds by phase."""
    torch.manual_seed(config.task.seed)  # for networks that draw in their forward; all else has generators of its own
    step = step_of(config, start, loader, Augment(dataset.padding, dataset.flip, config.task.seed), console)
    seconds = fit_by(config, step, loader, dataset, folder, console)
    tuned = step.averaged()
    assert isinstance(tuned, SplitNet)
    return tuned, seconds


def rift_by(
    config: TrainConfig,
    robust: nn.Module,
    held: Split,
    loader: Loader,
    dataset: Dataset,
    folder: Path,
    console: Console,
) -> tuple[SplitNet, dict[str, float], dict[str, Any]]:
    """RiFT from `robust`: the mixture, seconds by phase, what was chosen on the held-out images and why."""
    task, sgd, method, attack = config.task, config.sgd, config.method, config.attack
    assert isinstance(method, RiFT) and isinstance(attack, PGD)
    began = time.monotonic()
    chosen = folder / "criticality.json"
    if not chosen.exists():
        with true_fp32():
            x_adv, y = attacked_images(robust, held, attack, sgd.batch_size, task.seed)
            radius, climbs = method.radius, method.climbs
            rises = criticality(robust, x_adv, y, radius=radius, climbs=climbs, batch_size=512, console=console)
        save_text(chosen, as_json({"criticality": rises, "seconds": time.monotonic() - began}))
    found = json.loads(chosen.read_text())
    of_each: dict[str, float] = found["criticality"]
    module = min(of_each, key=lambda name: of_each[name])
    console.line(f"RiFT: {module} is the least critical of {len(of_each)} modules")

    augment = Augment(dataset.padding, dataset.flip, task.seed)
    step = step_of(config, robust, loader, augment, console, module)
    seconds = fit_by(config, step, loader, dataset, folder, console)
    began = time.monotonic()
    with true_fp32():
        drop = method.robust_drop / 100
        mixed, rows, share = choose_mixture(robust, step.averaged(), held, attack, drop, task.seed, console)
    console.line(f"RiFT: {share:.1f} of the fine-tuned weights, {1 - share:.1f} of the robust ones")
    seconds |= {"criticality": found["seconds"], "mixing": time.monotonic() - began}
    seconds["wall"] += seconds["criticality"] + seconds["mixing"]
    return split(mixed), seconds, {"module": module, "share": share, "mixtures": rows, "criticality": of_each}
