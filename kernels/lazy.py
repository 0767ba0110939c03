"""Triton, imported at the first launch: importing `fastafd` costs neither its import nor a CUDA context."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.library import CustomOpDef

P = ParamSpec("P")
T = TypeVar("T")
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


def register_cuda(op: CustomOpDef, reference: Callable[..., Any], fused: Callable[..., Any]) -> None:
    """Run `op` on CUDA by its kernels; by its reference for float64 and where there is no Triton."""
    triton = importlib.util.find_spec("triton") is not None

    def run(*operands: Any) -> Any:
        wide = any(isinstance(operand, Tensor) and operand.dtype == torch.float64 for operand in operands)
        return (reference if wide or not triton else fused)(*operands)

    op.register_kernel("cuda")(run)


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
