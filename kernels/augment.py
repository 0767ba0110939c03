"""Zero-padded crop, horizontal flip and scaling to [0,1] in one gather.

    out[b, :, i, j] = x[b, i + row_b - padding, (W-1-j if flip_b else j) + column_b - padding, :] / 255,  0 outside

Bytes: for each pixel and channel, 1 is read and 4 are written. The division rounds correctly, so that every loader and
device gives the same pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastafd.kernels.operation import cdiv, operation, packed

BLOCK = 1024  # output values a program


def augment(x: Tensor, offsets: Tensor, flips: Tensor, padding: int) -> Tensor:
    """Pad with zeros, crop at `offsets`, then mirror the images whose `flips` is True.

    x uint8 (B,H,W,3); offsets int64 (B,2), row and column in 0..2*padding; flips bool (B,); all on one device.
    Returns float32 (B,3,H,W) in [0,1], channels_last. Raises ValueError for shapes or types that do not fit.
    """
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[3] != 3:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, takes uint8 (B,H,W,3)")
    if offsets.shape != (len(x), 2) or offsets.dtype != torch.int64:
        raise ValueError(f"offsets is {offsets.dtype} {tuple(offsets.shape)}, takes int64 {(len(x), 2)}")
    if flips.shape != (len(x),) or flips.dtype != torch.bool:
        raise ValueError(f"flips is {flips.dtype} {tuple(flips.shape)}, takes bool {(len(x),)}")
    return _augment(x, offsets, flips, padding)


def augment_reference(x: Tensor, offsets: Tensor, flips: Tensor, padding: int) -> Tensor:
    """`augment` in plain PyTorch."""
    batch, height, width, _ = x.shape
    padded = torch.nn.functional.pad(x, (0, 0, padding, padding, padding, padding))
    column = torch.arange(width, device=x.device)
    rows = offsets[:, :1] + torch.arange(height, device=x.device)  # (B,H)
    columns = offsets[:, 1:] + torch.where(
        flips[:, None], width - 1 - column, column
    )  # (B,W), a mirrored image reads its crop from right to left
    images = torch.arange(batch, device=x.device)
    cropped = padded[images[:, None, None], rows[:, :, None], columns[:, None, :]]
    pixels = cropped.permute(0, 3, 1, 2).to(torch.float32)  # the permuted view is channels_last
    return pixels.div_(torch.full((), 255.0, device=x.device))  # with a Python number, CUDA would multiply by 1/255


def augment_fused(x: Tensor, offsets: Tensor, flips: Tensor, padding: int) -> Tensor:
    """`augment`, computed by the kernel."""
    from fastafd.kernels.triton_code.augment import _crop_flip

    x, offsets, flips = packed(x), packed(offsets), packed(flips)
    batch, height, width, _ = x.shape
    out = torch.empty(batch, height, width, 3, device=x.device)
    with torch.cuda.device_of(x):
        grid = (batch, cdiv(height * width * 3, BLOCK))
        _crop_flip[grid](x, offsets, flips, out, height, width, padding, BLOCK=BLOCK)
    return out.permute(0, 3, 1, 2)


_augment = operation("augment", augment_reference, augment_fused)


@_augment.register_fake
def _(x: Tensor, offsets: Tensor, flips: Tensor, padding: int) -> Tensor:
    batch, height, width, channels = x.shape
    return x.new_empty((batch, height, width, channels), dtype=torch.float32).permute(0, 3, 1, 2)
