"""The rows of a certificate: the distances of a step's results from the exact results, and their limits.

A distance is Euclidean and relative to the exact value. Each row has three numbers: the distance of plain PyTorch
("eager"), the distance of the fast step in the same arithmetic, and the limit of the fast step's distance.

One comparison proves little in 32 or 16 bits. If a ReLU's input lies within a rounding error of zero, it may be active
in one step and not in the other; then every gradient below it moves by 1e-4 to 1e-2 in fp32, and by far more in 16
bits. So the verdict in the run's arithmetic uses the median of several comparisons, and a limit has three parts: twice
the median of eager, an allowance for such flips, and a ceiling, which a large eager distance does not raise. In float64
there are no flips, and the limit is 1e-9.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastafd.training.step import TrainStep
from fastafd.verification.kernel_checks import BIT_FOR_BIT, Deviation

Values = dict[str, Tensor]  # float64, by "group: quantity"
Row = dict[str, Any]

FLOAT64 = 1e-9
ROUNDINGS = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 1e-2}  # rounding errors of a gradient, by the run's arithmetic


@dataclass(frozen=True)
class Limit:
    """The limit of a median distance: twice that of eager plus `allowance`, but at most `ceiling`."""

    allowance: float
    ceiling: float

    def of(self, eager: float) -> float:
        return min(2 * eager + self.allowance, self.ceiling)


# By arithmetic and group. The limits come from correct steps: in the runs of `benchmarks.verify_rates` no distance was
# above 0.53 of its limit. 16 bits need large limits: the fast step rounds weights with BatchNorm folded into them,
# plain PyTorch rounds them without, and more comparisons do not average that out.
LIMITS = {
    "fp32": {
        "loss terms": Limit(1e-5, 1e-4),
        "gradients": Limit(5e-3, 2e-2),
        "gradients' lengths": Limit(2e-3, 5e-3),
        "BatchNorm buffers": Limit(1e-5, 1e-4),
        "weights": Limit(5e-5, 5e-4),
        "averages": Limit(5e-5, 5e-4),
        "attack's loss": Limit(0.01, 0.05),
        "attack's pixels": Limit(0.02, 0.1),
    },
    "fp16": {
        "loss terms": Limit(3e-3, 3e-2),
        "gradients": Limit(5e-2, 0.3),
        "gradients' lengths": Limit(4e-2, 0.2),
        "BatchNorm buffers": Limit(3e-4, 3e-3),
        "weights": Limit(2e-3, 2e-2),
        "averages": Limit(2e-3, 2e-2),
        "attack's loss": Limit(0.03, 0.15),
        "attack's pixels": Limit(0.1, 0.6),
    },
    "bf16": {
        "loss terms": Limit(2e-2, 0.1),
        "gradients": Limit(0.15, 0.7),
        "gradients' lengths": Limit(0.12, 0.5),
        "BatchNorm buffers": Limit(2e-3, 2e-2),
        "weights": Limit(5e-3, 5e-2),
        "averages": Limit(5e-3, 5e-2),
        "attack's loss": Limit(0.05, 0.25),
        "attack's pixels": Limit(0.15, 0.75),
    },
}


def limits(amp: str, device: torch.device) -> dict[str, Limit]:
    """The limits for an arithmetic.

    Fp32 on CUDA has those of fp16 unless TF32 is off: its convolutions are as coarse.
    """
    tf32 = amp == "fp32" and device.type == "cuda" and torch.backends.cudnn.allow_tf32
    return LIMITS["fp16" if tf32 else amp]


def values_of(step: TrainStep, metrics: dict[str, Tensor]) -> Values:
    """The results of a step that returned `metrics`: loss terms, gradients, BatchNorm buffers, weights, averages."""
    values = {
        f"loss terms: {name}": value for name, value in metrics.items() if not name.endswith("accuracy")
    }  # an accuracy moves by whole images, not by rounding errors
    for name, parameter in step.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            values[f"gradients: {name}"] = parameter.grad
            values[f"weights: {name}"] = parameter
    models = [("BatchNorm buffers", step.model)]
    if step.ema is not None:
        models.append(("averages", step.ema.module))
        values |= {f"averages: {name}": value for name, value in step.ema.module.named_parameters()}
    for group, model in models:
        values |= {f"{group}: {name}": value for name, value in model.named_buffers() if "running" in name}
    return {name: value.detach().to(torch.float64, copy=True) for name, value in values.items()}


class Distances:
    """The distances of a step's results from the exact step's: for each quantity, one number for each comparison."""

    def __init__(self) -> None:
        self.of: defaultdict[str, list[float]] = defaultdict(list)
        self.slopes: defaultdict[str, list[float]] = defaultdict(list)

    def measure(self, values: Values, exact: Values) -> None:
        """Add one comparison."""
        longest: defaultdict[str, float] = defaultdict(float)
        for name, value in exact.items():
            group = name.split(":")[0]
            longest[group] = max(longest[group], float(value.norm()))
        for name, value in values.items():
            group = name.split(":")[0]
            # Loss terms are means of logarithms and cosines, whose errors are those of numbers near 1. A gradient that
            # is zero except for rounding errors, such as that of a bias before BatchNorm, is measured absolutely.
            shortest = 1.0 if group == "loss terms" else 1e-6 * longest[group] or 1.0
            length = max(float(exact[name].norm()), shortest)
            self.of[name].append(float((value - exact[name]).norm()) / length)
            if group == "gradients":
                self.slopes[name].append(float(((value - exact[name]) * exact[name]).sum()) / length**2)


def largest(values: list[float]) -> float:
    """The largest value; NaN if any of them is NaN."""
    return max(values, key=lambda value: math.inf if math.isnan(value) else value)


def middle(values: list[float]) -> float:
    """The median; NaN if any value is NaN."""
    return math.nan if any(map(math.isnan, values)) else median(values)


def row(group: str, quantity: str, eager: float | None, fast: float, limit: float) -> Row:
    """A row of the certificate. eager: None if there is no eager distance. NaN exceeds every limit."""
    return {"group": group, "quantity": quantity, "eager": eager, "fast": fast, "limit": limit, "ok": fast <= limit}


def float64_rows(compiled: Distances, attacks: list[dict[str, float]]) -> list[Row]:
    """The fast engine in float64, where no chance is involved: the largest distance of every quantity."""
    rows = [
        row(
            "float64, augmentation",
            "share of other pixels",
            None,
            largest([a["compiled augmented"] for a in attacks]),
            0.0,
        ),
        # If a gradient is zero except for rounding errors, their sign decides a pixel.
        row("float64, attack", "share of other pixels", None, largest([a["compiled attacked"] for a in attacks]), 1e-4),
    ]
    for name, distances in compiled.of.items():
        group, quantity = name.split(": ")
        rows.append(row(f"float64, {group}", quantity, None, largest(distances), FLOAT64))
    return rows


def update_rows(eager: Distances, fast: Distances, limits: dict[str, Limit]) -> list[Row]:
    """Medians over comparisons in the run's arithmetic; for gradients also how much too long they are."""
    rows = []
    for name, distances in fast.of.items():
        group, quantity = name.split(": ")
        medians = middle(eager.of[name]), middle(distances)
        rows.append(row(group, quantity, *medians, limits[group].of(medians[0])))
    for name, slopes in fast.slopes.items():
        medians = abs(middle(eager.slopes[name])), abs(middle(slopes))
        limit = limits["gradients' lengths"].of(medians[0])
        rows.append(row("gradients' lengths", name.split(": ")[1], *medians, limit))
    return rows


def graph_rows(again: Distances, graph: Distances, amp: str, unrecorded: int) -> list[Row]:
    """The distances of a replayed step from the same step launched kernel by kernel, which launches the same kernels.

    again: the distances of the step launched kernel by kernel once more, since libraries may sum in another order. A
    replay's distance may be three times as large, plus a few rounding errors. unrecorded: the number of steps that were
    not replayed.
    """
    rows = [row("graph", "steps that were not replayed", None, float(unrecorded), 0.0)]
    for name, distances in graph.of.items():
        group, quantity = name.split(": ")
        medians = middle(again.of[name]), middle(distances)
        # Weights, statistics and averages are fp32 and move little in a step, so their errors are small too.
        roundings = ROUNDINGS[amp] * (1.0 if group in ("loss terms", "gradients") else 0.02)
        rows.append(row(f"graph, {group}", quantity, *medians, 3 * medians[0] + roundings))
    return rows


def attack_rows(attacks: list[dict[str, float]], limits: dict[str, Limit]) -> list[Row]:
    """The mean loss under the attack, relative to the gain of float64's attack, and the shares of different pixels."""
    mean = {name: sum(a[name] for a in attacks if name in a) / len(attacks) for name in attacks[-1]}
    gain = abs(mean["exact loss"] - mean["clean loss"]) or 1.0
    eager, fast = (abs(mean[f"{name} loss"] - mean["exact loss"]) / gain for name in ("eager", "fast"))
    other = mean["eager attacked"], mean["fast attacked"]
    return [
        row("augmentation", "share of other pixels", mean["eager augmented"], mean["fast augmented"], 0.0),
        row("attack", "mean cross-entropy", eager, fast, limits["attack's loss"].of(eager)),
        row("attack", "share of other pixels", *other, limits["attack's pixels"].of(other[0])),
    ]


def kernel_rows(comparisons: list[dict[str, dict[str, Deviation]]]) -> list[Row]:
    """The medians over comparisons for each kernel and result.

    For pixels, which must be equal, the largest distance.
    """
    rows = []
    for name in dict.fromkeys(name for kernels in comparisons for name in kernels):
        of_kernel = [kernels[name] for kernels in comparisons if name in kernels]
        for result in of_kernel[0]:
            of_all: Callable[[list[float]], float] = largest if name.split()[0] in BIT_FOR_BIT else middle
            eager, fused, limit = (of_all([d[result][i] for d in of_kernel]) for i in range(3))
            rows.append(row(f"kernel {name}", result, eager, fused, limit))
    return rows
