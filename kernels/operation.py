"""What the operations of `fastafd.kernels` have in common: which of two functions runs, and small helpers.

Importing `fastafd` imports no Triton and creates no CUDA context: a launcher imports its kernels at its first launch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.library import CustomOpDef

P = ParamSpec("P")
T = TypeVar("T")
HAS_TRITON = importlib.util.find_spec("triton") is not None
TYPES = (torch.float32, torch.float16, torch.bfloat16)  # types that the kernels take; float64 runs the references


@dataclass(eq=False)
class Operation:
    """An operation: `reference` is plain PyTorch, `fused` launches the kernels that compute the same on CUDA."""

    reference: Callable[..., Any]
    fused: Callable[..., Any]

    def __call__(self, *operands: Any) -> Any:
        return (self.fused if self.is_fused(operands) else self.reference)(*operands)

    def is_fused(self, operands: tuple[Any, ...]) -> bool:
        """True if the kernels run for these operands. On a CPU, in float64 and without Triton the reference runs."""
        tensors = [operand for operand in operands if isinstance(operand, Tensor)]
        wide = any(tensor.dtype == torch.float64 for tensor in tensors)
        return HAS_TRITON and tensors[0].is_cuda and not wide and not _references_wanted


OPERATIONS: dict[str, Operation] = {}
_references_wanted = 0  # number of `references()` blocks that are open, in all threads


def operation(
    name: str, reference: Callable[..., Any], fused: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> CustomOpDef:
    """Register the custom operation `fastafd::name` with the signature of `reference`.

    mutates: the names of the arguments that it writes into.
    """
    OPERATIONS[name] = Operation(reference, fused)
    return torch.library.custom_op(
        f"fastafd::{name}",
        OPERATIONS[name],
        mutates_args=mutates,
        device_types=("cpu", "cuda"),
        schema=torch.library.infer_schema(reference, mutates_args=mutates),
    )


@contextmanager
def references() -> Iterator[None]:
    """Inside this block every operation runs its reference, on CUDA too.

    The block counts for all threads of the process, because autograd runs a backward pass on CUDA in another thread.
    """
    global _references_wanted
    _references_wanted += 1
    try:
        yield
    finally:
        _references_wanted -= 1


def outside_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """The function with autocast switched off, so that it computes in its operands' types."""

    @wraps(function)
    def run(*operands: P.args, **options: P.kwargs) -> T:
        assert isinstance(operands[0], Tensor)
        with torch.autocast(operands[0].device.type, enabled=False):
            return function(*operands, **options)

    return run


def differentiable_once(op: CustomOpDef, of: str) -> None:
    """Make it an error to differentiate `op`, which is the gradient of `of`."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{of} has no second derivative: its gradient was differentiated (create_graph=True)")

    op.register_autograd(backward)


def aligned(x: Tensor) -> Tensor:
    """The tensor, or a copy of it if its address is not a multiple of 16 bytes, as that of every allocation is."""
    return x.clone() if x.data_ptr() % 16 else x


def packed(x: Tensor) -> Tensor:
    """The tensor, or a copy of it: contiguous, at an address that is a multiple of 16 bytes."""
    return aligned(x.contiguous())


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and at least `least`."""
    return max(least, 1 << (n - 1).bit_length())
