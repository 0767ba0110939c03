"""Triton, imported at the first launch: importing `fastafd` costs neither its import nor a CUDA context."""

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
TYPES = (torch.float32, torch.float16, torch.bfloat16)  # what the kernels take; float64 runs the references


def jit(*varying: str) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit` for a kernel, or for a function that kernels of the same file call; applied at the first launch.

    One compilation serves every value of the integers named in `varying`; of the others, and of addresses, Triton
    compiles variants: 1, divisible by 16, any. Give kernels `aligned` tensors, and an address is always the second.
    """
    return lambda function: Kernel(function, varying)


class Kernel:
    """A function that will be a `triton.JITFunction`."""

    def __init__(self, function: Callable[..., Any], varying: tuple[str, ...]) -> None:
        self.function, self.varying = function, varying

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return self.jitted()[grid]

    def jitted(self) -> Any:
        """The `triton.JITFunction`; from the first call on the names in the kernel's file stand for it as well."""
        import triton
        import triton.language

        scope = self.function.__globals__
        scope["tl"] = triton.language
        for name, value in list(scope.items()):
            if isinstance(value, Kernel) and value.function.__globals__ is scope:
                scope[name] = triton.jit(value.function, do_not_specialize=list(value.varying))
        return scope[self.function.__name__]


@dataclass(eq=False)
class Operation:
    """An operation of `fastafd`: plain PyTorch, and the kernels that compute the same on CUDA."""

    reference: Callable[..., Any]
    fused: Callable[..., Any]

    def __call__(self, *operands: Any) -> Any:
        return (self.fused if self.is_fused(operands) else self.reference)(*operands)

    def is_fused(self, operands: tuple[Any, ...]) -> bool:
        """Whether the kernels compute these operands; the reference does on a CPU, in float64 and without Triton."""
        tensors = [operand for operand in operands if isinstance(operand, Tensor)]
        wide = any(tensor.dtype == torch.float64 for tensor in tensors)
        return HAS_TRITON and tensors[0].is_cuda and not wide and not _references_wanted


OPERATIONS: dict[str, Operation] = {}
_references_wanted = 0  # how many `references` are open, in any thread


def operation(
    name: str, reference: Callable[..., Any], fused: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> CustomOpDef:
    """`fastafd::name`, a custom operation with the signature of `reference`; `mutates` names what it writes into."""
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
    """Let every operation run its reference meanwhile, on CUDA too.

    It holds for all threads of the process, since a backward on CUDA runs in a thread of its own.
    """
    global _references_wanted
    _references_wanted += 1
    try:
        yield
    finally:
        _references_wanted -= 1


def outside_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """The function, computing in its operands' own types whatever autocast says around it."""

    @wraps(function)
    def run(*operands: P.args, **named: P.kwargs) -> T:
        assert isinstance(operands[0], Tensor)
        with torch.autocast(operands[0].device.type, enabled=False):
            return function(*operands, **named)

    return run


def differentiable_once(op: CustomOpDef, of: str) -> None:
    """Make a derivative through `op`, itself the gradient of `of`, an error."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{of} has no second derivative: its gradient was differentiated (create_graph=True)")

    op.register_autograd(backward)


def aligned(x: Tensor) -> Tensor:
    """The tensor, or a copy that starts at a multiple of 16 bytes, as every allocation does."""
    return x.clone() if x.data_ptr() % 16 else x


def packed(x: Tensor) -> Tensor:
    """The tensor, or a copy: contiguous and aligned."""
    return aligned(x.contiguous())


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and at least `least`."""
    return max(least, 1 << (n - 1).bit_length())
