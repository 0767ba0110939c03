"""One step of PGD in the l-infinity threat model, in place.

    x_adv <- clamp(clamp(x_adv + step_size * sign(grad), x - eps, x + eps), 0, 1)

Pixels in [0,1], computed in fp32 (float64 stays float64); any of fp32, fp16 and bf16 for them, and for grad. The
rounding of 16-bit pixels comes after the projection: by it they may leave the ball (bf16: by up to 2^-9).
Bytes: x_adv once read and once written, grad and x once read; 16 a pixel in fp32, 14 with a 16-bit gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastafd.kernels.lazy import TYPES, aligned, cdiv, jit, operation

if TYPE_CHECKING:
    import triton.language as tl

BLOCK = 1024  # pixels a program: 8 a thread, so that 16-bit operands move 16 bytes at once


def linf_step(x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, step_size: float) -> Tensor:
    """Step `x_adv` along sign(grad), back into the eps-ball around x and into [0,1], in place; returns `x_adv`.

    x_adv, grad, x: (B,3,H,W) of any strides; eps and step_size in pixels of [0,1]. A NaN gradient takes
    no step. Raises ValueError for shapes or types that do not fit. Source: the AFD paper, Eq. 2; Madry et al.,
    arXiv 1706.06083.
    """
    if not x_adv.shape == grad.shape == x.shape:
        raise ValueError(f"x_adv, grad and x are {tuple(x_adv.shape)}, {tuple(grad.shape)} and {tuple(x.shape)}")
    for name, operand in (("x_adv", x_adv), ("grad", grad), ("x", x)):
        if operand.dtype not in (*TYPES, torch.float64):
            raise ValueError(f"{name} is {operand.dtype}, takes a floating-point type")
    if x.dtype != x_adv.dtype:
        raise ValueError(f"x_adv and x are {x_adv.dtype} and {x.dtype}, take one type")
    _linf_step(x_adv, grad, x, eps, step_size)
    return x_adv


def linf_step_reference(x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, step_size: float) -> None:
    """`linf_step` in plain PyTorch."""
    wide = torch.promote_types(x_adv.dtype, torch.float32)
    stepped = x_adv.to(wide) + step_size * grad.to(wide).sign()
    image = x.to(wide)
    x_adv.copy_(stepped.clamp(image - eps, image + eps).clamp(0.0, 1.0))


@jit()
def _step(x_adv, grad, x, eps, step_size, n, BLOCK: tl.constexpr):
    # x_adv, grad, x: n elements each, in one order
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    slope = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    image = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    stepped = tl.load(x_adv + at, mask=inside, other=0.0).to(tl.float32)
    stepped += step_size * ((slope > 0).to(tl.float32) - (slope < 0).to(tl.float32))
    nan: tl.constexpr = tl.PropagateNan.ALL  # a pixel that is NaN stays so, as in the reference
    stepped = tl.maximum(stepped, image - eps, propagate_nan=nan)
    stepped = tl.minimum(stepped, image + eps, propagate_nan=nan)
    stepped = tl.minimum(tl.maximum(stepped, 0.0, propagate_nan=nan), 1.0, propagate_nan=nan)
    tl.store(x_adv + at, stepped.to(x_adv.dtype.element_ty), mask=inside)


def linf_step_fused(x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, step_size: float) -> None:
    """`linf_step` by the kernel."""
    gaps = torch.empty_like(x_adv, device="meta").stride() != x_adv.stride()  # or overlaps
    if gaps or x_adv.data_ptr() % 16:
        return linf_step_reference(x_adv, grad, x, eps, step_size)
    grad, x = (_in_order_of(x_adv, operand) for operand in (grad, x))
    with torch.cuda.device_of(x_adv):
        _step[(cdiv(x_adv.numel(), BLOCK),)](x_adv, grad, x, eps, step_size, x_adv.numel(), BLOCK=BLOCK)


def _in_order_of(x_adv: Tensor, operand: Tensor) -> Tensor:
    if operand.stride() == x_adv.stride():
        return aligned(operand)
    return torch.empty_like(x_adv, dtype=operand.dtype).copy_(operand)


_linf_step = operation("linf_step", linf_step_reference, linf_step_fused, mutates=("x_adv",))


@_linf_step.register_fake
def _(x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, step_size: float) -> None:
    return None
