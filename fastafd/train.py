"""python -m fastafd.train: from a natural classifier to a robust one, evaluated and saved.

    python -m fastafd.train --recipe digits                      # the embedded data set, minutes on two CPU cores
    python -m fastafd.train --arch wrn34_10                      # CIFAR-10; a natural model is pre-trained first
    python -m fastafd.train --pretrained example                 # from the ResNet-18 that pyautoattack ships
    python -m fastafd.train --recipe vaft --matched              # another method, under AFD's conditions
    python -m fastafd.train --resume runs/NAME                   # continue after any kind of stop, exactly

A run folder holds config.yaml, env.json, metrics.jsonl, last.pt, natural.safetensors (the teacher),
model.safetensors (the merged classifier), samples.npz (for reports) and result.json.
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
from fastafd.config import PretrainConfig, Task, TrainConfig
from fastafd.console import Console
from fastafd.data import Dataset, load_dataset
from fastafd.device import provenance, resolve_amp, resolve_device
from fastafd.evaluation import ATTACKS, evaluate, show_accuracies
from fastafd.files import as_json, save_text
from fastafd.models import Disentangled, check_model
from fastafd.models.cost import set_threads
from fastafd.recipes import find_recipe, matched
from fastafd.samples import save_samples
from fastafd.settings import ATTACK_NAMES, UsageError, in_255ths, user_path
from fastafd.training import build
from fastafd.training.engine import engine_of
from fastafd.training.forecast import forecast
from fastafd.training.natural import (
    build_loader,
    check_batch_size,
    fresh_model,
    header_for,
    is_cached,
    pretrain,
    pretrained_model,
    read_pretrained,
)
from fastafd.training.rift import hold_out
from fastafd.weights import Weights

LARGE = 64  # pixels; above it a first stage without a stride is dear


def main(argv: list[str]) -> None:
    began = time.monotonic()
    console = Console()
    config, folder = configure(argv)
    method = config.method
    check_model(config.task.arch, config.task.normalize)
    device = resolve_device(config.task.device)
    # The engine and the threads are resolved here and written to config.yaml, so that a resumed run uses the same ones.
    config = with_task(config, engine=engine_of(method, config.task.engine, device, console))
    check_for_method(config)

    # Load the images and the weights that the method starts from. The run folder keeps a copy of these weights, because
    # they are the teacher, after a resume too.
    pretrained = given_weights(config, folder)
    task = config.task
    dataset = load_dataset(task.dataset, task.data_dir, task.image_size, skip_bad_images=task.skip_bad_images)
    weights = starting_weights(config, folder, pretrained, dataset, console)
    if weights is None:
        check_batch_size(config.pretrain.batch_size, dataset, "pretrain.batch_size")
    net = fresh_model(config.task, dataset) if weights is None else weights[0]
    threads = set_threads(net.to(device), dataset.image_size, config.sgd.batch_size, config.task.threads)
    config = with_task(config, threads=threads)
    environment = provenance(device) | {
        "python": platform.python_version(),
        "amp": resolve_amp(config.task.amp, device),
    }
    say_what_runs(config, dataset, environment, console)
    held_out = None
    if method.held_out:
        train, held_out = hold_out(dataset.train, method.held_out, config.task.seed)
        dataset = dataclasses.replace(dataset, train=train)
    loader = build_loader(config.task, config.sgd.batch_size, dataset, device, console)
    folder.mkdir(parents=True, exist_ok=True)
    cli.write_config(folder, config)
    save_text(folder / "env.json", as_json(environment))
    console.line(f"run folder: {folder}; batches from the {loader.kind} loader")
    pretrains = weights is None and not is_cached(pretraining(config), dataset)
    expected = forecast(config, net, dataset, device, pretrains, method.begins == "robust")
    console.line(expected.line(config.task.engine == "fast"))

    models = [name for name in (method.begins, method.label) if name != "scratch"]
    console.stages = (weights is None) + 1 + len(models) + method.disentangled + 1
    if weights is None:
        console.stage("natural pre-training")
    start, header = weights or pretrain(pretraining(config), dataset, console)
    copy = folder / f"{method.begins}.safetensors"
    if method.begins != "scratch" and not copy.exists():
        save_model(copy, start, header)
    start = start.to(device)

    # Train. `merge` turns the trained model into a plain classifier.
    console.stage(f"training by {method.label}" if method.begins == "scratch" else f"fine-tuning by {method.label}")
    trained = build.train(config, start, held_out, loader, dataset, folder, console)
    classifier = trained.model.merge()
    save_model(folder / "model.safetensors", classifier, header_for(config.task, dataset) | {"eps": config.attack.eps})

    evaluation_began = time.monotonic()
    results = evaluate_models(config, start, trained, classifier, dataset, console)
    console.stage("samples for reports")
    save_samples(
        folder / "samples.npz", trained.model, dataset.test, config.eval_n, config.task.seed, config.attack.eps
    )
    seconds = {
        # null if nobody knows how long the weights took
        "pretraining": 0.0 if method.begins == "scratch" else header.get("pretraining_seconds"),
        "finetuning": trained.seconds,
        "evaluation": time.monotonic() - evaluation_began,
    }
    parameters = {"model": count_parameters(classifier), "training": count_parameters(trained.model)}
    summary = {"models": results, "seconds": seconds, **trained.extra, "parameters": parameters}
    # The training has added the forms of the attack's convolutions to env.json.
    summary |= about_run(config, dataset) | json.loads((folder / "env.json").read_text())
    save_text(folder / "result.json", as_json(summary))
    threat = f"l-infinity, eps {in_255ths(config.attack.eps)}"
    show_accuracies(results, console, f"{config.task.arch} on {dataset.name}, {threat}, Wilson 95 % intervals")
    console.line(f"{time.monotonic() - began:.0f} s; the robust classifier: {folder / 'model.safetensors'}")


def with_task(config: TrainConfig, **settings: Any) -> TrainConfig:
    """The config with other settings in its `task`."""
    return dataclasses.replace(config, task=dataclasses.replace(config.task, **settings))


def say_what_runs(config: TrainConfig, dataset: Dataset, environment: dict[str, Any], console: Console) -> None:
    """The lines about the data, the network and the machine."""
    task, side = config.task, dataset.image_size
    console.line(
        f"{dataset.name}: {len(dataset.train)} training and {len(dataset.test)} test images of {len(dataset.classes)}"
        f" classes, {side} x {side}; {task.arch} on {environment['device']} in {environment['amp']},"
        f" {task.engine} engine"
    )
    if side > LARGE:
        console.line(
            f"{task.arch} keeps all {side} x {side} pixels in its first stage, as networks for CIFAR do: a step takes"
            f" {(side / 32) ** 2:.0f} times the arithmetic of 32 x 32 pixels, and resnet18 15 times that of"
            " torchvision's; --image-size makes the images smaller"
        )


def evaluate_models(
    config: TrainConfig,
    start: nn.Module,
    trained: build.Trained,
    classifier: nn.Module,
    dataset: Dataset,
    console: Console,
) -> dict[str, Any]:
    """The results of each model by its name in the report, all on the same test images.

    start: the model that the training began with. classifier: the trained one, merged.
    """
    method, classes = config.method, len(dataset.classes)
    attacks = ATTACKS if config.autoattack_n and classes >= 4 else ATTACKS[:2]
    if config.autoattack_n and classes < 4:
        console.line(f"AutoAttack is left out: its targeted losses need 4 classes, {dataset.name} has {classes}")
    classifiers: dict[str, tuple[nn.Module, tuple[str, ...]]] = {}
    if method.begins != "scratch":
        classifiers[method.begins] = start, attacks
    classifiers[method.label] = classifier, attacks
    if isinstance(trained.model, Disentangled):
        classifiers[f"{method.label}, f2"] = trained.model.merge_confused(), ATTACKS[:1]
    results = {}
    for name, (model, model_attacks) in classifiers.items():
        console.stage(f"evaluation of {name}: {', '.join(ATTACK_NAMES[attack] for attack in model_attacks)}")
        results[name] = evaluate(
            model,
            dataset.test,
            model_attacks,
            eps=config.attack.eps,
            n=config.eval_n,
            autoattack_n=config.autoattack_n,
            seed=config.task.seed,
            console=console,
            label=name,
        )
    return results


def about_run(config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
    """What result.json says about the method, the data and the settings."""
    recipe = find_recipe(config.recipe)
    changed = cli.changes(matched(recipe) if config.matched else recipe, config)
    if config.pretrained is not None or config.method.begins != "natural":
        changed = {name: value for name, value in changed.items() if not name.startswith("pretrain.")}
    return {
        "label": config.method.label,
        "dataset": {
            "name": dataset.name,
            "train": len(dataset.train),
            "test": len(dataset.test),
            "classes": dataset.classes,
        },
        "changed": changed,
        "settings": cli.written(config),
        "config": dataclasses.asdict(config),
    }


def check_for_method(config: TrainConfig) -> None:
    """Raise UsageError, before anything is trained, for settings that the method does not use or cannot work with."""
    method, recipe = config.method, find_recipe(config.recipe)
    if method.replays_noise and isinstance(config.attack, PGD) and not config.attack.random_start:
        raise UsageError(f"attack.random_start: got false, takes true with {method.label}")
    if config.attack_bn != "eval" and not (method.adversarial and method.uses_recipe_attack):
        raise UsageError(
            f"attack_bn: got {config.attack_bn!r}, takes eval: {method.label} does not use the recipe's attack"
        )
    if config.attack_bn != "eval" and config.task.engine == "fast":
        raise UsageError(
            f"attack_bn: got {config.attack_bn!r}, takes eval with engine fast; the reference engine takes both"
        )
    if config.d2_weight_decay != recipe.d2_weight_decay and not method.disentangled:
        raise UsageError(f"d2_weight_decay: {method.label} has no D2; only recipes of AFD have this setting")
    if config.pretrained is not None or method.begins != "natural":
        changed = [name for name, value in vars(config.pretrain).items() if value != getattr(recipe.pretrain, name)]
        if changed:
            why = "with --pretrained" if config.pretrained is not None else f"on recipe {config.recipe}"
            raise UsageError(f"pretrain.{changed[0]}: has no effect {why}, where no natural model is trained")
    folder = config.task.data_dir
    if config.task.dataset == "digits" and folder != Task().data_dir and not (folder / "train").is_dir():
        raise UsageError(f"data_dir: {folder} has no folder train; leave it out for the digits of scikit-learn")


def count_parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def given_weights(config: TrainConfig, folder: Path) -> Weights | None:
    """What is in the file of `pretrained`; None if the method starts from other weights, or the run folder has a copy.

    Raises UsageError, before any image is read, for weights that the method cannot start from.
    """
    begins = config.method.begins
    if begins == "scratch" and config.pretrained is not None:
        raise UsageError(f"pretrained: got {config.pretrained}, and recipe {config.recipe} starts from fresh weights")
    if begins == "scratch" or (folder / f"{begins}.safetensors").exists():
        return None
    if begins == "robust" and config.pretrained is None:
        raise UsageError(
            f"pretrained: got none, and recipe {config.recipe} starts from an adversarially trained model,"
            " such as the run folder of recipe pgd_at"
        )
    return None if config.pretrained is None else read_pretrained(config.pretrained, config.task)


def starting_weights(
    config: TrainConfig, folder: Path, pretrained: Weights | None, dataset: Dataset, console: Console
) -> tuple[nn.Module, dict[str, Any]] | None:
    """The model that the method starts from, and the header of its file; None if it must be pre-trained first.

    pretrained: those of `given_weights`. Raises UsageError if they do not fit the classifier or the data set.
    """
    begins, copy = config.method.begins, folder / f"{config.method.begins}.safetensors"
    if begins == "scratch":
        return fresh_model(config.task, dataset), {}
    if copy.exists():
        return load_model_about(copy)
    return None if pretrained is None else pretrained_model(pretrained, config.task, dataset, console)


def configure(argv: list[str]) -> tuple[TrainConfig, Path]:
    """The config and the run folder that the command line asks for; a resumed run keeps its config and folder."""
    flags, rest = cli.take(argv, {"--resume": "a run folder"})
    if flags["--resume"]:
        if len(flags["--resume"]) > 1 or rest:
            raise UsageError("resume: takes one run folder and no other flag, since a resumed run keeps its settings")
        folder = user_path(flags["--resume"][0], "resume")
        if not (folder / "config.yaml").exists():
            raise UsageError(f"resume: got {folder}, takes a run folder, and this one has no config.yaml")
        return parse(["--config", str(folder / "config.yaml")]), folder
    config = parse(argv)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{stamp}-{config.task.dataset}-{config.task.arch}-{config.recipe}"
    folder = config.out or Path("runs") / name
    if (folder / "config.yaml").exists():
        raise UsageError(f"out: {folder} already holds a run; --resume {folder} continues it")
    if next((parent for parent in (folder, *folder.parents) if parent.exists()), Path("/")).is_file():
        raise UsageError(f"out: got {folder}, takes a folder, and there is a file of that name")
    return config, folder


def pretraining(config: TrainConfig) -> PretrainConfig:
    """The natural pre-training that comes before fine-tuning if `pretrained` is not set."""
    return PretrainConfig(
        task=config.task, sgd=config.pretrain, log_every=config.log_every, save_every=config.save_every
    )


def parse(argv: list[str]) -> TrainConfig:
    """The config: the recipe that `--recipe`, or else the `--config` file, names, changed by the file and the flags."""
    flags, rest = cli.take(argv, {"--recipe": "the name of a recipe", "--config": "a YAML file of settings"})
    names = [cli.read_yaml(user_path(file, "config")).get("recipe") for file in flags["--config"]]
    names = [name for name in names if name is not None] + flags["--recipe"][-1:]
    for name in names:
        find_recipe(name)
    if len(set(names)) > 1:
        got = f"got {names[-1]!r}" if flags["--recipe"] else "got none"
        raise UsageError(
            f"recipe: {got}, and {flags['--config'][0]} holds the settings of {names[0]!r}; take one of them"
        )
    base = find_recipe(names[-1]) if names else find_recipe("released")
    words = [word for file in flags["--config"] for word in ("--config", file)] + rest
    config: TrainConfig = cli.parse(base, words, prog="fastafd.train", about=__doc__)
    if config.matched:  # parse again, because the file and the flags go over the matched recipe
        config = cli.parse(matched(base), words, prog="fastafd.train", about=__doc__)
    return config


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
