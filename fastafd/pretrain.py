"""python -m fastafd.pretrain: train a natural classifier by the appendix's recipe, once for each configuration.

The weights lie in the cache under a key of everything that shapes them, so `fastafd.train` finds them the next time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import torch
from torch import nn

from fastafd import cli
from fastafd.checkpoint import fit_weights, load_model_about, load_weights, save_model
from fastafd.config import PretrainConfig, Task
from fastafd.console import Console
from fastafd.data import Augment, Dataset, load_dataset, make_loader
from fastafd.loop import fit
from fastafd.methods import Natural
from fastafd.models import build_model
from fastafd.optim import make_sgd
from fastafd.settings import UsageError, cache_dir
from fastafd.step import TrainStep, resolve_amp, resolve_device


def main(argv: list[str]) -> None:
    config = cli.parse(PretrainConfig(), argv, prog="fastafd.pretrain", about=__doc__)
    console = Console()
    dataset = load_dataset(config.task.dataset, config.task.data_dir, config.task.image_size)
    pretrain(config, dataset, console)
    console.line("evaluate it: python -m fastafd.evaluate " + str(folder_of(config, dataset)))


def pretrain(config: PretrainConfig, dataset: Dataset, console: Console) -> nn.Module:
    """The natural classifier of `config`, in eval mode on the CPU: from the cache, else trained (and resumed) there."""
    folder = folder_of(config, dataset)
    weights = folder / "model.safetensors"
    if weights.exists():
        net, _ = load_model_about(weights)
        console.line(f"natural model: {weights}")
        return net

    task, sgd = config.task, config.sgd
    device = resolve_device(task.device)
    with torch.random.fork_rng():
        torch.manual_seed(task.seed)
        net = build_model(task.arch, len(dataset.classes), task.normalize).to(device)
    loader = make_loader(
        task.loader,
        dataset.train,
        name=dataset.name,
        batch_size=sgd.batch_size,
        seed=task.seed,
        device=device,
        cache=cache_dir(),
        report=console.line,
    )
    step = TrainStep(
        net,
        make_sgd(net, sgd.lr, sgd.momentum, sgd.weight_decay),
        Natural(),
        amp=task.amp,
        augment=Augment(dataset.padding, dataset.flip, task.seed),
        seed=task.seed,
    )
    console.line(f"natural pre-training: {task.arch} on {dataset.name}, {sgd.epochs} epochs, in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    cli.write_config(folder, config)
    identity = {"data": dataset.train.fingerprint, "steps_per_epoch": len(loader)}
    fit(step, loader, sgd, folder, console, label="pre-train", log_every=config.log_every, identity=identity)
    net = net.cpu().eval()
    save_model(weights, net, about(task, dataset))
    (folder / "last.pt").unlink(missing_ok=True)  # the run is over; its optimizer state is of no use any more
    return net


def natural_model(pretrained: str, task: Task, dataset: Dataset, console: Console) -> nn.Module:
    """The classifier in a file or run folder, or pyautoattack's `example`. UsageError if it does not fit."""
    net = build_model(task.arch, len(dataset.classes), task.normalize)
    if pretrained == "example":
        if (task.arch, dataset.name, task.normalize) != ("resnet18", "cifar10", "none"):
            raise UsageError(
                "pretrained: 'example' is a CIFAR-10 ResNet-18 without normalisation,"
                f" not {task.arch} on {dataset.name} with normalize {task.normalize}"
            )
        source = example_weights()
    else:
        source = Path(pretrained).expanduser()
        source = source / "model.safetensors" if source.is_dir() else source
    fit_weights(net, load_weights(source), source)
    console.line(f"natural model: {source}")
    return net.eval()


def example_weights() -> Path:
    """The naturally trained CIFAR-10 ResNet-18 that the package pyautoattack ships. UsageError where it is left out."""
    spec = importlib.util.find_spec("pyautoattack")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / "examples" / "model_test.pt"
        if file.exists():
            return file
    raise UsageError("pretrained: 'example' is examples/model_test.pt of pyautoattack, and the one installed has none")


def folder_of(config: PretrainConfig, dataset: Dataset) -> Path:
    """The folder of this pre-training: `out`, or one in the cache named by everything that shapes the weights."""
    if config.out is not None:
        return config.out
    task = config.task
    shaping = {
        "arch": task.arch,
        "normalize": task.normalize,
        "seed": task.seed,
        "amp": resolve_amp(task.amp, resolve_device(task.device)),
        "data": dataset.train.fingerprint,
        "sgd": dataclasses.asdict(config.sgd),
    }
    key = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:12]
    return cache_dir() / "pretrained" / f"{dataset.name}-{task.arch}-{key}"


def about(task: Task, dataset: Dataset) -> dict[str, object]:
    """What a weights file's header says of its classifier."""
    return {
        "arch": task.arch,
        "num_classes": len(dataset.classes),
        "classes": list(dataset.classes),
        "image_size": dataset.image_size,
        "normalize": task.normalize,
        "dataset": dataset.name,
    }


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
