"""The divergence of TRADES between two sets of logits, with the gradients of both.

    p = softmax(z_natural)   q = softmax(z_adversarial)   KL_b = sum_c p (log p - log q)   loss = mean_b KL_b
    dloss/dz_adversarial = (q - p) / B       dloss/dz_natural = p (h - sum_c p h) / B,  h = z_natural - z_adversarial

A constant may be added to h. Here h is 0 at the most likely class, so that confident rows lose no digits. Inside, fp32,
fp16 and bf16 logits are computed in fp32 (float64 stays float64). Bytes: the value reads both sets once; the backward
pass reads them once and writes both gradients once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastafd.kernels.operation import (
    TYPES,
    aligned,
    cdiv,
    differentiable_once,
    operation,
    outside_autocast,
    packed,
    power_of_two,
)

TILE = 1024  # logits of each set that a program takes, at least one row


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
    """The gradients of both sets of logits, (B,C) each, from the gradients (B,) of the rows."""
    p, q = natural.to(grad.dtype).softmax(1), adversarial.to(grad.dtype).softmax(1)
    gap = natural.to(grad.dtype) - adversarial.to(grad.dtype)
    gap = gap - gap.gather(1, natural.argmax(1, keepdim=True))
    of_natural = grad[:, None] * p * (gap - (p * gap).sum(1, keepdim=True))
    return (grad[:, None] * (q - p)).to(adversarial.dtype), of_natural.to(natural.dtype)


def _tile(classes: int) -> tuple[int, int]:
    """How many rows and padded classes a program takes."""
    padded = power_of_two(classes, 1024)
    return max(1, TILE // padded), padded


def kl_rows_fused(adversarial: Tensor, natural: Tensor) -> Tensor:
    """`kl_rows_reference`, computed by the kernel."""
    from fastafd.kernels.triton_code.kl_loss import _rows

    (batch, classes), adversarial, natural = natural.shape, packed(adversarial), packed(natural)
    rows = torch.empty(batch, device=natural.device)
    bm, padded = _tile(classes)
    with torch.cuda.device_of(natural):
        _rows[(cdiv(batch, bm),)](adversarial, natural, rows, batch, classes, BM=bm, CP=padded)
    return rows


def kl_gradients_fused(grad: Tensor, adversarial: Tensor, natural: Tensor) -> tuple[Tensor, Tensor]:
    """`kl_gradients_reference`, computed by the kernel."""
    from fastafd.kernels.triton_code.kl_loss import _gradients

    (batch, classes), adversarial, natural = natural.shape, packed(adversarial), packed(natural)
    gradients = torch.empty_like(adversarial), torch.empty_like(natural)
    bm, padded = _tile(classes)
    with torch.cuda.device_of(natural):
        grad = aligned(grad)
        operands = (grad, grad.stride(0), adversarial, natural, *gradients, batch, classes)
        _gradients[(cdiv(batch, bm),)](*operands, BM=bm, CP=padded)
    return gradients


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
