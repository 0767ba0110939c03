"""The products of `afd_loss`: the disentangler's projection, and the grouped gradients of its backward.

    f1 = g D1^T   f2 = g D2^T
    dg = df1 D1 / B   dD1 = df1^T g / B   dD2 = df2^T g / B   dW = (dz1^T f1 + k dz2^T f2) / B   db likewise

One launch each; operands in the features' type, sums in fp32, gradients in the parameters' own type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastafd.kernels.lazy import cdiv, differentiable_once, jit, operation, outside_autocast, packed

if TYPE_CHECKING:
    import triton.language as tl


@jit("has_bias", "B", "C")
def _project(
    g, d1, d2, w, b, has_bias, f, w_cast, b_cast, done, B, C, D, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    # g (B,D); d1, d2 (D,D); w (C,D); b (C), read if has_bias; out: f (2,B,D); w_cast (C,D) and b_cast (C), in f's type;
    # done int32 (1): 0, the count of the row kernel's finished programs
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(done, 0)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    f1 = tl.zeros((BM, BN), tl.float32)
    f2 = tl.zeros((BM, BN), tl.float32)
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(g + row[:, None] * D + k[None, :], mask=(row < B)[:, None] & (k < D)[None, :], other=0.0)
        at = column[None, :] * D + k[:, None]
        inside = (k < D)[:, None] & (column < D)[None, :]
        f1 = tl.dot(a, tl.load(d1 + at, mask=inside, other=0.0).to(a.dtype), f1, input_precision="ieee")
        f2 = tl.dot(a, tl.load(d2 + at, mask=inside, other=0.0).to(a.dtype), f2, input_precision="ieee")
    at = row[:, None] * D + column[None, :]
    inside = (row < B)[:, None] & (column < D)[None, :]
    tl.store(f + at, f1.to(f.dtype.element_ty), mask=inside)
    tl.store(f + B * D + at, f2.to(f.dtype.element_ty), mask=inside)
    for start in range(tl.program_id(0) * BM, C, tl.num_programs(0) * BM):
        c = start + tl.arange(0, BM)
        weight = c[:, None] * D + column[None, :]
        exists = (c < C)[:, None] & (column < D)[None, :]
        tl.store(w_cast + weight, tl.load(w + weight, mask=exists, other=0.0).to(f.dtype.element_ty), mask=exists)
        if tl.program_id(1) == 0:
            bias = tl.load(b + c, mask=(c < C) & (has_bias != 0), other=0.0)
            tl.store(b_cast + c, bias.to(f.dtype.element_ty), mask=c < C)


def project_tile(dtype: torch.dtype) -> dict[str, int]:
    """Rows, columns and terms of a product that a program of `_project` takes at a time."""
    narrow = {"BM": 32, "BN": 32, "num_stages": 2}
    return narrow | ({"BK": 16, "num_warps": 8} if dtype == torch.float32 else {"BK": 64, "num_warps": 4})


def gradients_tile(dtype: torch.dtype) -> dict[str, int]:
    """The same of `_gradients`."""
    return {"BM": 64, "BN": 64, "BK": 16 if dtype == torch.float32 else 64, "num_stages": 2, "num_warps": 8}


def project(g: Tensor, d1: Tensor, d2: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f1 and f2, (2,B,D); W and b in their type; and a count of 0, all in one launch."""
    (batch, width), classes = g.shape, len(w)
    f, w_cast, b_cast = g.new_empty(2, batch, width), g.new_empty(classes, width), g.new_empty(classes)
    done = torch.empty(1, dtype=torch.int32, device=g.device)
    tile = project_tile(g.dtype)
    grid = (cdiv(batch, tile["BM"]), cdiv(width, tile["BN"]))
    operands = (g, d1, d2, w, w if b is None else b, int(b is not None), f, w_cast, b_cast, done)
    with torch.cuda.device_of(g):
        _project[grid](*operands, batch, classes, width, **tile)
    return f, w_cast, b_cast, done


@outside_autocast
def afd_gradients_reference(
    grad: Tensor, g: Tensor, d1: Tensor, w: Tensor, f: Tensor, df: Tensor, dz: Tensor, classifier_alpha: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of features, D1, D2, W and b from those of the rows and of the total."""
    wide = torch.promote_types(g.dtype, torch.float32)
    scale = grad.to(wide) / len(g)
    dg = scale * (df[0] @ d1.to(g.dtype)).to(wide)
    dd1, dd2 = (scale * (rows.T @ g).to(wide) for rows in df)
    dw = scale * ((dz[0].T @ f[0]).to(wide) + classifier_alpha * (dz[1].T @ f[1]).to(wide))
    db = scale * (dz[0].to(wide) + classifier_alpha * dz[1].to(wide)).sum(0)
    return dg.to(g.dtype), dd1.to(d1.dtype), dd2.to(d1.dtype), dw.to(w.dtype), db.to(w.dtype)


@jit()
def _outer(a, b, m, n, K, M, N, BK: tl.constexpr):
    # a (K,M), b (K,N); m (BM), n (BN): -> a^T b at rows m and columns n
    acc = tl.zeros((m.shape[0], n.shape[0]), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        at = tl.load(a + k[None, :] * M + m[:, None], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        bt = tl.load(b + k[:, None] * N + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(at, bt, acc, input_precision="ieee")
    return acc


@jit("B", "C")
def _gradients(
    grad, g, d1, f, df, dz, dg, dd1, dd2, dw, db, classifier_alpha, B, C, D,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # grad fp32, one value; g (B,D), d1 (D,D), f (2,B,D), df (2,B,D), dz (2,B,C); out: dg (B,D), dd1 and dd2 (D,D),
    # dw (C,D), db (C). A program is one tile of one product; those of dg, which are the longest, come first.
    scale = tl.load(grad).to(tl.float32) / B
    across = tl.cdiv(D, BN)
    tile = tl.program_id(0) // across
    n = tl.program_id(0) % across * BN + tl.arange(0, BN)
    down, deep = tl.cdiv(B, BM), tl.cdiv(D, BM)
    if tile < down:
        m = tile * BM + tl.arange(0, BM)
        acc = tl.zeros((BM, BN), tl.float32)
        for start in range(0, D, BK):
            k = start + tl.arange(0, BK)
            a = tl.load(df + m[:, None] * D + k[None, :], mask=(m < B)[:, None] & (k < D)[None, :], other=0.0)
            b = tl.load(d1 + k[:, None] * D + n[None, :], mask=(k < D)[:, None] & (n < D)[None, :], other=0.0)
            acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")
        inside = (m < B)[:, None] & (n < D)[None, :]
        tl.store(dg + m[:, None] * D + n[None, :], (scale * acc).to(dg.dtype.element_ty), mask=inside)
    elif tile < down + 2 * deep:
        second = tile >= down + deep
        m = (tile - down - tl.where(second, deep, 0)) * BM + tl.arange(0, BM)
        acc = scale * _outer(df + tl.where(second, B * D, 0), g, m, n, B, D, D, BK)
        at = m[:, None] * D + n[None, :]
        inside = (m < D)[:, None] & (n < D)[None, :]
        if second:
            tl.store(dd2 + at, acc.to(dd2.dtype.element_ty), mask=inside)
        else:
            tl.store(dd1 + at, acc.to(dd1.dtype.element_ty), mask=inside)
    else:
        m = (tile - down - 2 * deep) * BM + tl.arange(0, BM)
        acc = tl.zeros((BM, BN), tl.float32)
        for part in range(2):  # of f1, then of f2
            share = tl.where(part == 0, 1.0, classifier_alpha)
            acc += share * _outer(dz + part * B * C, f + part * B * D, m, n, B, C, D, BK)
        inside = (m < C)[:, None] & (n < D)[None, :]
        tl.store(dw + m[:, None] * D + n[None, :], (scale * acc).to(dw.dtype.element_ty), mask=inside)
        if tl.program_id(0) % across == 0:
            total = tl.zeros((BM,), tl.float32)
            for part in range(2):
                share = tl.where(part == 0, 1.0, classifier_alpha)
                for start in range(0, B, BK):
                    k = start + tl.arange(0, BK)
                    exists = (m < C)[:, None] & (k < B)[None, :]
                    rows = tl.load(dz + (part * B + k[None, :]) * C + m[:, None], mask=exists, other=0.0)
                    total += share * tl.sum(rows.to(tl.float32), axis=1)
            tl.store(db + m, (scale * total).to(db.dtype.element_ty), mask=m < C)


def afd_gradients_fused(
    grad: Tensor, g: Tensor, d1: Tensor, w: Tensor, f: Tensor, df: Tensor, dz: Tensor, classifier_alpha: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`afd_gradients_reference` by the kernel."""
    grad, g, d1, f, df, dz = (packed(operand) for operand in (grad, g, d1, f, df, dz))
    (batch, width), classes = g.shape, len(w)
    found = torch.empty_like(g), torch.empty_like(d1), torch.empty_like(d1), w.new_empty(w.shape), w.new_empty(classes)
    tile = gradients_tile(g.dtype)
    down, across = tile["BM"], tile["BN"]
    grid = ((cdiv(batch, down) + 2 * cdiv(width, down) + cdiv(classes, down)) * cdiv(width, across),)
    operands = (grad, g, d1, f, df, dz, *found, classifier_alpha, batch, classes, width)
    with torch.cuda.device_of(g):
        _gradients[grid](*operands, **tile)
    return found


afd_gradients = operation("afd_gradients", afd_gradients_reference, afd_gradients_fused)


@afd_gradients.register_fake
def _(grad, g, d1, w, f, df, dz, classifier_alpha):
    return (
        g.new_empty(g.shape),
        d1.new_empty(d1.shape),
        d1.new_empty(d1.shape),
        w.new_empty(w.shape),
        w.new_empty(len(w)),
    )


differentiable_once(afd_gradients, "afd_loss")
