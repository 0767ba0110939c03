"""The accuracy of a classifier: on clean images, under the paper's PGD-20 and under AutoAttack standard."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastafd.attacks import PGD, check_images, check_labels, check_logits, check_network, named_failure
from fastafd.console import Bar, Console
from fastafd.data import Split, balanced_draw, to_unit
from fastafd.device import device_of, enough_memory, true_fp32
from fastafd.evaluation.autoattack import check_classes, run_autoattack
from fastafd.evaluation.counting import wilson
from fastafd.models import eval_mode, frozen
from fastafd.settings import ATTACK_NAMES, UsageError, in_255ths, number, optional, pixels, unknown

EPS = 8 / 255  # the default radius
STEP = 0.003 / EPS  # the length of a step of PGD-20, in units of eps: 0.003 at 8/255 in the paper
ATTACKS = tuple(ATTACK_NAMES)
COUNT = optional(number(1, whole=True))
SEED = number(0, 2**32, whole=True)


def pgd20(eps: float = EPS) -> PGD:
    """The paper's evaluation attack: 20 steps of 0.003 from a random start at eps 8/255, other steps in proportion."""
    return PGD(eps=eps, step_size=STEP * eps, steps=20, random_start=True)


@torch.inference_mode(False)
def evaluate(
    model: nn.Module,
    test: Split,
    attacks: str | Sequence[str] = ATTACKS[:2],
    *,
    eps: float | str = EPS,
    n: int | None = None,
    autoattack_n: int | None = None,
    batch_size: int = 250,
    seed: int = 0,
    console: Console | None = None,
    label: str = "evaluate",
) -> dict[str, Any]:
    """The accuracy of a classifier under each of `attacks`: "clean", "pgd20", "autoattack".

    model: takes pixels in [0,1], (B,3,H,W), and returns logits (B,K). It is evaluated in eval mode; afterwards each
    layer has its former mode.
    test: such as `fastafd.data.load_dataset("cifar10", folder).test`, or an `ArraySplit` of uint8 images and labels.
    eps: the radius of the l-infinity ball, in pixels of [0,1], or text such as "8/255". The step of PGD-20 is in
    proportion to it.
    n, autoattack_n: how many images, a class-balanced draw of `seed` (None: all); the smaller draw is part of the
    larger one.
    Returns for each attack n, correct, accuracy, the Wilson 95 % interval, seconds, and the indices of a draw. An image
    for which the model has no prediction (NaN, or infinite logits that tie) counts as wrong.
    Global generators are left as they were. All is computed in true fp32: autocast and TF32, which PyTorch allows
    convolutions by default, are off. Raises UsageError for other arguments, for AutoAttack of fewer than 4 classes, for
    labels that the model has no class for, and for a model that does not take the images or does not return logits.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model: got a {type(model).__name__}, takes an nn.Module")
    if not isinstance(test, Split):
        got = type(test).__name__
        raise UsageError(f"test: got a {got}, takes a split such as fastafd.data.ArraySplit(images, labels)")
    if not len(test):
        raise UsageError("test: got a split without images")
    check_network(model, "model")
    attacks = (attacks,) if isinstance(attacks, str) else attacks
    if not isinstance(attacks, Sequence):
        raise UsageError(f"attacks: got {attacks!r}, takes names of {', '.join(ATTACKS)}")
    for attack in attacks:
        if attack not in ATTACKS:
            raise unknown("attacks", attack, ATTACKS)
    eps = pixels(eps, "eps")
    n = COUNT(n, "n")
    if "autoattack" in attacks:
        autoattack_n = COUNT(autoattack_n, "autoattack_n")
    batch_size, seed = number(1, whole=True)(batch_size, "batch_size"), SEED(seed, "seed")
    console = console or Console()
    result: dict[str, Any] = {"eps": in_255ths(eps), "seed": seed}
    drawn: dict[int | None, tuple[np.ndarray, Tensor, Tensor]] = {}
    advice = f"Take a smaller --batch-size of fastafd.evaluate than {batch_size}"
    with eval_mode(model), frozen(model), true_fp32(), enough_memory(lambda: advice):
        if "autoattack" in attacks:
            check_classes(model, to_unit(torch.from_numpy(test.images(np.arange(1)))))
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
                correct, details = autoattack(model, to_unit(images), labels, eps, batch_size, seed, console, name)
            else:
                pgd = pgd20(eps) if attack == "pgd20" else None
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
    """Whether the model classifies each image right under the attack: (N,) bool, on the CPU.

    x: uint8 (N,H,W,3) or float32 (N,3,H,W). attack: None for clean images. A generator of `seed` draws the attack's
    starts. If the attack does not raise the mean cross-entropy, it proves nothing; if the model has no prediction for
    an image, the image counts as wrong: the console says both, and `warnings` gets the sentences.
    """
    if x.dtype != torch.uint8:
        check_images(x)
    check_labels(y, len(x))
    y = y.long()
    device = device_of(model)
    generator = torch.Generator(device).manual_seed(seed)
    correct = torch.zeros(len(y), dtype=torch.bool)
    losses = torch.zeros(2, dtype=torch.float64, device=device)  # sums before and under the attack
    unpredicted = 0  # images
    with Bar(console, label, len(y)) as bar:
        for first in range(0, len(y), batch_size):
            part = slice(first, first + batch_size)
            images = x[part].to(device)
            images = to_unit(images) if images.dtype == torch.uint8 else images
            images = images.contiguous(memory_format=torch.channels_last)
            labels = y[part].to(device)
            with torch.no_grad(), named_failure(images, "model"):
                clean = model(images)
            check_logits(clean, len(images), "model", finite=False)
            check_labels(labels, len(images), clean.shape[1])
            logits = clean
            if attack is not None:
                images = attack.perturb(model, images, labels, generator)
                with torch.no_grad():
                    logits = model(images)
            losses[0] += summed_loss(clean, labels)
            losses[1] += summed_loss(logits, labels)
            predicted = has_prediction(logits)
            correct[part] = ((logits.argmax(1) == labels) & predicted).cpu()
            unpredicted += int((~predicted).sum())
            bar.advance(len(labels))
    before, under = (losses / len(y)).tolist()
    sentences = []
    if unpredicted:
        sentences.append(
            f"the model returns NaN, or infinite logits that tie, for {unpredicted} of {len(y)} images, which count as"
            " wrong"
        )
    if attack is not None and attack.steps and attack.eps and not under > before:
        said = f"the attack has not raised the mean loss ({before:.4g} before it, {under:.4g} under it)"
        sentences.append(f"{said}; this accuracy says nothing about robustness")
    for sentence in sentences:
        console.line(f"{label}: {sentence}")
    if warnings is not None:
        warnings += sentences
    return correct


def has_prediction(logits: Tensor) -> Tensor:
    """Whether one class is predicted (B,): False for NaN, and where infinite logits tie. logits: (B,C)."""
    top = logits.max(1, keepdim=True).values  # NaN if there is one
    tie = (logits == top).sum(1) > 1
    return ~(top.isnan().squeeze(1) | (top.isinf().squeeze(1) & tie))


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The summed cross-entropy (), without the images whose logits (B,K) are NaN."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    return losses[~losses.isnan()].sum()


def autoattack(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, batch_size: int, seed: int, console: Console, label: str
) -> tuple[Tensor, dict[str, Any]]:
    """Which images survive AutoAttack standard, (N,) bool, and the accuracy after each of its attacks.

    Every image that the library returns is checked here, against the ball and by the model. So this package counts
    the survivors; it does not take the number from the library's log.
    """
    result = run_autoattack(model, x, y, eps, batch_size, seed, lambda line: console.line(f"{label}: {line}"))
    outside = (result.x_adv - x).abs().max() > eps + 1e-6 or result.x_adv.min() < 0 or result.x_adv.max() > 1
    if outside or not result.x_adv.isfinite().all():
        raise RuntimeError("AutoAttack returned an image outside the ball or outside [0,1]")
    warnings: list[str] = []
    correct = accuracy_under(model, result.x_adv, y, None, batch_size, seed, console, f"{label} check", warnings)
    survivors = correct & (result.predicted == y)
    warnings = [*result.warnings, *warnings]
    if torch.equal(result.x_adv, x):  # it returns the clean image wherever it does not break the model
        warnings.append("AutoAttack has changed no image, so it has not raised the mean loss")
        console.line(f"{label}: {warnings[-1]}; look at the model before this accuracy")
    return survivors, {"version": "standard", "accuracy_after": result.accuracy_after, "warnings": warnings}
