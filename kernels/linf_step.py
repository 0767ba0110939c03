"""One step of PGD in the l-infinity threat model, in place.

    x_adv <- clamp(clamp(x_adv + step_size * sign(grad), x - eps, x + eps), 0, 1)

Pixels are in [0,1] and computed in fp32 (float64 stays float64); the pixels and the gradient may be fp32, fp16 or bf16.
16-bit pixels are rounded after the projection, so they may leave the ball (bf16: by up to 2^-9).
Bytes: x_adv is read once and written once, grad and x are read once: 16 a pixel in fp32, 14 with a 16-bit gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastafd.kernels.operation import TYPES, aligned, cdiv, operation

BLOCK = 1024  # pixels a program: 8 a thread, so that a thread moves 16 bytes of a 16-bit operand at once


def linf_step(x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, step_size: float) -> Tensor:
    """Move `x_adv` along sign(grad), then into the eps-ball around x and into [0,1], in place; returns `x_adv`.

    x_adv, grad, x: (B,3,H,W) of any strides. eps, step_size: in pixels of [0,1]. A NaN gradient makes no step. Raises
    ValueError for shapes or types that do not fit. Source: the AFD paper, Eq. 2; Madry et al., arXiv 1706.06083.
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


def linf_step_fused(x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, step_size: float) -> None:
    """`linf_step`, computed by the kernel."""
    from fastafd.kernels.triton_code.linf_step import _step

    gaps = torch.empty_like(x_adv, device="meta").stride() != x_adv.stride()  # True also for overlapping memory
    if gaps or x_adv.data_ptr() % 16:
        return linf_step_reference(x_adv, grad, x, eps, step_size)
    grad, x = (_in_order_of(x_adv, operand) for operand in (grad, x))
    with torch.cuda.device_of(x_adv):
        _step[(cdiv(x_adv.numel(), BLOCK),)](x_adv, grad, x, eps, step_size, x_adv.numel(), BLOCK=BLOCK)


def _in_order_of(x_adv: Tensor, operand: Tensor) -> Tensor:
    """The operand, or a copy of it, with the strides of x_adv and an aligned address."""
    if operand.stride() == x_adv.stride():
        return aligned(operand)
    return torch.empty_like(x_adv, dtype=operand.dtype).copy_(operand)


_linf_step = operation("linf_step", linf_step_reference, linf_step_fused, mutates=("x_adv",))


@_linf_step.register_fake
def _(x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, step_size: float) -> None:
    return None
