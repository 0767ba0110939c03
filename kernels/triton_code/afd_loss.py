"""The row kernels of `afd_loss`: the losses of each row, their gradients, and the sums over the batch."""

import triton
import triton.language as tl


@triton.jit
def _cross_entropy(z, target, c):
    # z (BM,CP): -inf after the last class. target (BM). Returns the loss of each row, and softmax minus one-hot.
    hit = c[None, :] == target[:, None]
    shifted = z - tl.max(z, axis=1)[:, None]
    e = tl.exp(shifted)
    total = tl.sum(e, axis=1)
    loss = tl.log(total) - tl.sum(tl.where(hit, shifted, 0.0), axis=1)
    return loss, e / total[:, None] - hit.to(tl.float32)


@triton.jit
def _rsqrt(squared):
    # 1/|u| from |u|^2, 0 for a vector of length 0
    return tl.where(squared < 1e-16, 0.0, 1.0 / tl.sqrt_rn(tl.maximum(squared, 1e-16)))


@triton.jit
def _finish(inside, confused, cos_f2, cross_entropy, cos_t, partial, done, total, terms, alpha, beta, gamma, B):
    # confused, cos_f2, cross_entropy, cos_t: a value a row. partial (programs,4): scratch. done (1): programs that have
    # finished. Output: total (1), terms (4); the last program to finish adds the rows up, in a fixed order.
    mine = partial + 4 * tl.program_id(0)
    tl.store(mine, tl.sum(tl.where(inside, confused, 0.0)))
    tl.store(mine + 1, tl.sum(tl.where(inside, cos_f2 - 1, 0.0)))
    tl.store(mine + 2, tl.sum(tl.where(inside, cross_entropy, 0.0)))
    tl.store(mine + 3, tl.sum(tl.where(inside, 1 - cos_t, 0.0)))
    tl.debug_barrier()  # all threads store before the counter moves
    programs = tl.num_programs(0)
    if tl.atomic_add(done, 1) == programs - 1:
        term = tl.arange(0, 4)
        sums = tl.zeros((4,), tl.float32)
        for start in range(0, programs, 64):
            i = start + tl.arange(0, 64)
            sums += tl.sum(
                tl.load(partial + 4 * i[:, None] + term[None, :], mask=(i < programs)[:, None], other=0.0), 0
            )
        sums /= B
        weight = tl.where(term == 0, alpha, tl.where(term == 1, beta, tl.where(term == 2, 1.0, gamma)))
        tl.store(total, tl.sum(weight * sums))
        tl.store(terms + term, sums)


@triton.jit(do_not_specialize=["B", "C"])
def _rows(
    f, t, y, w, b, df, dz, logits, wrong, partial, done, total, terms, alpha, beta, gamma, B, C, D,
    BM: tl.constexpr, CP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # f (2,B,D), t (B,D), y int64 (B), w (C,D) and b (C) in f's type. Output: df (2,B,D), dz (2,B,C), logits fp32 (B,C),
    # wrong int64 (B), total fp32 (1), terms fp32 (4). partial, done: see _finish.
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, CP)
    z1 = tl.zeros((BM, CP), tl.float32)
    z2 = tl.zeros((BM, CP), tl.float32)
    uu = tl.zeros((BM,), tl.float32)
    vv = tl.zeros((BM,), tl.float32)
    tt = tl.zeros((BM,), tl.float32)
    uv = tl.zeros((BM,), tl.float32)
    ut = tl.zeros((BM,), tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        at = row[:, None] * D + d[None, :]
        inside = (row < B)[:, None] & (d < D)[None, :]
        u = tl.load(f + at, mask=inside, other=0.0)
        v = tl.load(f + B * D + at, mask=inside, other=0.0)
        wt = tl.load(w + c[None, :] * D + d[:, None], mask=(d < D)[:, None] & (c < C)[None, :], other=0.0)
        z1 = tl.dot(u, wt, z1)
        z2 = tl.dot(v, wt, z2)
        u, v = u.to(tl.float32), v.to(tl.float32)
        p = tl.load(t + at, mask=inside, other=0.0).to(tl.float32)
        uu += tl.sum(u * u, axis=1)
        vv += tl.sum(v * v, axis=1)
        tt += tl.sum(p * p, axis=1)
        uv += tl.sum(u * v, axis=1)
        ut += tl.sum(u * p, axis=1)

    bias = tl.load(b + c, mask=c < C, other=-float("inf")).to(tl.float32)
    z1 += bias[None, :]
    z2 += bias[None, :]
    label = tl.load(y + row, mask=row < B, other=0).to(tl.int32)
    other = tl.argmax(tl.where(c[None, :] == label[:, None], -float("inf"), z1), axis=1)
    other = tl.minimum(other, C - 1)  # only NaN logits give an index after the last class
    cross_entropy, dz1 = _cross_entropy(z1, label, c)
    confused, dz2 = _cross_entropy(z2, other, c)
    dz1, dz2 = dz1.to(dz.dtype.element_ty), dz2.to(dz.dtype.element_ty)
    of_class = row[:, None] * C + c[None, :]
    classes = (row < B)[:, None] & (c < C)[None, :]
    tl.store(logits + of_class, z1, mask=classes)
    tl.store(dz + of_class, dz1, mask=classes)
    tl.store(dz + B * C + of_class, dz2, mask=classes)
    tl.store(wrong + row, other.to(tl.int64), mask=row < B)

    iu, iv, it = _rsqrt(uu), _rsqrt(vv), _rsqrt(tt)
    cos_f2, cos_t = uv * iu * iv, ut * iu * it
    of_v, of_t = beta * iu * iv, -gamma * iu * it  # df1 = dz1 W + of_v f2 + of_t t + of_u f1
    of_u = (gamma * cos_t - beta * cos_f2) * iu * iu
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        at = row[:, None] * D + d[None, :]
        inside = (row < B)[:, None] & (d < D)[None, :]
        u = tl.load(f + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(f + B * D + at, mask=inside, other=0.0).to(tl.float32)
        p = tl.load(t + at, mask=inside, other=0.0).to(tl.float32)
        wk = tl.load(w + c[:, None] * D + d[None, :], mask=(c < C)[:, None] & (d < D)[None, :], other=0.0)
        df1 = tl.dot(dz1, wk) + (of_v[:, None] * v + of_t[:, None] * p + of_u[:, None] * u)
        df2 = alpha * tl.dot(dz2, wk)
        tl.store(df + at, df1.to(df.dtype.element_ty), mask=inside)
        tl.store(df + B * D + at, df2.to(df.dtype.element_ty), mask=inside)
    _finish(row < B, confused, cos_f2, cross_entropy, cos_t, partial, done, total, terms, alpha, beta, gamma, B)


@triton.jit(do_not_specialize=["B", "C"])
def _rows_of_logits(
    f, t, y, z, b, df, dz, logits, wrong, partial, done, total, terms, alpha, beta, gamma, B, C, D,
    BM: tl.constexpr, CP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # As _rows, but z (2,B,C), the logits without bias, is an input, and of df only df1 - dz1 W is written.
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, CP)
    uu = tl.zeros((BM, BD), tl.float32)
    vv = tl.zeros((BM, BD), tl.float32)
    tt = tl.zeros((BM, BD), tl.float32)
    uv = tl.zeros((BM, BD), tl.float32)
    ut = tl.zeros((BM, BD), tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        at = row[:, None] * D + d[None, :]
        inside = (row < B)[:, None] & (d < D)[None, :]
        u = tl.load(f + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(f + B * D + at, mask=inside, other=0.0).to(tl.float32)
        p = tl.load(t + at, mask=inside, other=0.0).to(tl.float32)
        uu += u * u
        vv += v * v
        tt += p * p
        uv += u * v
        ut += u * p

    of_class = row[:, None] * C + c[None, :]
    classes = (row < B)[:, None] & (c < C)[None, :]
    bias = tl.load(b + c, mask=c < C, other=-float("inf")).to(tl.float32)
    z1 = tl.load(z + of_class, mask=classes, other=0.0).to(tl.float32) + bias[None, :]
    z2 = tl.load(z + B * C + of_class, mask=classes, other=0.0).to(tl.float32) + bias[None, :]
    label = tl.load(y + row, mask=row < B, other=0).to(tl.int32)
    other = tl.argmax(tl.where(c[None, :] == label[:, None], -float("inf"), z1), axis=1)
    other = tl.minimum(other, C - 1)  # only NaN logits give an index after the last class
    cross_entropy, dz1 = _cross_entropy(z1, label, c)
    confused, dz2 = _cross_entropy(z2, other, c)
    tl.store(logits + of_class, z1, mask=classes)
    tl.store(dz + of_class, dz1.to(dz.dtype.element_ty), mask=classes)
    tl.store(dz + B * C + of_class, dz2.to(dz.dtype.element_ty), mask=classes)
    tl.store(wrong + row, other.to(tl.int64), mask=row < B)

    iu, iv = _rsqrt(tl.sum(uu, axis=1)), _rsqrt(tl.sum(vv, axis=1))
    it = _rsqrt(tl.sum(tt, axis=1))
    cos_f2, cos_t = tl.sum(uv, axis=1) * iu * iv, tl.sum(ut, axis=1) * iu * it
    of_v, of_t = beta * iu * iv, -gamma * iu * it
    of_u = (gamma * cos_t - beta * cos_f2) * iu * iu
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        at = row[:, None] * D + d[None, :]
        inside = (row < B)[:, None] & (d < D)[None, :]
        u = tl.load(f + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(f + B * D + at, mask=inside, other=0.0).to(tl.float32)
        p = tl.load(t + at, mask=inside, other=0.0).to(tl.float32)
        df1 = of_v[:, None] * v + of_t[:, None] * p + of_u[:, None] * u
        tl.store(df + at, df1.to(df.dtype.element_ty), mask=inside)
    _finish(row < B, confused, cos_f2, cross_entropy, cos_t, partial, done, total, terms, alpha, beta, gamma, B)
