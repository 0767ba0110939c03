"""What PGD needs of a classifier's tail: the gradient of the cross-entropy before the last ReLU, and no loss value.

    p = mean over pixels of relu(a)   z = p W^T + b   dz = softmax(z) - 1_y   da = [a > 0] (dz W) / (H W)

The cross-entropy is summed over the batch, since only the signs of the image's gradient count. `a` may be the last
ReLU's input or its output: the result is the gradient before it either way. For models whose tail is another, the
plain form takes pooled features: dp = dz W. fp32 inside for fp32, fp16 and bf16 operands (float64 stays float64).

One launch, a program an image, if W and b are fp32, as a merged classifier is, and `a` is channels_last; in fp16 a
gradient below 6e-8 becomes 0. Least bytes: `a` read once and the gradient written once, and W twice an image from the
L2 cache; 2.1 MB each way for ResNet-18 (B=128, bf16, 4x4x512), 10.5 MB for WRN-34-10 (8x8x640).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastafd.kernels.lazy import TYPES, aligned, jit, operation, outside_autocast, packed, power_of_two

if TYPE_CHECKING:
    import triton.language as tl


def attack_head(activation: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The gradient of the summed cross-entropy with respect to the input of the last ReLU, or to pooled features.

    activation (B,D,H,W), the input or output of the last ReLU before global average pooling, or pooled features (B,D);
    labels (B,) int64 in 0..C-1; weight (C,D) and bias (C,) or None of the classifier, merged: W W_D1. Returns a
    tensor of the activation's shape and type, channels_last; nothing flows through it.
    Raises ValueError for shapes or types that do not fit. Source: the AFD paper, Eq. 2.
    """
    if activation.ndim not in (2, 4) or weight.ndim != 2:
        shapes = f"{tuple(activation.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"activation is (B,D,H,W) or (B,D) and weight (C,D), not {shapes}")
    (batch, width), classes = activation.shape[:2], weight.shape[0]
    for name, operand, shape in (
        ("labels", labels, (batch,)),
        ("weight", weight, (classes, width)),
        ("bias", bias, (classes,)),
    ):
        if operand is not None and tuple(operand.shape) != shape:
            raise ValueError(f"{name} is {tuple(operand.shape)}, takes {shape} for {tuple(activation.shape)}")
    if activation.dtype not in (*TYPES, torch.float64) or labels.dtype != torch.int64:
        raise ValueError(f"activation and labels are {activation.dtype} and {labels.dtype}, take floats and int64")
    activation = activation.detach()
    wide = torch.promote_types(activation.dtype, torch.float32)
    bias = None if bias is None else bias.detach().to(wide)
    return _attack_head(activation, labels, weight.detach().to(wide), bias)


@outside_autocast
def attack_head_reference(a: Tensor, y: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """`attack_head` in plain PyTorch."""
    w, b = w.to(a.dtype), None if b is None else b.to(a.dtype)
    pooled = a.relu().mean((2, 3)) if a.ndim == 4 else a
    z = F.linear(pooled, w, b).to(torch.promote_types(a.dtype, torch.float32))
    slope = (z.softmax(1) - F.one_hot(y, len(w))).to(a.dtype) @ w
    if a.ndim == 2:
        return slope
    slope = slope[:, :, None, None] / (a.shape[2] * a.shape[3])
    return torch.where(a > 0, slope, 0.0).contiguous(memory_format=torch.channels_last)


@jit("has_bias", "relu", "HW", "C")
def _head(
    a, y, w, b, out, has_bias, relu, HW, C, D, BP: tl.constexpr, CP: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    # a, out (B,HW,D), of pooled features with HW = 1 and relu = 0; y int64 (B); w (C,D) and b (C), read if
    # has_bias, fp32
    image = tl.program_id(0).to(tl.int64)
    a += image * HW * D
    out += image * HW * D
    c = tl.arange(0, CP)
    z = tl.where(c < C, tl.load(b + c, mask=(c < C) & (has_bias != 0), other=0.0), -float("inf"))
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        pooled = tl.zeros((BD,), tl.float32)
        for first in range(0, HW, BP):
            p = first + tl.arange(0, BP)
            inside = (p < HW)[:, None] & (d < D)[None, :]
            pixels = tl.load(a + p[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
            pooled += tl.sum(tl.where((pixels > 0) | (relu == 0), pixels, 0.0), axis=0)
        pooled /= HW
        wk = tl.load(w + c[:, None] * D + d[None, :], mask=(c < C)[:, None] & (d < D)[None, :], other=0.0)
        z += tl.sum(wk * pooled[None, :], axis=1)

    hit = c == tl.load(y + image).to(tl.int32)
    e = tl.exp(z - tl.max(z, axis=0))
    others = tl.sum(tl.where(hit, 0.0, e), axis=0)  # 1 - softmax_y without the cancellation
    dz = tl.where(hit, -others, e) / (tl.sum(e, axis=0) * HW)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        wk = tl.load(w + c[:, None] * D + d[None, :], mask=(c < C)[:, None] & (d < D)[None, :], other=0.0)
        slope = tl.sum(wk * dz[:, None], axis=0)
        for first in range(0, HW, BP):
            p = first + tl.arange(0, BP)
            inside = (p < HW)[:, None] & (d < D)[None, :]
            at = p[:, None] * D + d[None, :]
            passes = (tl.load(a + at, mask=inside, other=0.0) > 0) | (relu == 0)
            tl.store(out + at, tl.where(passes, slope[None, :], 0.0).to(out.dtype.element_ty), mask=inside)


def _layout(a: Tensor) -> torch.memory_format:
    return torch.channels_last if a.ndim == 4 else torch.contiguous_format


def tile_of(classes: int, width: int) -> dict[str, int]:
    """Pixels, padded classes and features that a program holds at a time."""
    if classes <= 16 and width % 16 == 0:
        return {"BP": 16, "CP": 16, "BD": 64, "num_warps": 8}
    if classes <= 256:
        return {"BP": 16, "CP": 256, "BD": 16, "num_warps": 8}
    return {"BP": 16, "CP": power_of_two(classes, 1024), "BD": 8, "num_warps": 16}


def attack_head_fused(a: Tensor, y: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """`attack_head` by the kernel."""
    a = aligned(a.contiguous(memory_format=_layout(a)))
    out, y, w = torch.empty_like(a), packed(y), packed(w)
    b, has_bias = (w, 0) if b is None else (packed(b), 1)
    (batch, width), classes = a.shape[:2], len(w)
    sizes = (has_bias, int(a.ndim == 4), a.shape[2:].numel(), classes, width)
    with torch.cuda.device_of(a):
        _head[(batch,)](a, y, w, b, out, *sizes, **tile_of(classes, width))
    return out


_attack_head = operation("attack_head", attack_head_reference, attack_head_fused)


@_attack_head.register_fake
def _(a: Tensor, y: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return torch.empty_like(a, memory_format=_layout(a))
