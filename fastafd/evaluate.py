"""python -m fastafd.evaluate: clean, PGD-20 and AutoAttack accuracy of a run or of any weights, with intervals.

    python -m fastafd.evaluate runs/NAME --attack pgd20
    python -m fastafd.evaluate --arch resnet18 --weights FILE --dataset cifar10 --attack autoattack --n 1000 --json

Evaluation is in fp32 and eager, whatever the training was, and launches no kernel of fastafd: reported robustness must
not depend on a fast path.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastafd import cli
from fastafd.attacks import PGD, check_classes, run_autoattack
from fastafd.checkpoint import fit_weights, load_model_about, load_weights
from fastafd.console import Bar, Console
from fastafd.data import Split, balanced_draw, load_dataset, to_unit
from fastafd.device import enough_memory, provenance, resolve_device, true_fp32
from fastafd.files import as_json, save_text
from fastafd.models import build_model
from fastafd.settings import UsageError, check, choice, number, optional, path, setting, switch, text

EPS = 8 / 255
PGD20 = PGD(eps=EPS, step_size=0.003, steps=20, random_start=True)  # the paper's evaluation attack
ATTACKS = ("clean", "pgd20", "autoattack")


@dataclass(frozen=True)
class EvaluateConfig:
    """What `python -m fastafd.evaluate` takes; a run folder's own settings fill in what is not given."""

    model: Path | None = setting(None, "run folder or model.safetensors (also as the first word)", optional(path))
    weights: Path | None = setting(None, "any other file of weights; say its --arch and --dataset", optional(path))
    arch: str | None = setting(None, "classifier that --weights belong to", optional(text))
    normalize: str = setting("none", "normalisation layer of --weights: none, cifar10, cifar100 or imagenet", text)
    dataset: str | None = setting(None, "data set; default the run's own", optional(text))
    data_dir: Path | None = setting(None, "folder that holds it; default the run's own, else data", optional(path))
    image_size: int | None = setting(
        None,
        "side in pixels that an image folder is resized to; default the run's own",
        optional(number(8, 1024, True)),
    )
    attack: str = setting("pgd20", "clean, pgd20 (and clean) or autoattack (and both)", choice(*ATTACKS))
    n: int | None = setting(
        None, "number of test images, a seeded class-balanced draw; default all", optional(number(1, whole=True))
    )
    batch_size: int = setting(250, "images at a time", number(1, whole=True))
    seed: int = setting(0, "seed of the draw and of the attacks", number(0, 2**32, whole=True))
    device: str = setting("auto", "cpu, cuda, cuda:N, or auto: a GPU if there is one", text)
    json: bool = setting(False, "print the result as JSON instead of a table", switch)

    def __post_init__(self) -> None:
        check(self)


def main(argv: list[str]) -> None:
    if argv and not argv[0].startswith("-"):
        argv = ["--model", *argv]
    config = cli.parse(EvaluateConfig(), argv, prog="fastafd.evaluate", about=__doc__)
    console = Console()
    device = resolve_device(config.device)

    # The model, and the data set that its run folder or the command line names.
    if (config.model is None) == (config.weights is None):
        raise UsageError("model: takes a run folder or a model.safetensors, or else --weights FILE with --arch")
    if config.model is not None and config.arch is not None:
        raise UsageError(f"arch: {config.model} says which classifier it holds; --arch goes with --weights")
    net, about = load_model_about(config.model) if config.model is not None else (None, {})
    settings = run_settings(config.model)
    dataset_name = config.dataset or settings.get("dataset") or about.get("dataset")
    if dataset_name is None:
        raise UsageError("dataset: got none, takes the name of a data set, such as --dataset cifar10")
    own = settings if settings.get("dataset") == dataset_name else {}
    image_size = config.image_size or own.get("image_size")
    dataset = load_dataset(dataset_name, config.data_dir or Path(own.get("data_dir", "data")), image_size)
    if net is None:
        if config.arch is None:
            raise UsageError("arch: got none, takes the classifier that --weights belong to, such as --arch resnet18")
        net = build_model(config.arch, len(dataset.classes), config.normalize)
        fit_weights(net, load_weights(Path(str(config.weights))), str(config.weights))
    elif about.get("classes", list(dataset.classes)) != list(dataset.classes):
        raise UsageError(
            f"dataset: {config.model} was trained on the classes of {about['dataset']}, not {dataset_name}"
        )
    shown = Path(str(config.model or config.weights))

    result = evaluate(
        net.to(device),
        dataset.test,
        ATTACKS[: ATTACKS.index(config.attack) + 1],
        n=config.n,
        autoattack_n=config.n,
        batch_size=config.batch_size,
        seed=config.seed,
        console=console,
    )
    result |= {"model": str(shown), "dataset": dataset_name, "classes": list(dataset.classes), **provenance(device)}
    if config.model is not None and config.model.is_dir():
        save_text(config.model / f"evaluation-{config.attack}.json", as_json(result))
    if config.json:
        print(as_json(result))
    else:
        show({shown.name: result}, console, f"{dataset_name}, l-infinity, eps 8/255, Wilson 95 % intervals")


def run_settings(model: Path | None) -> dict[str, Any]:
    """The settings in a run folder's config.yaml; nothing for anything else."""
    if model is None or not (model / "config.yaml").exists():
        return {}
    return cli.read_yaml(model / "config.yaml")


# -- the measurements ---------------------------------------------------------------------------------------------


def evaluate(
    model: nn.Module,
    test: Split,
    attacks: tuple[str, ...],
    *,
    n: int | None,
    autoattack_n: int | None,
    batch_size: int = 250,
    seed: int = 0,
    console: Console,
    label: str = "evaluate",
) -> dict[str, Any]:
    """Accuracy under each of `attacks` ("clean", "pgd20", "autoattack"), each with its images' indices and interval.

    `n` and `autoattack_n` images (None: all) are drawn class-balanced, the smaller draw within the larger one.
    The model is put into eval mode and otherwise left alone; global generators are left as they were. Convolutions are
    computed in true fp32: TF32, which PyTorch allows them by default, is off meanwhile.
    """
    model.eval()
    result: dict[str, Any] = {"eps": "8/255", "seed": seed}
    drawn: dict[int | None, tuple[np.ndarray, Tensor, Tensor]] = {}
    if "autoattack" in attacks:
        check_classes(model, to_unit(torch.from_numpy(test.images(np.arange(1)))))
    with true_fp32(), enough_memory(lambda: f"Take a smaller --batch-size of fastafd.evaluate than {batch_size}"):
        for attack in attacks:
            wanted = autoattack_n if attack == "autoattack" else n
            if wanted not in drawn:
                indices = balanced_draw(test.labels, wanted, seed)
                images, labels = torch.from_numpy(test.images(indices)), torch.from_numpy(test.labels[indices])
                drawn[wanted] = indices, images, labels
            indices, images, labels = drawn[wanted]
            began = time.perf_counter()
            details: dict[str, Any] = {}
            if attack == "autoattack":
                name = f"{label} AutoAttack"
                correct, details = autoattack(model, to_unit(images), labels, batch_size, seed, console, name)
            else:
                pgd = PGD20 if attack == "pgd20" else None
                name = f"{label} {attack}"
                warnings: list[str] = []
                correct = accuracy_under(model, images, labels, pgd, batch_size, seed, console, name, warnings)
                details = {"warnings": warnings} if warnings else {}
            count, seconds = int(correct.sum()), time.perf_counter() - began
            result[attack] = {"n": len(labels), "correct": count, "accuracy": count / len(labels)}
            result[attack] |= {"interval": wilson(count, len(labels)), "seconds": seconds, **details}
            if len(indices) < len(test):
                result[attack]["indices"] = indices.tolist()
    return result


def accuracy_under(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: PGD | None,
    batch_size: int,
    seed: int,
    console: Console,
    label: str,
    warnings: list[str] | None = None,
) -> Tensor:
    """Which of the images, uint8 (N,H,W,3) or float32 (N,3,H,W), stay correct: (N,) bool.

    The attack's starts come from a generator of their own. An attack under which the mean cross-entropy does not rise
    proves nothing: the console says so, and `warnings` gets the sentence.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    correct = torch.zeros(len(y), dtype=torch.bool)
    losses = torch.zeros(2, dtype=torch.float64, device=device)  # summed, before and under the attack
    with Bar(console, label, len(y)) as bar:
        for first in range(0, len(y), batch_size):
            part = slice(first, first + batch_size)
            images = x[part].to(device)
            images = to_unit(images) if images.dtype == torch.uint8 else images
            images = images.contiguous(memory_format=torch.channels_last)
            labels = y[part].to(device)
            if attack is not None:
                clean, images = images, attack(model, images, labels, generator)
                with torch.no_grad():
                    losses[0] += F.cross_entropy(model(clean), labels, reduction="sum")
            with torch.no_grad():
                logits = model(images)
                losses[1] += F.cross_entropy(logits, labels, reduction="sum")
                correct[part] = (logits.argmax(1) == labels).cpu()
            bar.advance(len(labels))
    before, under = (losses / len(y)).tolist()
    if attack is not None and attack.steps and not under > before:
        warning = f"the attack has not raised the mean loss ({before:.4g} before it, {under:.4g} under it)"
        console.line(f"{label}: {warning}; this accuracy says nothing about robustness")
        if warnings is not None:
            warnings.append(warning)
    return correct


def autoattack(
    model: nn.Module, x: Tensor, y: Tensor, batch_size: int, seed: int, console: Console, label: str
) -> tuple[Tensor, dict[str, Any]]:
    """Which images survive AutoAttack standard, (N,) bool, and the accuracy after each of its attacks.

    Every image that the library returns is checked here, against the ball and by the model, so the count is ours
    and not a line of its log.
    """
    found = run_autoattack(model, x, y, EPS, batch_size, seed, lambda line: console.line(f"{label}: {line}"))
    outside = (found.x_adv - x).abs().max() > EPS + 1e-6 or found.x_adv.min() < 0 or found.x_adv.max() > 1
    if outside or not found.x_adv.isfinite().all():
        raise RuntimeError("AutoAttack returned an image outside the ball or outside [0,1]")
    correct = accuracy_under(model, found.x_adv, y, None, batch_size, seed, console, f"{label} check")
    survivors = correct & (found.predicted == y)
    warnings = list(found.warnings)
    if torch.equal(found.x_adv, x):  # it keeps what it did not break, so that the mean loss is what it was
        warnings.append("AutoAttack has changed no image, so it has not raised the mean loss")
        console.line(f"{label}: {warnings[-1]}; look at the model before this accuracy")
    return survivors, {"version": "standard", "accuracy_after": found.accuracy_after, "warnings": warnings}


# -- counting -----------------------------------------------------------------------------------------------------


def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion (95 % for the default z). Source: Wilson 1927."""
    share, spread = correct / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def show(results: dict[str, dict[str, Any]], console: Console, title: str) -> None:
    """One row a model, one column an attack: accuracy in per cent, its interval, and n."""
    names = {"clean": "clean", "pgd20": "PGD-20", "autoattack": "AutoAttack"}
    present = [attack for attack in ATTACKS if any(attack in result for result in results.values())]

    def cell(result: dict[str, Any], attack: str) -> str:
        if attack not in result:
            return "–"
        found = result[attack]
        low, high = found["interval"]
        return f"{100 * found['accuracy']:.2f} [{100 * low:.1f}, {100 * high:.1f}] n={found['n']}"

    rows = [[name, *(cell(result, attack) for attack in present)] for name, result in results.items()]
    console.table(title, ["%", *(names[attack] for attack in present)], rows)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
