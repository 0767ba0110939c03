"""The kernel of `attack_head`: one program an image."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["has_bias", "relu", "HW", "C"])
def _head(
    a, y, w, b, out, has_bias, relu, HW, C, D, BP: tl.constexpr, CP: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    # a, out (B,HW,D); pooled features have HW = 1 and relu = 0. y int64 (B). w (C,D) and b (C) fp32; b is read if
    # has_bias.
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
