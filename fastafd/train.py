"""python -m fastafd.train: from a natural classifier to a robust one, evaluated and saved.

    python -m fastafd.train --recipe digits                      # the embedded data set, minutes on two CPU cores
    python -m fastafd.train --arch wrn34_10                      # CIFAR-10; a natural model is pre-trained first
    python -m fastafd.train --pretrained example                 # from the ResNet-18 that pyautoattack ships
    python -m fastafd.train --recipe vaft --matched              # another method, under AFD's conditions
    python -m fastafd.train --resume runs/NAME                   # go on, step-exactly, after any kind of stop

A run folder holds config.yaml, env.json, metrics.jsonl, last.pt, natural.safetensors (the teacher),
model.safetensors (merged), samples.npz (for reports) and result.json.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import nn

from fastafd import cli
from fastafd.attacks import PGD
from fastafd.checkpoint import load_model_about, save_model
from fastafd.config import PretrainConfig, TrainConfig
from fastafd.console import Console
from fastafd.data import Dataset, Split, load_dataset
from fastafd.device import provenance, resolve_amp, resolve_device
from fastafd.evaluation import ATTACKS, evaluate, show
from fastafd.files import as_json, save_text
from fastafd.methods import RiFT
from fastafd.models import Disentangled, check_model
from fastafd.recipes import find_recipe, matched
from fastafd.samples import save_samples
from fastafd.settings import UsageError
from fastafd.training.build import rift_by, train_by
from fastafd.training.engine import engine_of
from fastafd.training.natural import about, fresh_model, given_model, loader_of, pretrain
from fastafd.training.rift import hold_out


def main(argv: list[str]) -> None:
    began = time.monotonic()
    console = Console()
    config, folder = configure(argv)
    task, method = config.task, config.method
    check_model(task.arch, task.normalize)
    recipe = find_recipe(config.recipe)
    device = resolve_device(task.device)
    task = dataclasses.replace(task, engine=engine_of(method, task.engine, device, console))  # a resumed run keeps it
    config = dataclasses.replace(config, task=task)
    check_for_method(config)
    environment = provenance(device) | {"python": platform.python_version(), "amp": resolve_amp(task.amp, device)}

    # Images, and the weights that the method begins with; the run keeps a copy: it is the teacher after a resume too.
    dataset = load_dataset(task.dataset, task.data_dir, task.image_size)
    classes = len(dataset.classes)
    console.line(
        f"{dataset.name}: {len(dataset.train)} training and {len(dataset.test)} test images of {classes} classes, "
        f"{dataset.image_size} x {dataset.image_size}; {task.arch} on {environment['device']} in {environment['amp']}, "
        f"{task.engine} engine"
    )
    held: Split | None = None
    if isinstance(method, RiFT):
        train, held = hold_out(dataset.train, method.held_out, task.seed)
        dataset = dataclasses.replace(dataset, train=train)
    loader = loader_of(task, config.sgd.batch_size, dataset, device, console)
    given = start_of(config, folder, dataset, console)
    folder.mkdir(parents=True, exist_ok=True)
    cli.write_config(folder, config)
    save_text(folder / "env.json", as_json(environment))
    console.line(f"run folder: {folder}; batches from the {loader.kind} loader")
    start, origin = given or pretrain(pretraining(config), dataset, console)
    kept = folder / f"{method.begins}.safetensors"
    if method.begins != "scratch" and not kept.exists():
        save_model(kept, start, origin)
    start = start.to(device)

    # Training: what comes out is a plain classifier, and of a disentangled one also what reads its confused features.
    more: dict[str, Any] = {}
    if held is not None:
        tuned, seconds, more["rift"] = rift_by(config, start, held, loader, dataset, folder, console)
    else:
        tuned, seconds = train_by(config, start, loader, dataset, folder, console)
    trained = tuned.merge()
    save_model(folder / "model.safetensors", trained, about(task, dataset))

    # All models on the same test images.
    evaluated_from = time.monotonic()
    attacks = ATTACKS if config.autoattack_n and classes >= 4 else ATTACKS[:2]
    if config.autoattack_n and classes < 4:
        console.line(f"AutoAttack is left out: its targeted losses need 4 classes, {dataset.name} has {classes}")
    evaluated: dict[str, tuple[nn.Module, tuple[str, ...]]] = {}
    if method.begins != "scratch":
        evaluated[method.begins] = start, attacks
    evaluated[method.label] = trained, attacks
    if isinstance(tuned, Disentangled):
        evaluated[f"{method.label}, f2"] = tuned.merge_confused(), ATTACKS[:1]
    results = {
        name: evaluate(
            net,
            dataset.test,
            under,
            n=config.eval_n,
            autoattack_n=config.autoattack_n,
            seed=task.seed,
            console=console,
            label=name,
        )
        for name, (net, under) in evaluated.items()
    }
    save_samples(folder / "samples.npz", tuned, dataset.test, config.eval_n, task.seed)
    changed = cli.changes(matched(recipe) if config.matched else recipe, config)
    pretrains = method.begins == "natural" and config.pretrained is None
    summary: dict[str, Any] = {
        "models": results,
        "seconds": {
            # null for weights of unknown origin
            "pretraining": 0.0 if method.begins == "scratch" else origin.get("pretraining_seconds"),
            "finetuning": seconds,
            "evaluation": time.monotonic() - evaluated_from,
        },
        **more,
        "label": method.label,
        "dataset": {
            "name": dataset.name,
            "train": len(dataset.train),
            "test": len(dataset.test),
            "classes": dataset.classes,
        },
        "parameters": {"model": count_parameters(trained), "training": count_parameters(tuned)},
        "changed": {name: value for name, value in changed.items() if pretrains or not name.startswith("pretrain.")},
        "config": dataclasses.asdict(config),
        **json.loads((folder / "env.json").read_text()),
    }
    save_text(folder / "result.json", as_json(summary))
    show(results, console, f"{task.arch} on {dataset.name}, l-infinity, eps 8/255, Wilson 95 % intervals")
    console.line(f"{time.monotonic() - began:.0f} s; the robust classifier: {folder / 'model.safetensors'}")


def check_for_method(config: TrainConfig) -> None:
    """UsageError for settings that the method has no use for, or cannot do with, before anything is trained."""
    method, own = config.method, find_recipe(config.recipe)
    if method.replays_noise and isinstance(config.attack, PGD) and not config.attack.random_start:
        raise UsageError(f"attack.random_start: got false, takes true with {method.label}, which replays its noise")
    if config.attack_bn != "eval" and not (method.adversarial and method.attacks):
        raise UsageError(f"attack_bn: got {config.attack_bn!r}, takes eval: {method.label} has no attack of that kind")
    if config.attack_bn != "eval" and config.task.engine == "fast":
        raise UsageError(f"attack_bn: got {config.attack_bn!r}, takes eval with engine fast; reference has both")
    if config.d2_weight_decay != own.d2_weight_decay and not method.disentangled:
        raise UsageError(f"d2_weight_decay: {method.label} has no D2; this is a setting of AFD's recipes")


def count_parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def start_of(
    config: TrainConfig, folder: Path, dataset: Dataset, console: Console
) -> tuple[nn.Module, dict[str, Any]] | None:
    """The weights that the method begins with, and what is known of them; None where they are yet to be pre-trained."""
    begins, kept = config.method.begins, folder / f"{config.method.begins}.safetensors"
    if begins == "scratch":
        if config.pretrained is not None:
            raise UsageError(
                f"pretrained: got {config.pretrained}, and recipe {config.recipe} begins with fresh weights"
            )
        return fresh_model(config.task, dataset), {}
    if kept.exists():
        return load_model_about(kept)
    if config.pretrained is not None:
        return given_model(config.pretrained, config.task, dataset, console)
    if begins == "robust":
        raise UsageError(
            f"pretrained: got none, and recipe {config.recipe} begins with an adversarially trained model,"
            " such as the run folder of recipe pgd_at"
        )
    return None


def configure(argv: list[str]) -> tuple[TrainConfig, Path]:
    """The config and the run folder that the command line asks for; a resumed run keeps its own."""
    if "--resume" in argv or any(word.startswith("--resume=") for word in argv):
        words = argv[0].split("=", 1) + argv[1:]
        if len(words) != 2 or words[0] != "--resume":
            raise UsageError("resume: takes one run folder and no other flag, since a resumed run keeps its settings")
        folder = Path(words[1]).expanduser()
        if not (folder / "config.yaml").exists():
            raise UsageError(f"resume: got {folder}, takes a run folder, and this one has no config.yaml")
        return parse(["--config", str(folder / "config.yaml")]), folder
    config = parse(argv)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{stamp}-{config.task.dataset}-{config.task.arch}-{config.recipe}"
    folder = config.out or Path("runs") / name
    if (folder / "config.yaml").exists():
        raise UsageError(f"out: {folder} holds a run already; --resume {folder} goes on with it")
    if next((parent for parent in (folder, *folder.parents) if parent.exists()), Path("/")).is_file():
        raise UsageError(f"out: got {folder}, takes a folder, and there is a file of that name")
    return config, folder


def pretraining(config: TrainConfig) -> PretrainConfig:
    """The natural pre-training that a fine-tuning run without given weights begins with."""
    return PretrainConfig(
        task=config.task, sgd=config.pretrain, log_every=config.log_every, save_every=config.save_every
    )


def parse(argv: list[str]) -> TrainConfig:
    """A recipe, named by a flag or else by the --config file, with the other settings put over it."""
    flag, file = _value(argv, "--recipe"), _value(argv, "--config")
    named = cli.read_yaml(Path(file)).get("recipe") if file is not None and Path(file).is_file() else None
    if flag is not None and named is not None and flag != named:
        raise UsageError(f"recipe: got {flag!r}, and {file} holds the settings of {named!r}; take one of them")
    base = find_recipe(str(flag or named or "released"))
    config: TrainConfig = cli.parse(base, argv, prog="fastafd.train", about=__doc__)
    if config.matched:  # once more, since what was given goes over it
        config = cli.parse(matched(base), argv, prog="fastafd.train", about=__doc__)
    return config


def _value(argv: list[str], flag: str) -> str | None:
    for index, word in enumerate(argv):
        if word.startswith(flag + "="):
            return word.removeprefix(flag + "=")
        if word == flag and index + 1 < len(argv):
            return argv[index + 1]
    return None


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
