"""The gradient that PGD needs from the end of a classifier: that of the cross-entropy before the last ReLU.

    p = mean over pixels of relu(a)   z = p W^T + b   dz = softmax(z) - 1_y   da = [a > 0] (dz W) / (H W)

The cross-entropy is summed over the batch, because only the signs of the image's gradient count. No loss is computed.
`a` may be the input or the output of the last ReLU; the result is the gradient before the ReLU in both cases. For
models that end differently, the operation takes pooled features and returns dp = dz W. Inside, fp32, fp16 and bf16
operands are computed in fp32 (float64 stays float64).

It is one launch with one program an image, if W and b are fp32, as a merged classifier's are, and `a` is channels_last.
In fp16 a gradient below 6e-8 becomes 0. At least `a` is read once and the gradient written once, and each image reads W
twice from the L2 cache: 2.1 MB each way for ResNet-18 (B=128, bf16, 4x4x512), 10.5 MB for WRN-34-10 (8x8x640).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastafd.kernels.operation import TYPES, aligned, operation, outside_autocast, packed, power_of_two


def attack_head(activation: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The gradient of the summed cross-entropy with respect to the input of the last ReLU, or to the pooled features.

    activation: the input or output (B,D,H,W) of the last ReLU before global average pooling, or pooled features (B,D).
    labels (B,): int64 in 0..C-1. weight (C,D), bias (C,) or None: those of the merged classifier, W W_D1.
    Returns a tensor of the activation's shape and type, channels_last. No gradient flows through it.
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


def _layout(a: Tensor) -> torch.memory_format:
    return torch.channels_last if a.ndim == 4 else torch.contiguous_format


def tile_of(classes: int, width: int) -> dict[str, int]:
    """How many pixels, padded classes and features a program holds at a time."""
    if classes <= 16 and width % 16 == 0:
        return {"BP": 16, "CP": 16, "BD": 64, "num_warps": 8}
    if classes <= 256:
        return {"BP": 16, "CP": 256, "BD": 16, "num_warps": 8}
    return {"BP": 16, "CP": power_of_two(classes, 1024), "BD": 8, "num_warps": 16}


def attack_head_fused(a: Tensor, y: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """`attack_head`, computed by the kernel."""
    from fastafd.kernels.triton_code.attack_head import _head

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
