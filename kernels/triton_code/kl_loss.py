"""The kernels of `kl_loss`: the divergence of each row, and its gradients."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["B", "C"])
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


@triton.jit(do_not_specialize=["step", "B", "C"])
def _gradients(grad, step, adversarial, natural, d_adversarial, d_natural, B, C, BM: tl.constexpr, CP: tl.constexpr):
    # grad: B values with stride `step` (0: one value for all rows). adversarial, natural and their gradients: (B,C).
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
