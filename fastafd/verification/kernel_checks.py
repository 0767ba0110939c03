"""Check each kernel that a step launches, with the operands of that step, against its reference in float64.

No ReLU lies between a kernel and its result here, so the limit is tight: the kernel may be twice as far from float64 as
plain PyTorch in the same types, plus a quarter of a rounding error. Kernels that move pixels must equal their reference
bit for bit.
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
    """The operands of a kernel's call, and its results.

    Those that it returned, or its first operand, which it wrote.
    """

    operands: tuple[Any, ...]
    results: list[Tensor]


class Deviation(NamedTuple):
    """Relative distances from float64's result.

    Of plain PyTorch in the same types, of the kernel, and the kernel's limit.
    """

    eager: float
    fused: float
    limit: float


class Watch:
    """Records the first launch of each kernel at each shape, and counts the launches of each kernel.

    A kernel's name stands for its first shape, "name 2" for the next shape. A CUDA graph's replay makes no calls in
    Python, so its launches are not recorded.
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
    """For every result of a kernel that `Watch` recorded: its distance from float64's, and how much too long it is."""
    name = label.split()[0]
    operation = OPERATIONS[name]
    operands, fused = launch
    if name == "afd_loss":
        # A rounding error may change y' of nearly tied rows, and the total is a mean over rows: leave those rows out.
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
            allowance = max(allowance, 2.0**-11)  # the relative rounding error of TF32
    by_quantity = {}
    for result, *values in zip(RESULTS[name], eager, fused, exact, strict=True):
        for quantity, how_far in ((result, distance), (f"{result}, length", too_long)):
            of_eager, of_fused = (how_far(value, values[2]) for value in values[:2])
            by_quantity[quantity] = Deviation(of_eager, of_fused, 2 * of_eager + allowance)
    return by_quantity


def distance(result: Tensor, exact: Tensor) -> float:
    """The relative Euclidean distance; for labels, the share that differs."""
    if not result.is_floating_point():
        return float((result != exact).double().mean())
    return float((result.double() - exact).norm()) / (float(exact.double().norm()) or 1.0)


def too_long(result: Tensor, exact: Tensor) -> float:
    """The relative excess or lack of length along the exact result; 0 for labels.

    In the distance, 16-bit rounding errors hide a factor of 1.01; here they cancel.
    """
    if not result.is_floating_point():
        return 0.0
    exact = exact.double()
    return abs(float(((result.double() - exact) * exact).sum())) / (float(exact.square().sum()) or 1.0)


def nearly_tied(operands: tuple[Any, ...]) -> Tensor:
    """The rows of `afd_loss` whose two most likely wrong classes differ by rounding errors alone: (B,) bool."""
    features, _, labels, *_ = operands
    _, _, logits, *_ = run(OPERATIONS["afd_loss"].reference, widened(operands))
    if logits.shape[1] < 3:
        return torch.zeros_like(labels, dtype=torch.bool)
    first, second = logits.scatter(1, labels[:, None], float("-inf")).topk(2, dim=1).values.unbind(1)
    return first - second < 16 * torch.finfo(features.dtype).eps * logits.abs().amax(1)


def run(function: Callable[..., Any], operands: tuple[Any, ...]) -> list[Tensor]:
    """The results of the function on copies of the operands."""
    operands = copies(operands)
    return listed(function(*operands), operands)


def listed(result: Any, operands: tuple[Any, ...]) -> list[Tensor]:
    """Copies of the results, or of the first operand if the operation returns None and writes into it."""
    if result is None:
        result = operands[0]
    return [value.clone() for value in (result if isinstance(result, tuple) else (result,))]


def copies(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """The operands with every tensor cloned."""
    return tuple(operand.clone() if isinstance(operand, Tensor) else operand for operand in operands)


def widened(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """The operands with every floating-point tensor in float64."""
    return tuple(o.double() if isinstance(o, Tensor) and o.is_floating_point() else o for o in operands)


def rounding(operands: tuple[Any, ...]) -> float:
    """The largest relative error of rounding to the coarsest type among the operands."""
    types = {o.dtype for o in operands if isinstance(o, Tensor) and o.is_floating_point()}
    return max(torch.finfo(dtype).eps / 2 for dtype in types)
