"""The classifiers that training starts from: fresh, read from a file, or pre-trained on clean images.

Pre-trained weights are kept in the cache under a key of everything that shapes them, so that the next run finds them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastafd.checkpoint import load_model_about, save_model
from fastafd.config import PretrainConfig, Task
from fastafd.console import Console
from fastafd.data import Augment, Dataset, Loader, make_loader
from fastafd.device import resolve_amp, resolve_device
from fastafd.methods import Natural
from fastafd.models import build_model
from fastafd.settings import UsageError, cache_dir, user_path
from fastafd.training.engine import resolve_engine
from fastafd.training.loop import fit
from fastafd.training.optim import make_sgd
from fastafd.training.step import TrainStep
from fastafd.weights import Weights, check_classes, check_classifier, fit_weights, read_weights


def pretrain(config: PretrainConfig, dataset: Dataset, console: Console) -> tuple[nn.Module, dict[str, Any]]:
    """The natural classifier of `config`, in eval mode on the CPU, and the header of its file.

    It is loaded from its folder, or else trained there (and a stopped training is resumed). Raises UsageError as
    `load_trained` does.
    """
    folder, shape = folder_of(config, dataset), shaping(config, dataset)
    weights = folder / "model.safetensors"
    trained = load_trained(config, dataset)
    if trained is not None:
        console.line(f"natural model: {weights}")
        return trained
    if weights.exists():
        console.line(f"natural model: {weights} is damaged; it is trained again")

    task, sgd = config.task, config.sgd
    device = resolve_device(task.device)
    net = fresh_model(task, dataset)
    loader = build_loader(task, sgd.batch_size, dataset, device, console)
    net = net.to(device)
    step = TrainStep(
        net,
        make_sgd(net, sgd.lr, sgd.momentum, sgd.weight_decay),
        Natural(),
        amp=task.amp,
        engine=task.engine,
        augment=Augment(dataset.padding, dataset.flip, task.seed),
        seed=task.seed,
        console=console,
    )
    console.line(f"natural pre-training: {task.arch} on {dataset.name}, {sgd.epochs} epochs, in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    seconds = fit(
        step,
        loader,
        sgd,
        folder,
        console,
        label="pre-train",
        log_every=config.log_every,
        save_every=config.save_every,
        identity=shape,
    )
    net = net.cpu().eval()
    header = header_for(task, dataset) | {"shape": shape, "pretraining_seconds": seconds["wall"]}
    save_model(weights, net, header)
    (folder / "last.pt").unlink(missing_ok=True)  # the run is over, so nobody needs its optimizer state
    return net, header


def load_trained(config: PretrainConfig, dataset: Dataset) -> tuple[nn.Module, dict[str, Any]] | None:
    """The natural classifier of `config` and its header; None if its folder has none, or the cache a damaged one.

    Raises UsageError if the folder `out` holds a damaged model, or one of other settings.
    """
    weights = folder_of(config, dataset) / "model.safetensors"
    if not weights.exists():
        return None
    try:
        net, header = load_model_about(weights)
    except UsageError as error:
        if config.out is None:
            return None
        reason = str(error).removeprefix("model: ")
        raise UsageError(f"out: {reason}; delete it or take another folder") from error
    if header.get("shape") != shaping(config, dataset):
        if config.out is None:
            return None
        raise UsageError(f"out: {weights} is a model of other settings or data; take another folder")
    return net, header


def is_cached(config: PretrainConfig, dataset: Dataset) -> bool:
    """Whether the natural classifier of `config` has been trained before."""
    return load_trained(config, dataset) is not None


def check_batch_size(size: int, dataset: Dataset, field: str) -> None:
    """Raise UsageError, for the setting `field`, for a batch that is larger than the training split."""
    if size > len(dataset.train):
        raise UsageError(
            f"{field}: got {size}, takes 1..{len(dataset.train)}, the number of training images in {dataset.name}"
        )


def fresh_model(task: Task, dataset: Dataset) -> nn.Module:
    """A classifier with weights drawn from the task's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed)
        return build_model(task.arch, len(dataset.classes), task.normalize)


def build_loader(task: Task, batch_size: int, dataset: Dataset, device: torch.device, console: Console) -> Loader:
    """The loader that delivers batches of the training images on the device."""
    return make_loader(
        task.loader,
        dataset.train,
        name=dataset.name,
        batch_size=batch_size,
        seed=task.seed,
        device=device,
        cache=cache_dir(),
        report=console.line,
    )


def read_pretrained(pretrained: str, task: Task) -> Weights:
    """What is in a file or run folder, or in pyautoattack's `example`. No data set is needed yet.

    Raises UsageError for a file that cannot be read, or whose header names another classifier than the task's.
    """
    if pretrained == "example":
        if (task.arch, task.dataset, task.normalize) != ("resnet18", "cifar10", "none"):
            raise UsageError(
                "pretrained: 'example' is a CIFAR-10 ResNet-18 without normalisation,"
                f" not {task.arch} on {task.dataset} with normalize {task.normalize}"
            )
        source = example_weights()
    else:
        source = user_path(pretrained, "pretrained")
        source = source / "model.safetensors" if source.is_dir() else source
    weights = read_weights(source, "pretrained")
    check_classifier(weights, task.arch, task.normalize)
    return weights


def pretrained_model(
    weights: Weights, task: Task, dataset: Dataset, console: Console
) -> tuple[nn.Module, dict[str, Any]]:
    """The classifier of `read_pretrained`, in eval mode, and the header to save it with.

    Raises UsageError if its weights do not fit the task's architecture, or its classes are not those of the data set.
    """
    check_classes(weights, dataset.classes)
    net = build_model(task.arch, len(dataset.classes), task.normalize)
    fit_weights(net, weights, console.line)
    console.line(f"pre-trained model: {weights.path}")
    header = header_for(task, dataset)
    if "pretraining_seconds" in weights.header:
        header["pretraining_seconds"] = weights.header["pretraining_seconds"]
    return net.eval(), header


def example_weights() -> Path:
    """The file of the naturally trained CIFAR-10 ResNet-18 in the package pyautoattack.

    UsageError if it is not there.
    """
    spec = importlib.util.find_spec("pyautoattack")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / "examples" / "model_test.pt"
        if file.exists():
            return file
    raise UsageError("pretrained: 'example' is examples/model_test.pt of pyautoattack, and the one installed has none")


def folder_of(config: PretrainConfig, dataset: Dataset) -> Path:
    """The folder of this pre-training: `out`, or a folder in the cache whose name has the key of `shaping`."""
    if config.out is not None:
        return config.out
    key = hashlib.sha256(shaping(config, dataset).encode()).hexdigest()[:12]
    return cache_dir() / "pretrained" / f"{dataset.name}-{config.task.arch}-{key}"


def shaping(config: PretrainConfig, dataset: Dataset) -> str:
    """Everything that shapes the weights, as JSON."""
    task = config.task
    device = resolve_device(task.device)
    shape = {
        "arch": task.arch,
        "normalize": task.normalize,
        "seed": task.seed,
        "amp": resolve_amp(task.amp, device),
        "engine": resolve_engine(task.engine, device),
        "data": dataset.train.fingerprint,
        "threads": task.threads,
        "sgd": dataclasses.asdict(config.sgd),
    }
    return json.dumps(shape, sort_keys=True)


def header_for(task: Task, dataset: Dataset) -> dict[str, Any]:
    """The header of a weights file: what must be known to build the classifier and to evaluate it."""
    return {
        "arch": task.arch,
        "num_classes": len(dataset.classes),
        "classes": list(dataset.classes),
        "image_size": dataset.image_size,
        "normalize": task.normalize,
        "dataset": dataset.name,
    }
