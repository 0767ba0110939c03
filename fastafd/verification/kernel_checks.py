"""Each kernel that a step launches, on that step's own operands, against its reference in float64.

No flip of a ReLU stands between a wrong kernel and its result here, so the limit is close: the kernel may be twice as
far from float64 as plain PyTorch in the same types, plus a quarter of a rounding. What moves pixels must equal its
reference bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastafd.kernels.operation import OPERATIONS

RESULTS = {
    "augment": ("pixels",),
    "linf_step": ("x_adv",),
    "attack_head": ("slope",),
    "afd_loss": ("total", "terms", "logits", "wrong labels", "f1 and f2", "their gradients", "gradients of logits"),
    "afd_gradients": ("features", "D1", "D2", "classifier weight", "classifier bias"),
    "kl_rows": ("divergences",),
    "kl_gradients": ("adversarial logits", "natural logits"),
    "conv_relu": ("output",),
}
BIT_FOR_BIT = ("augment", "linf_step")


class Launch(NamedTuple):
    """What a kernel was called with, and what it returned or wrote into its first operand."""

    operands: tuple[Any, ...]
    results: list[Tensor]


class Deviation(NamedTuple):
    """From float64's result, relative: of plain PyTorch in the same types, of the kernel; what the latter may be."""

    eager: float
    fused: float
    limit: float


class Watch:
    """The first launch of each kernel at each shape, and how often each kernel was launched.

    Its name stands for a kernel at the first shape that it was met with, "name 2" at the next. Launches of a CUDA
    graph's replay are not seen: Python does not make them.
    """

    def __init__(self) -> None:
        self.first: dict[str, Launch] = {}
        self.counts: dict[str, int] = {}
        self._shapes: dict[str, list[tuple[torch.Size, ...]]] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        fused = {name: operation.fused for name, operation in OPERATIONS.items()}
        try:
            for name, operation in OPERATIONS.items():
                operation.fused = self._around(name, operation.fused)
            yield
        finally:
            for name, operation in OPERATIONS.items():
                operation.fused = fused[name]

    def _around(self, name: str, fused: Callable[..., Any]) -> Callable[..., Any]:
        def launch(*operands: Any) -> Any:
            self.counts[name] = self.counts.get(name, 0) + 1
            shape = tuple(operand.shape for operand in operands if isinstance(operand, Tensor))
            shapes = self._shapes.setdefault(name, [])
            if shape not in shapes:
                shapes.append(shape)
            index = shapes.index(shape)
            label = f"{name} {index + 1}" if index else name
            if label in self.first:
                return fused(*operands)
            before = copies(operands)
            result = fused(*operands)
            self.first[label] = Launch(before, listed(result, operands))
            return result

        return launch


def deviations(label: str, launch: Launch) -> dict[str, Deviation]:
    """Of every result of a kernel, as `Watch` names it: its distance from float64's, and by how much it is too long."""
    name = label.split()[0]
    operation = OPERATIONS[name]
    operands, fused = launch
    if name == "afd_loss":
        # The kernel once more: its total is a mean over rows, among them those whose y' any rounding may change.
        rows = ~nearly_tied(operands)
        if rows.any():
            operands = (*(operand[rows] for operand in operands[:3]), *operands[3:])
            fused = run(operation.fused, operands)
    eager = run(operation.reference, operands)
    if name in BIT_FOR_BIT:
        exact, allowance = eager, 0.0
    else:
        exact, allowance = run(operation.reference, widened(operands)), max(2.0**-22, rounding(operands) / 4)
        if name == "conv_relu" and torch.backends.cudnn.allow_tf32:
            allowance = max(allowance, 2.0**-11)  # what TF32 rounds an operand by
    found = {}
    for result, *values in zip(RESULTS[name], eager, fused, exact, strict=True):
        for quantity, how_far in ((result, distance), (f"{result}, length", too_long)):
            of_eager, of_fused = (how_far(value, values[2]) for value in values[:2])
            found[quantity] = Deviation(of_eager, of_fused, 2 * of_eager + allowance)
    return found


def distance(result: Tensor, exact: Tensor) -> float:
    """Euclidean and relative; of labels the share of others."""
    if not result.is_floating_point():
        return float((result != exact).double().mean())
    return float((result.double() - exact).norm()) / (float(exact.double().norm()) or 1.0)


def too_long(result: Tensor, exact: Tensor) -> float:
    """By how much the result is too long or too short along the exact one, relative; of labels 0.

    A factor of 1.01 hides in the distance behind 16-bit roundings; here they cancel.
    """
    if not result.is_floating_point():
        return 0.0
    exact = exact.double()
    return abs(float(((result.double() - exact) * exact).sum())) / (float(exact.square().sum()) or 1.0)


def nearly_tied(operands: tuple[Any, ...]) -> Tensor:
    """Rows of `afd_loss` whose two likeliest wrong classes are within roundings of each other: (B,) bool."""
    features, _, labels, *_ = operands
    _, _, logits, *_ = run(OPERATIONS["afd_loss"].reference, widened(operands))
    if logits.shape[1] < 3:
        return torch.zeros_like(labels, dtype=torch.bool)
    first, second = logits.scatter(1, labels[:, None], float("-inf")).topk(2, dim=1).values.unbind(1)
    return first - second < 16 * torch.finfo(features.dtype).eps * logits.abs().amax(1)


def run(function: Callable[..., Any], operands: tuple[Any, ...]) -> list[Tensor]:
    operands = copies(operands)
    return listed(function(*operands), operands)


def listed(result: Any, operands: tuple[Any, ...]) -> list[Tensor]:
    """Copies of the results; of an operation that returns none, of its first operand, which it wrote into."""
    if result is None:
        result = operands[0]
    return [value.clone() for value in (result if isinstance(result, tuple) else (result,))]


def copies(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(operand.clone() if isinstance(operand, Tensor) else operand for operand in operands)


def widened(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """The floating-point tensors among them in float64."""
    return tuple(o.double() if isinstance(o, Tensor) and o.is_floating_point() else o for o in operands)


def rounding(operands: tuple[Any, ...]) -> float:
    """The largest relative error of rounding to the coarsest type among the operands."""
    types = {o.dtype for o in operands if isinstance(o, Tensor) and o.is_floating_point()}
    return max(torch.finfo(dtype).eps / 2 for dtype in types)
