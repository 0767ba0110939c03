"""Each operation of `fastafd.kernels` in three forms: as a user would write it, the same compiled, and ours.

    python -m pytest benchmarks/bench_kernels.py --benchmark-autosave
    python -m pytest benchmarks/bench_kernels.py --benchmark-compare --benchmark-compare-fail=median:10%

Under pytest-benchmark, to compare two commits on one machine: a round is CALLS calls on as many input sets, launches
included. `python -m benchmarks.kernels` times the same cases without launches, and makes the table. Losses are timed
with their gradients. On a CPU, ours is the reference behind the operation. `moved` is the least that must move: each
input once, each output once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import plain
from benchmarks.clock import wait
from fastafd.kernels import afd_loss, attack_head, augment, kl_loss, linf_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # activations and features; parameters are fp32
BATCH, CALLS = 128, 16 if DEVICE == "cuda" else 2
# width of the features, side of the last activation, classes
SIZES = {"ResNet-18": (512, 4, 10), "WRN-34-10": (640, 8, 10), "WRN-34-10, 200 classes": (640, 8, 200)}
WEIGHTS = {"alpha": 0.05, "beta": 0.25, "gamma": 25.0}


@dataclass
class Case:
    """One operation at one size: `draw` makes new inputs; plain PyTorch; our operation; the bytes that a call moves."""

    draw: Callable[[], tuple[Any, ...]]
    plain: Callable[..., Any]
    ours: Callable[..., Any]
    moved: int


def normal(*shape: int, dtype: torch.dtype = LOW) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def labels(classes: int) -> Tensor:
    return torch.randint(0, classes, (BATCH,), device=DEVICE)


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def afd_case(size: str) -> Case:
    width, _, classes = SIZES[size]

    def draw() -> tuple[Any, ...]:
        parameters = [normal(width, width, dtype=torch.float32) / width**0.5 for _ in range(2)]
        parameters += [normal(classes, width, dtype=torch.float32) / width**0.5, normal(classes, dtype=torch.float32)]
        leaves = [v.requires_grad_() for v in (normal(BATCH, width).relu(), *parameters)]
        return leaves, normal(BATCH, width).relu(), labels(classes)

    def written_out(leaves: list[Tensor], t: Tensor, y: Tensor) -> Any:
        g, *rest = leaves
        d1, d2, w, b = (v.to(g.dtype) for v in rest)
        total, z1, wrong = plain.afd_loss(g, t, y, d1, d2, w, b, **WEIGHTS)
        return total.detach(), z1.detach(), wrong, torch.autograd.grad(total, leaves)

    def ours(leaves: list[Tensor], t: Tensor, y: Tensor) -> Any:
        g, d1, d2, w, b = leaves
        out = afd_loss(g, t, y, d1, d2, w, b, **WEIGHTS)
        return out.total.detach(), out.logits, out.wrong_labels, torch.autograd.grad(out.total, leaves)

    leaves, t, y = draw()
    logits = 4 * BATCH * classes
    return Case(draw, written_out, ours, 2 * nbytes(*leaves) + nbytes(t, y) + logits + 8 * BATCH)


def head_case(size: str) -> Case:
    width, side, classes = SIZES[size]

    def draw() -> tuple[Any, ...]:
        a = normal(BATCH, width, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
        weight = normal(classes, width, dtype=torch.float32) / width**0.5
        return a, labels(classes), weight, normal(classes, dtype=torch.float32)

    def written_out(a: Tensor, y: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = F.linear(a.relu().mean((2, 3)), w.to(a.dtype), b.to(a.dtype)).float()
        return torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), a)[0]

    a, y, w, b = draw()
    return Case(draw, written_out, attack_head, 2 * nbytes(a) + nbytes(y, w, b))


def kl_case(size: str) -> Case:
    classes = SIZES[size][2]

    def draw() -> tuple[Any, ...]:
        return tuple(normal(BATCH, classes).requires_grad_() for _ in range(2))

    def written_out(z: Tensor, natural: Tensor) -> Any:
        loss = F.kl_div(z.float().log_softmax(1), natural.float().softmax(1), reduction="batchmean")
        return loss.detach(), torch.autograd.grad(loss, (z, natural))

    def ours(z: Tensor, natural: Tensor) -> Any:
        loss = kl_loss(z, natural)
        return loss.detach(), torch.autograd.grad(loss, (z, natural))

    return Case(draw, written_out, ours, 2 * nbytes(*draw()))


def images() -> Tensor:
    return torch.rand(BATCH, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)


def step_case() -> Case:
    def draw() -> tuple[Any, ...]:
        return images(), normal(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last), images()

    def written_out(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
        return x_adv.copy_(plain.linf_step(x_adv, grad, x, 8 / 255, 2 / 255))

    def ours(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
        return linf_step(x_adv, grad, x, 8 / 255, 2 / 255)

    x_adv, grad, x = draw()
    return Case(draw, written_out, ours, nbytes(x_adv, x_adv, grad, x))


def augment_case() -> Case:
    def draw() -> tuple[Any, ...]:
        x = torch.randint(0, 256, (BATCH, 32, 32, 3), dtype=torch.uint8, device=DEVICE)
        return x, torch.randint(0, 9, (BATCH, 2), device=DEVICE), torch.rand(BATCH, device=DEVICE) < 0.5

    drawn = draw()
    return Case(
        draw,
        lambda x, offsets, flips: plain.augment(x, offsets, flips, 4),
        lambda *v: augment(*v, 4),
        nbytes(*drawn) + 4 * drawn[0].numel(),
    )


SIZED = {"afd_loss": afd_case, "attack_head": head_case, "kl_loss": kl_case}
CASES: dict[tuple[str, str], Callable[[], Case]] = {
    **{(name, size): partial(make, size) for name, make in SIZED.items() for size in SIZES},
    ("linf_step", "32x32 images"): step_case,
    ("augment", "32x32 images"): augment_case,
}
FORMS = ("eager", "compiled", "ours")


def form_of(case: Case, form: str) -> Callable[..., Any]:
    """The function of a case in the form "eager", "compiled" or "ours"."""
    if form == "compiled":
        torch._dynamo.reset()
        return torch.compile(case.plain, fullgraph=True)
    return case.ours if form == "ours" else case.plain


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name, size", CASES)
def test_operation(name: str, size: str, form: str, benchmark: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = CASES[name, size]()
    call, inputs = form_of(case, form), [case.draw() for _ in range(CALLS)]

    def round_of_calls() -> None:
        for drawn in inputs:
            call(*drawn)
        wait(torch.device(DEVICE))

    benchmark.extra_info |= {"calls": len(inputs), "bytes": case.moved}
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        benchmark.pedantic(round_of_calls, rounds=100, iterations=1, warmup_rounds=3)
