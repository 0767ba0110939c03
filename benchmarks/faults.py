"""Faults that are planted in the fast step, for the tests and the rates of `fastafd.verify`, which must find them.

Kernels run on CUDA alone. `kernels_on_a_cpu` stands in for it: there every operation that would launch a kernel runs
its reference instead, or a wrong one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastafd.kernels import operation as operations
from fastafd.kernels.operation import OPERATIONS, Operation
from fastafd.methods import Batch, Loss
from fastafd.training.engine import Fast


@dataclass(frozen=True)
class Fault:
    """Where it stands in the certificate (the beginning of a group), how it is planted, the recipe that meets it.

    `hides_in`: types of arithmetic whose own roundings are larger than the fault, which hide it.
    """

    group: str
    plant: Callable[[], AbstractContextManager[Any]]
    recipe: str = "released"
    hides_in: tuple[str, ...] = ()


@contextmanager
def kernels_on_a_cpu(**wrong: Callable[..., Any]) -> Iterator[None]:
    """Let operations launch on a CPU too: the functions named here, or else their references, act as the kernels."""

    def is_fused(self: Operation, operands: tuple[Any, ...]) -> bool:
        wide = any(isinstance(operand, Tensor) and operand.dtype == torch.float64 for operand in operands)
        return not wide and not operations._references_wanted

    kernels = {name: operation.fused for name, operation in OPERATIONS.items()}
    with mock.patch.object(Operation, "is_fused", is_fused):
        try:
            for name, operation in OPERATIONS.items():
                operation.fused = wrong.get(name, operation.reference)
            yield
        finally:
            for name, operation in OPERATIONS.items():
                operation.fused = kernels[name]


def kernel(name: str, change: Callable[..., Any], recipe: str = "released") -> Fault:
    """A fault of the kernel `name`. change(reference, *operands): the results of the wrong kernel."""
    reference = OPERATIONS[name].reference
    return Fault(
        f"kernel {name}", lambda: kernels_on_a_cpu(**{name: lambda *operands: change(reference, *operands)}), recipe
    )


def engine(group: str, part: str, change: Callable[..., Any], recipe: str = "released") -> Fault:
    """A fault of the fast engine's method `part`. change(right method, engine, *operands): the wrong result."""
    right = getattr(Fast, part)
    return Fault(
        group,
        lambda: mock.patch.object(Fast, part, lambda self, *operands: change(right, self, *operands)),
        recipe,
    )


def times(factor: float, index: int) -> Callable[..., Any]:
    """A change that multiplies one result of an operation by a factor."""

    def change(reference: Callable[..., Any], *operands: Any) -> Any:
        results = list(reference(*operands))
        results[index] = factor * results[index]
        return tuple(results)

    return change


def half_a_step(reference: Any, x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, step_size: float) -> None:
    reference(x_adv, grad, x, eps, step_size / 2)


def outside_the_range(reference: Any, x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, step_size: float) -> None:
    x_adv.copy_((x_adv + step_size * grad.sign()).clamp(x - eps, x + eps))


def one_image_mirrored(reference: Any, x: Tensor, offsets: Tensor, flips: Tensor, padding: int) -> Tensor:
    flips = flips.clone()
    flips[-1] = ~flips[-1]
    return reference(x, offsets, flips, padding)


def with_gradient(factor: float, only: torch.dtype | None = None) -> Callable[..., Loss]:
    """A change that multiplies the gradient of the first weight by a factor, for one type of weights or for all."""

    def change(right: Any, self: Fast, batch: Batch) -> Loss:
        weight = next(self.model.parameters())
        out = right(self, batch)
        if only is None or weight.dtype == only:
            hooks: list[Any] = []

            def longer(grad: Tensor) -> Tensor:
                hooks[0].remove()
                return factor * grad

            hooks.append(weight.register_hook(longer))
        return out

    return change


def in_eval_mode(right: Any, self: Fast, batch: Batch) -> Loss:
    train = self.model.train
    with mock.patch.object(self.model, "train", lambda: train(False)):
        return right(self, batch)


def with_last_labels(right: Any, self: Fast, batch: Batch) -> Loss:
    return right(self, batch._replace(y=batch.y.roll(1)))


def without_refresh(right: Any, self: Fast, x: Tensor, noise: Tensor | None, y: Tensor) -> Tensor:
    """From the second step on, the attack uses the weights of the first step."""
    if not hasattr(self, "refreshed"):
        self.refreshed = self.refresh()  # type: ignore[attr-defined]
    with mock.patch.object(self, "refresh", lambda: None):
        return right(self, x, noise, y)


def one_step_fewer(right: Any, self: Fast, x: Tensor, noise: Tensor | None, y: Tensor) -> Tensor:
    assert self.attack is not None
    fewer = type(self.attack)(self.attack.eps, self.attack.step_size, self.attack.steps - 1, self.attack.random_start)
    with mock.patch.object(self, "attack", fewer):
        return right(self, x, noise, y)


FAULTS = {
    "no fault": Fault("", nullcontext),
    "no fault, kernels": Fault("", kernels_on_a_cpu),
    "linf_step takes no step": kernel("linf_step", lambda reference, *operands: None),
    "linf_step takes half a step": kernel("linf_step", half_a_step),
    "linf_step leaves [0,1]": kernel("linf_step", outside_the_range),
    "attack_head turns its sign": kernel("attack_head", lambda reference, *operands: -reference(*operands)),
    "attack_head is 1 % too long": kernel("attack_head", lambda reference, *operands: 1.01 * reference(*operands)),
    "attack_head takes the next labels": kernel(
        "attack_head", lambda reference, a, y, w, b: reference(a, y.roll(1), w, b)
    ),
    "afd_loss: the total 1 % too large": kernel("afd_loss", times(1.01, 0)),
    "afd_loss: gradients of features 1 % too long": kernel("afd_loss", times(1.01, 5)),
    "afd_loss: D2's gradient doubled": kernel("afd_gradients", times(2.0, 2)),
    "afd_loss: D1's gradient 1 % too long": kernel("afd_gradients", times(1.01, 1)),
    "afd_loss: the classifier gets nothing of L1": kernel(
        "afd_gradients", lambda reference, *operands: reference(*operands[:-1], 0.0)
    ),
    "augment mirrors no image": kernel(
        "augment", lambda reference, x, offsets, flips, padding: reference(x, offsets, flips & False, padding)
    ),
    "augment mirrors one image": kernel("augment", one_image_mirrored),
    "kl_loss: 1 % too large": kernel("kl_rows", lambda reference, *z: 1.01 * reference(*z), "trades"),
    "kl_loss: a gradient 1 % too long": kernel("kl_gradients", times(1.01, 1), "trades"),
    "kl_loss: gradients exchanged": kernel("kl_gradients", lambda reference, *z: reference(*z)[::-1], "trades"),
    "loss 0.1 % too large": engine(
        "float64, gradients", "loss", lambda right, self, batch: scaled(right(self, batch), 1.001)
    ),
    "one weight's gradient 1 % too long": engine("float64, gradients", "loss", with_gradient(1.01)),
    "the same in the run's arithmetic alone": replace(
        engine("gradients", "loss", with_gradient(1.01, torch.float32)), hides_in=("bf16", "fp16")
    ),
    "30 % too long in the run's arithmetic alone": engine("gradients", "loss", with_gradient(1.3, torch.float32)),
    "BatchNorm in eval mode": engine("float64, BatchNorm buffers", "loss", in_eval_mode),
    "labels of other images": engine("float64, gradients", "loss", with_last_labels),
    "the teacher's features shifted": engine(
        "float64, gradients", "teacher_features", lambda right, self, x: right(self, x) + 1e-3
    ),
    "the attack stands still": engine("float64, attack", "perturb", lambda right, self, x, noise, y: x),
    "the attack takes a step fewer": engine("float64, attack", "perturb", one_step_fewer),
    "the attack sees old weights": engine("float64, attack", "perturb", without_refresh),
    "the average moves 0.1 % too far": engine(
        "float64, averages", "average", lambda right, self, weight: right(self, 1.001 * weight)
    ),
}


def scaled(loss: Loss, factor: float) -> Loss:
    return loss._replace(total=factor * loss.total)
