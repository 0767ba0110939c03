"""Convolution, bias, residual and ReLU as one operation: one call of cuDNN on CUDA, the reference elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastafd.kernels.operation import operation


def conv_relu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """relu(conv2d(x, weight, bias) + residual), channels_last; x (B,C,H,W), weight (D,C,k,l), bias (D,), all one type.

    The operation has no derivative; `fastafd.attacks.arms.Joined` defines it.
    """
    out = F.conv2d(x, weight, bias, stride, padding)
    out = (out if residual is None else out + residual).relu()
    return out.contiguous(memory_format=torch.channels_last)


def conv_relu_by_cudnn(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """`conv_relu_reference`, computed by one call of cuDNN."""
    if residual is None:
        out = torch.ops.aten.cudnn_convolution_relu(x, weight, bias, stride, padding, [1, 1], 1)
    else:
        out = torch.ops.aten.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride, padding, [1, 1], 1)
    return out.contiguous(memory_format=torch.channels_last)


conv_relu = operation("conv_relu", conv_relu_reference, conv_relu_by_cudnn)


@conv_relu.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    rows, columns = out_size(x.shape[2:], weight.shape[2:], stride, padding)
    shape = x.shape[0], weight.shape[0], rows, columns
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def out_size(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> list[int]:
    """Rows and columns of a convolution's output."""
    return [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding, strict=True)]
