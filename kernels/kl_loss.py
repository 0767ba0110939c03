"""TRADES' divergence between two sets of logits, with both gradients.

    p = softmax(z_natural)   q = softmax(z_adversarial)   KL_b = sum_c p (log p - log q)   loss = mean_b KL_b
    dloss/dz_adversarial = (q - p) / B       dloss/dz_natural = p (h - sum_c p h) / B,  h = z_natural - z_adversarial

h may be shifted by a constant; taken as 0 at the likeliest class, confident rows lose no digits. fp32 inside for fp32,
fp16 and bf16 logits (float64 stays float64). Bytes: both sets read once for the value; read once and both gradients
written once in the backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastafd.kernels.lazy import (
    TYPES,
    aligned,
    cdiv,
    differentiable_once,
    jit,
    operation,
    outside_autocast,
    packed,
    power_of_two,
)

if TYPE_CHECKING:
    import triton.language as tl

TILE = 1024  # logits a program and set, at least a row


def kl_loss(adversarial_logits: Tensor, natural_logits: Tensor) -> Tensor:
    """KL(softmax(natural) || softmax(adversarial)), the mean over the batch: (B,C), (B,C) -> scalar.

    Differentiable once in both; raises RuntimeError for a second derivative and ValueError for shapes or types that do
    not fit. Source: Zhang et al., arXiv 1901.08573, Eq. 5 with the KL of its released code.
    """
    if adversarial_logits.ndim != 2 or adversarial_logits.shape != natural_logits.shape:
        shapes = f"{tuple(adversarial_logits.shape)} and {tuple(natural_logits.shape)}"
        raise ValueError(f"the logits are {shapes}, take one shape (B,C)")
    if adversarial_logits.dtype != natural_logits.dtype or natural_logits.dtype not in (*TYPES, torch.float64):
        types = f"{adversarial_logits.dtype} and {natural_logits.dtype}"
        raise ValueError(f"the logits are {types}, take one floating-point type")
    return _kl_rows(adversarial_logits, natural_logits).mean()


@outside_autocast
def kl_rows_reference(adversarial: Tensor, natural: Tensor) -> Tensor:
    """KL of each row: (B,C), (B,C) -> (B,)."""
    wide = torch.promote_types(natural.dtype, torch.float32)
    log_p, log_q = natural.to(wide).log_softmax(1), adversarial.to(wide).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


@outside_autocast
def kl_gradients_reference(grad: Tensor, adversarial: Tensor, natural: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of both sets of logits, (B,C) each, from those of the rows, (B,)."""
    p, q = natural.to(grad.dtype).softmax(1), adversarial.to(grad.dtype).softmax(1)
    gap = natural.to(grad.dtype) - adversarial.to(grad.dtype)
    gap = gap - gap.gather(1, natural.argmax(1, keepdim=True))
    of_natural = grad[:, None] * p * (gap - (p * gap).sum(1, keepdim=True))
    return (grad[:, None] * (q - p)).to(adversarial.dtype), of_natural.to(natural.dtype)


@jit("B", "C")
def _rows(adversarial, natural, rows, B, C, BM: tl.constexpr, CP: tl.constexpr):
    # adversarial, natural (B,C); rows fp32 (B)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, CP)
    inside = (row < B)[:, None] & (c < C)[None, :]
    at = row[:, None].to(tl.int64) * C + c[None, :]
    beyond = tl.where(c < C, 0.0, -float("inf"))[None, :]
    z_p = tl.load(natural + at, mask=inside, other=0.0).to(tl.float32)
    z_q = tl.load(adversarial + at, mask=inside, other=0.0).to(tl.float32)
    z_p -= tl.max(z_p + beyond, axis=1)[:, None]
    z_q -= tl.max(z_q + beyond, axis=1)[:, None]
    p = tl.exp(z_p + beyond)
    total_p, total_q = tl.sum(p, axis=1), tl.sum(tl.exp(z_q + beyond), axis=1)
    gap = (z_p - tl.log(total_p)[:, None]) - (z_q - tl.log(total_q)[:, None])  # log p - log q
    tl.store(rows + row, tl.sum(p * gap, axis=1) / total_p, mask=row < B)


@jit("step", "B", "C")
def _gradients(grad, step, adversarial, natural, d_adversarial, d_natural, B, C, BM: tl.constexpr, CP: tl.constexpr):
    # grad: B values, `step` apart (0: one for all); adversarial, natural and their gradients (B,C)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, CP)
    inside = (row < B)[:, None] & (c < C)[None, :]
    at = row[:, None].to(tl.int64) * C + c[None, :]
    scale = tl.load(grad + row * step, mask=row < B, other=0.0)[:, None]
    beyond = tl.where(c < C, 0.0, -float("inf"))[None, :]
    z_p = tl.load(natural + at, mask=inside, other=0.0).to(tl.float32)
    z_q = tl.load(adversarial + at, mask=inside, other=0.0).to(tl.float32)
    gap = z_p - z_q
    z_p += beyond
    z_q += beyond
    likeliest = c[None, :] == tl.argmax(z_p, axis=1)[:, None]
    gap -= tl.sum(tl.where(likeliest, gap, 0.0), axis=1)[:, None]
    p, q = tl.exp(z_p - tl.max(z_p, axis=1)[:, None]), tl.exp(z_q - tl.max(z_q, axis=1)[:, None])
    p /= tl.sum(p, axis=1)[:, None]
    q /= tl.sum(q, axis=1)[:, None]
    of_natural = scale * p * (gap - tl.sum(p * gap, axis=1)[:, None])
    tl.store(d_adversarial + at, (scale * (q - p)).to(d_adversarial.dtype.element_ty), mask=inside)
    tl.store(d_natural + at, of_natural.to(d_natural.dtype.element_ty), mask=inside)


def _tile(classes: int) -> tuple[int, int]:
    """Rows and padded classes of a program."""
    padded = power_of_two(classes, 1024)
    return max(1, TILE // padded), padded


def kl_rows_fused(adversarial: Tensor, natural: Tensor) -> Tensor:
    """`kl_rows_reference` by the kernel."""
    (batch, classes), adversarial, natural = natural.shape, packed(adversarial), packed(natural)
    rows = torch.empty(batch, device=natural.device)
    bm, padded = _tile(classes)
    with torch.cuda.device_of(natural):
        _rows[(cdiv(batch, bm),)](adversarial, natural, rows, batch, classes, BM=bm, CP=padded)
    return rows


def kl_gradients_fused(grad: Tensor, adversarial: Tensor, natural: Tensor) -> tuple[Tensor, Tensor]:
    """`kl_gradients_reference` by the kernel."""
    (batch, classes), adversarial, natural = natural.shape, packed(adversarial), packed(natural)
    found = torch.empty_like(adversarial), torch.empty_like(natural)
    bm, padded = _tile(classes)
    with torch.cuda.device_of(natural):
        grad = aligned(grad)
        operands = (grad, grad.stride(0), adversarial, natural, *found, batch, classes)
        _gradients[(cdiv(batch, bm),)](*operands, BM=bm, CP=padded)
    return found


_kl_rows = operation("kl_rows", kl_rows_reference, kl_rows_fused)


@_kl_rows.register_fake
def _(adversarial: Tensor, natural: Tensor) -> Tensor:
    return natural.new_empty(len(natural), dtype=torch.promote_types(natural.dtype, torch.float32))


_kl_gradients = operation("kl_gradients", kl_gradients_reference, kl_gradients_fused)


@_kl_gradients.register_fake
def _(grad: Tensor, adversarial: Tensor, natural: Tensor) -> tuple[Tensor, Tensor]:
    return adversarial.new_empty(adversarial.shape), natural.new_empty(natural.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _kl_gradients(grad, *ctx.saved_tensors)


_kl_rows.register_autograd(_backward, setup_context=_save)
differentiable_once(_kl_gradients, "kl_loss")
