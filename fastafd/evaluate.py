"""python -m fastafd.evaluate: clean, PGD-20 and AutoAttack accuracy of a run or of any weights, with intervals.

The attacks have the eps that the run was trained with, 8/255 for other weights.

    python -m fastafd.evaluate runs/NAME --attack pgd20
    python -m fastafd.evaluate --arch resnet18 --weights FILE --dataset cifar10 --attack autoattack --n 1000 --json

Evaluation is in fp32 and eager, whatever the training was, and launches no kernel of fastafd: reported robustness must
not depend on a fast path.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastafd import cli
from fastafd.checkpoint import load_model_about
from fastafd.config import Task
from fastafd.console import Console
from fastafd.data import load_dataset
from fastafd.device import provenance, resolve_device
from fastafd.evaluation import ATTACKS, EPS, evaluate, show_accuracies
from fastafd.files import as_json, save_text
from fastafd.models import build_model, check_model
from fastafd.models.cost import set_threads
from fastafd.settings import UsageError, check, choice, number, optional, path, pixels, setting, switch, text
from fastafd.weights import check_classes, check_classifier, fit_weights, other_classes, read_weights


def text_if_given(value: object, field: str) -> str | None:
    """Parse any string, "none" too; None says that the flag was not given."""
    return None if value is None else text(value, field)


@dataclass(frozen=True)
class EvaluateConfig:
    """The settings of `python -m fastafd.evaluate`. The settings of the run folder are the defaults of the others."""

    model: Path | None = setting(None, "run folder or model.safetensors (also as the first word)", optional(path))
    weights: Path | None = setting(None, "any other file of weights; say its --arch and --dataset", optional(path))
    arch: str | None = setting(None, "classifier that --weights belong to", optional(text))
    normalize: str | None = setting(
        None, "normalisation layer of --weights: none (default), cifar10, cifar100 or imagenet", text_if_given
    )
    dataset: str | None = setting(None, "data set; default: that of the run", optional(text))
    data_dir: Path | None = setting(None, "folder that holds it; default: that of the run, else data", optional(path))
    image_size: int | None = setting(
        None,
        "side in pixels that an image folder or digits are resized to; default: that of the run",
        optional(number(8, 1024, True)),
    )
    skip_bad_images: bool | None = setting(
        None, "leave out image files that cannot be decoded, and list them; default: as the run", optional(switch)
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
    words, argv = cli.words_apart(argv, EvaluateConfig())
    if len(words) > 1:
        raise UsageError(f"model: got {' and '.join(words)}, takes one run folder or model.safetensors")
    if words and any(flag.partition("=")[0] == "--model" for flag in argv):
        raise UsageError(f"model: got {words[0]} and --model, takes one of them")
    argv = [word for model in words for word in ("--model", model)] + argv
    config = cli.parse(EvaluateConfig(), argv, prog="fastafd.evaluate", about=__doc__)
    console = Console()
    device = resolve_device(config.device)

    # Load the model, and the data set that the command line or the run folder names.
    if (config.model is None) == (config.weights is None):
        raise UsageError("model: takes a run folder or a model.safetensors, or else --weights FILE with --arch")
    if config.model is not None and config.arch is not None:
        raise UsageError(f"arch: {config.model} says which classifier it holds; --arch goes with --weights")
    if config.model is not None and config.normalize is not None:
        raise UsageError(f"normalize: {config.model} says its normalisation; --normalize goes with --weights")
    net, about = load_model_about(config.model) if config.model is not None else (None, {})
    weights = read_weights(config.weights) if config.weights is not None else None
    settings = run_settings(config.model)
    dataset_name = config.dataset or settings.get("dataset") or about.get("dataset")
    if dataset_name is None:
        raise UsageError("dataset: got none, takes the name of a data set, such as --dataset cifar10")
    normalize = config.normalize or "none"
    if weights is not None:
        if config.arch is None:
            raise UsageError("arch: got none, takes the classifier that --weights belong to, such as --arch resnet18")
        check_model(config.arch, normalize)
        check_classifier(weights, config.arch, normalize)
    of_dataset = settings if settings.get("dataset") == dataset_name else {}
    if about.get("dataset") == dataset_name == "digits":  # whose images have any of several sizes
        of_dataset = {"image_size": about.get("image_size")} | of_dataset
    image_size = config.image_size or of_dataset.get("image_size")
    data_dir = config.data_dir or Path(of_dataset.get("data_dir", "data"))
    skip = of_dataset.get("skip_bad_images", False) if config.skip_bad_images is None else config.skip_bad_images
    dataset = load_dataset(dataset_name, data_dir, image_size, skip_bad_images=skip)
    if weights is not None:
        check_classes(weights, dataset.classes)
        net = build_model(str(config.arch), len(dataset.classes), normalize)
        fit_weights(net, weights, console.line)
    elif difference := other_classes(about, dataset.classes):
        raise UsageError(f"dataset: {config.model} {difference}")
    assert net is not None  # one of --model and --weights is given
    shown = Path(str(config.model or config.weights))

    eps = pixels(about.get("eps", settings.get("eps", EPS)), "eps")  # that of the training
    set_threads(net.to(device), dataset.image_size, config.batch_size)
    result = evaluate(
        net,
        dataset.test,
        ATTACKS[: ATTACKS.index(config.attack) + 1],
        eps=eps,
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
        threat = f"l-infinity, eps {result['eps']}"
        show_accuracies({shown.name: result}, console, f"{dataset_name}, {threat}, Wilson 95 % intervals")


def run_settings(model: Path | None) -> dict[str, Any]:
    """The task's settings in a run folder's config.yaml, and the attack's eps; empty if `model` is no run folder.

    UsageError, which names the file, for a setting that it does not take.
    """
    if model is None or not (model / "config.yaml").exists():
        return {}
    file = model / "config.yaml"
    tree = cli.read_yaml(file)
    parsers = {name: field.metadata["parse"] for name, _, field in cli.entries(Task())}
    settings = {name: parse(tree[name], f"{file}: {name}") for name, parse in parsers.items() if name in tree}
    attack = tree.get("attack", {})
    if not isinstance(attack, dict):
        raise UsageError(f"{file}: attack: got {attack!r}, takes settings of its own, such as eps")
    return settings | ({"eps": pixels(attack["eps"], f"{file}: attack.eps")} if "eps" in attack else {})


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
