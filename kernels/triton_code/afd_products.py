"""The products of `afd_loss`: the projection by D1 and D2, and the grouped gradients of the backward pass."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["has_bias", "B", "C"])
def _project(
    g, d1, d2, w, b, has_bias, f, w_cast, b_cast, done, B, C, D, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    # g (B,D), d1 and d2 (D,D), w (C,D), b (C), which is read if has_bias. Output: f (2,B,D); w_cast (C,D) and b_cast
    # (C) in f's type; done int32 (1) set to 0: the row kernel counts its finished programs in it.
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


@triton.jit
def _outer(a, b, m, n, K, M, N, BK: tl.constexpr):
    # a (K,M), b (K,N), m (BM), n (BN). Returns a^T b at rows m and columns n.
    acc = tl.zeros((m.shape[0], n.shape[0]), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        at = tl.load(a + k[None, :] * M + m[:, None], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        bt = tl.load(b + k[:, None] * N + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(at, bt, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["B", "C"])
def _gradients(
    grad, g, d1, f, df, dz, dg, dd1, dd2, dw, db, classifier_alpha, B, C, D,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # grad fp32 (1), g (B,D), d1 (D,D), f (2,B,D), df (2,B,D), dz (2,B,C). Output: dg (B,D), dd1 and dd2 (D,D), dw
    # (C,D), db (C). Each program computes one tile of one product. The tiles of dg take longest, so they come first.
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
        for part in range(2):  # the part of f1, then that of f2
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
