"""python -m fastafd.train: from a natural classifier to a robust one, evaluated and saved.

    python -m fastafd.train --recipe digits                      # the embedded data set, minutes on two CPU cores
    python -m fastafd.train --arch wrn34_10                      # CIFAR-10; a natural model is pre-trained first
    python -m fastafd.train --pretrained example                 # from the ResNet-18 that pyautoattack ships
    python -m fastafd.train --recipe vaft --matched              # another method, under AFD's conditions
    python -m fastafd.train --resume runs/NAME                   # go on, step-exactly, after any kind of stop

A run folder holds config.yaml, env.json, metrics.jsonl, last.pt, natural.safetensors (the teacher),
model.safetensors (merged) and result.json.
"""

from __future__ import annotations

import dataclasses
import platform
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastafd import cli
from fastafd.checkpoint import load_model_about, save_model
from fastafd.config import PretrainConfig, TrainConfig
from fastafd.console import Console
from fastafd.data import Augment, load_dataset
from fastafd.engine import resolve_amp, resolve_device, resolve_engine
from fastafd.evaluate import ATTACKS, evaluate, provenance, show
from fastafd.files import as_json, save_text
from fastafd.loop import fit
from fastafd.models import Disentangled, Split, check_model, disentangle, split
from fastafd.optim import make_sgd
from fastafd.pretrain import about, loader_of, natural_model, pretrain
from fastafd.recipes import find_recipe, matched
from fastafd.settings import UsageError
from fastafd.step import TrainStep


def main(argv: list[str]) -> None:
    began = time.monotonic()
    console = Console()
    config, folder = configure(argv)
    task, sgd = config.task, config.sgd
    check_model(task.arch, task.normalize)
    device = resolve_device(task.device)
    task = dataclasses.replace(task, engine=resolve_engine(task.engine, device))  # a resumed run keeps it
    config = dataclasses.replace(config, task=task)
    environment = provenance(device) | {"python": platform.python_version(), "amp": resolve_amp(task.amp, device)}

    # Images, and a natural classifier of them, of which the run keeps a copy: it is the teacher after a resume too.
    dataset = load_dataset(task.dataset, task.data_dir, task.image_size)
    classes = len(dataset.classes)
    console.line(
        f"{dataset.name}: {len(dataset.train)} training and {len(dataset.test)} test images of {classes} classes, "
        f"{dataset.image_size} x {dataset.image_size}; {task.arch} on {environment['device']} in {environment['amp']}, "
        f"{task.engine} engine"
    )
    loader = loader_of(task, sgd.batch_size, dataset, device, console)
    kept, given = folder / "natural.safetensors", None
    if kept.exists():
        given = load_model_about(kept)
    elif config.pretrained is not None:
        given = natural_model(config.pretrained, task, dataset, console), about(task, dataset)
    folder.mkdir(parents=True, exist_ok=True)
    cli.write_config(folder, config)
    save_text(folder / "env.json", as_json(environment))
    console.line(f"run folder: {folder}; batches from the {loader.kind} loader")
    natural, origin = given or pretrain(pretraining(config), dataset, console)
    if not kept.exists():
        save_model(kept, natural, origin)
    natural = natural.to(device)

    # Fine-tuning: D1 and D2 go in if the method has them, the natural model teaches, the weight average comes out.
    torch.manual_seed(task.seed)  # for networks that draw in their forward; all else has generators of its own
    method = config.method
    model = disentangle(natural) if method.disentangled else split(natural)
    step = TrainStep(
        model,
        make_sgd(model, sgd.lr, sgd.momentum, sgd.weight_decay, config.d2_weight_decay),
        method,
        teacher=natural,
        attack=config.attack,
        attack_bn=config.attack_bn,
        ema_decay=config.ema_decay,
        amp=task.amp,
        engine=task.engine,
        augment=Augment(dataset.padding, dataset.flip, task.seed),
        seed=task.seed,
        console=console,
    )
    seconds = fit(
        step,
        loader,
        sgd,
        folder,
        console,
        label=method.label,
        log_every=config.log_every,
        save_every=config.save_every,
        identity=dataset.train.identity,
    )
    tuned = step.averaged()
    assert isinstance(tuned, Split)
    robust = tuned.merge()
    save_model(folder / "model.safetensors", robust, about(task, dataset))

    # Both models on the same test images; of a disentangled one also what the confused features alone predict.
    evaluated_from = time.monotonic()
    attacks = ATTACKS if config.autoattack_n and classes >= 4 else ATTACKS[:2]
    if config.autoattack_n and classes < 4:
        console.line(f"AutoAttack is left out: its targeted losses need 4 classes, {dataset.name} has {classes}")
    evaluated: dict[str, tuple[nn.Module, tuple[str, ...]]] = {
        "natural": (natural, attacks),
        method.label: (robust, attacks),
    }
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
    summary: dict[str, Any] = {
        "models": results,
        "seconds": {
            "pretraining": origin.get("pretraining_seconds"),  # null for weights of unknown origin
            "finetuning": seconds,
            "evaluation": time.monotonic() - evaluated_from,
        },
        "config": dataclasses.asdict(config),
        **environment,
    }
    save_text(folder / "result.json", as_json(summary))
    show(results, console, f"{task.arch} on {dataset.name}, l-infinity, eps 8/255, Wilson 95 % intervals")
    console.line(f"{time.monotonic() - began:.0f} s; the robust classifier: {folder / 'model.safetensors'}")


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
