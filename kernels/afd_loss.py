"""The losses of AFD behind the pooled features: Eq. 1 and 3 to 6 of the paper, with their gradient stops.

    f1 = g D1^T      f2 = stop(g) D2^T      z = f W^T + b      y' = argmax over c != y of z1_c
    L1 = CE(z2, y')                                  trains D2 alone                        (Eq. 3)
    L2 = -D(f1, stop(f2))                            trains everything but D2               (Eq. 4)
    L3 = CE(z1, y) + gamma D(f1, stop(t))            trains everything but D2               (Eq. 5)
    total = alpha L1 + beta L2 + L3                                                         (Eq. 6)
    D(u, v) = 1 - cos(u, v), per sample, then the mean over the batch; cos = 0 where a vector has no length

    dz1 = softmax(z1) - 1_y                          dz2 = softmax(z2) - 1_y'
    df1 = dz1 W + beta cos'(f1, f2) - gamma cos'(f1, t)                df2 = alpha dz2 W
    cos'(u, v) = (v/|v| - cos(u, v) u/|u|) / |u|
    dg = df1 D1 / B   dD1 = df1^T g / B   dD2 = df2^T g / B   dW = (dz1^T f1 + k dz2^T f2) / B   db likewise

k is `classifier_alpha`: in the released code L1 reaches the shared classifier as well; it changes no value. Operands
are of the features' type, products accumulate in fp32, losses and cosines are fp32 (float64 stays float64), outside
any autocast. 1/B enters after the products, so that fp16 rows do not underflow; in fp16 gamma / |f1| must stay below
65504, and beyond 128 classes 16-bit logits are rounded to their type.

Three launches besides library products, and no synchronisation: `_project`, one of the row kernels, and in the
backward `_gradients`. With 16-bit operands and up to 128 classes the logits stay inside the row kernel; otherwise they
and dz W are library products (in fp32 as exact as `torch.backends.cuda.matmul` is told to be). Least values to move:
3BD of features and their gradient, 4DD + 2CD of parameters and theirs, BC logits; for ResNet-18 (B=128, D=512, C=10,
bf16 features, fp32 parameters) 4.6 MB, nearly all of it D1, D2 and their gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastafd.kernels.afd_products import afd_gradients, project
from fastafd.kernels.lazy import TYPES, cdiv, jit, operation, outside_autocast, packed, power_of_two

if TYPE_CHECKING:
    import triton.language as tl

SHORTEST = 1e-8  # a vector shorter than this has cosine 0 to everything, and passes no gradient of it
INSIDE = 128  # the most classes whose logits the row kernel computes itself


class AFDLoss(NamedTuple):
    """`total` is differentiable; `terms` are detached scalars; `logits` (B,C) are of f1; `wrong_labels` (B,) is y'."""

    total: Tensor
    terms: dict[str, Tensor]
    logits: Tensor
    wrong_labels: Tensor


def afd_loss(
    features: Tensor,
    teacher_features: Tensor,
    labels: Tensor,
    d1_weight: Tensor,
    d2_weight: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor | None,
    alpha: float = 0.05,
    beta: float = 0.25,
    gamma: float = 25.0,
    classifier_alpha: float = 0.0,
) -> AFDLoss:
    """The AFD objective from pooled features.

    features (B,D) of the student on x_adv, teacher_features (B,D) of the frozen teacher on x, labels (B,) int64 in
    0..C-1, d1_weight and d2_weight (D,D), classifier_weight (C,D), classifier_bias (C,) or None; the parameters share
    one type, the features' or float32. The terms are {"confused": L1, "exclusion": L2, "cross_entropy": CE(z1, y),
    "alignment": D(f1, teacher)}; they and the logits are fp32 (float64 for float64 features).
    Raises ValueError for shapes or types that do not fit, RuntimeError for a second derivative.
    Source: the AFD paper, Eq. 1 and 3 to 6.
    """
    parameters = (d1_weight, d2_weight, classifier_weight, classifier_bias)
    _check(features, teacher_features, labels, *parameters)
    teacher_features = teacher_features.detach().to(features.dtype)
    weights = (float(alpha), float(beta), float(gamma), float(classifier_alpha))
    total, terms, logits, wrong, *_ = _afd_loss(features, teacher_features, labels, *parameters, *weights)
    names = ("confused", "exclusion", "cross_entropy", "alignment")
    return AFDLoss(total, dict(zip(names, terms.detach().unbind())), logits.detach(), wrong)


# What the operation returns: the total; its terms (4,); logits (B,C) of f1; y' (B,); then for the backward, in the
# features' type: f, f1 and f2 (2,B,D); df, B times the gradients of f1 and f2 (2,B,D); dz1 and dz2 (2,B,C).
Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@outside_autocast
def afd_loss_reference(
    g: Tensor,
    t: Tensor,
    y: Tensor,
    d1: Tensor,
    d2: Tensor,
    w: Tensor,
    b: Tensor | None,
    alpha: float,
    beta: float,
    gamma: float,
    classifier_alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`afd_loss` in plain PyTorch: the values, and the gradients of each row."""
    wide = torch.promote_types(g.dtype, torch.float32)
    d1, d2, w = d1.to(g.dtype), d2.to(g.dtype), w.to(g.dtype)
    b = None if b is None else b.to(g.dtype)
    f1, f2 = F.linear(g, d1), F.linear(g, d2)  # Eq. 1
    z1, z2 = F.linear(f1, w, b).to(wide), F.linear(f2, w, b).to(wide)
    wrong = z1.scatter(1, y[:, None], float("-inf")).argmax(dim=1)  # y' of Eq. 3
    u, v, teacher = f1.to(wide), f2.to(wide), t.to(wide)
    iu, iv, it = (_inverse_length(vectors) for vectors in (u, v, teacher))
    cos_f2, cos_t = (u * v).sum(1, keepdim=True) * iu * iv, (u * teacher).sum(1, keepdim=True) * iu * it

    confused = F.cross_entropy(z2, wrong)  # Eq. 3
    exclusion = -(1 - cos_f2).mean()  # Eq. 4
    cross_entropy = F.cross_entropy(z1, y)
    alignment = (1 - cos_t).mean()
    total = alpha * confused + beta * exclusion + cross_entropy + gamma * alignment  # Eq. 5, 6
    terms = torch.stack([confused, exclusion, cross_entropy, alignment])

    dz1 = (z1.softmax(1) - F.one_hot(y, len(w))).to(g.dtype)
    dz2 = (z2.softmax(1) - F.one_hot(wrong, len(w))).to(g.dtype)
    slope = beta * iu * (v * iv - cos_f2 * u * iu) - gamma * iu * (teacher * it - cos_t * u * iu)
    df = torch.stack([(dz1 @ w).to(wide) + slope, alpha * (dz2 @ w).to(wide)]).to(g.dtype)
    return total, terms, z1, wrong, torch.stack([f1, f2]), df, torch.stack([dz1, dz2])


def angular_distance(u: Tensor, v: Tensor) -> Tensor:
    """Mean over the batch of 1 - cos(u_i, v_i): (B,D), (B,D) -> scalar. A zero vector has distance 1 to everything."""
    return (1 - (u * _inverse_length(u) * v * _inverse_length(v)).sum(1)).mean()


def _inverse_length(u: Tensor) -> Tensor:
    """1/|u_i|, 0 for a vector without length: (B,D) -> (B,1)."""
    length = u.norm(dim=1, keepdim=True)
    return torch.where(length < SHORTEST, 0.0, 1 / length.clamp_min(SHORTEST))


@jit()
def _cross_entropy(z, target, c):
    # z (BM,CP), -inf beyond the classes; target (BM); -> the loss of each row, and softmax minus one-hot
    hit = c[None, :] == target[:, None]
    shifted = z - tl.max(z, axis=1)[:, None]
    e = tl.exp(shifted)
    total = tl.sum(e, axis=1)
    loss = tl.log(total) - tl.sum(tl.where(hit, shifted, 0.0), axis=1)
    return loss, e / total[:, None] - hit.to(tl.float32)


@jit()
def _rsqrt(squared):
    # 1/|u| of |u|^2, 0 for a vector without length
    return tl.where(squared < 1e-16, 0.0, 1.0 / tl.sqrt_rn(tl.maximum(squared, 1e-16)))


@jit()
def _finish(inside, confused, cos_f2, cross_entropy, cos_t, partial, done, total, terms, alpha, beta, gamma, B):
    # per row: the terms; partial (programs,4) scratch; done (1); out: total (1), terms (4), by the last program in a
    # fixed order
    mine = partial + 4 * tl.program_id(0)
    tl.store(mine, tl.sum(tl.where(inside, confused, 0.0)))
    tl.store(mine + 1, tl.sum(tl.where(inside, cos_f2 - 1, 0.0)))
    tl.store(mine + 2, tl.sum(tl.where(inside, cross_entropy, 0.0)))
    tl.store(mine + 3, tl.sum(tl.where(inside, 1 - cos_t, 0.0)))
    tl.debug_barrier()  # every thread's stores, before the count that makes them visible
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


@jit("B", "C")
def _rows(
    f, t, y, w, b, df, dz, logits, wrong, partial, done, total, terms, alpha, beta, gamma, B, C, D,
    BM: tl.constexpr, CP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # f (2,B,D); t (B,D); y int64 (B); w (C,D) and b (C) in f's type; out: df (2,B,D), dz (2,B,C), logits fp32 (B,C),
    # wrong int64 (B), total fp32 (1), terms fp32 (4); partial, done: see _finish
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
    other = tl.minimum(other, C - 1)  # beyond the classes only where logits are NaN
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


@jit("B", "C")
def _rows_of_logits(
    f, t, y, z, b, df, dz, logits, wrong, partial, done, total, terms, alpha, beta, gamma, B, C, D,
    BM: tl.constexpr, CP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # as _rows, without products, from z (2,B,C), the logits without bias; of df only df1 less dz1 W
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
    other = tl.minimum(other, C - 1)  # beyond the classes only where logits are NaN
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


def rows_tile(classes: int, width: int) -> dict[str, int]:
    """Rows, padded classes and features that a program of `_rows` holds at a time."""
    return {
        "BM": 16,
        "CP": 16 if classes <= 16 and width % 16 == 0 else INSIDE,
        "BD": 64,
        "num_warps": 8,
        "num_stages": 2,
    }


def logits_tile(classes: int) -> dict[str, int]:
    """The same of `_rows_of_logits`."""
    return {"BM": 1, "CP": power_of_two(classes, 1024), "BD": 256, "num_warps": 4}


@outside_autocast
def afd_loss_fused(
    g: Tensor,
    t: Tensor,
    y: Tensor,
    d1: Tensor,
    d2: Tensor,
    w: Tensor,
    b: Tensor | None,
    alpha: float,
    beta: float,
    gamma: float,
    classifier_alpha: float,
) -> Rows:
    """`afd_loss_reference` by the kernels."""
    g, t, y, d1, d2, w = (packed(operand) for operand in (g, t, y, d1, d2, w))
    f, w, b, done = project(g, d1, d2, w, None if b is None else packed(b))
    (batch, width), classes = g.shape, len(w)
    df, dz = torch.empty_like(f), g.new_empty(2, batch, classes)
    logits = torch.empty(batch, classes, device=g.device)
    wrong, total, terms = torch.empty_like(y), logits.new_empty(()), logits.new_empty(4)
    inside = g.dtype != torch.float32 and classes <= INSIDE
    tile = rows_tile(classes, width) if inside else logits_tile(classes)
    partial = torch.empty(cdiv(batch, tile["BM"]), 4, device=g.device)
    out = (df, dz, logits, wrong, partial, done, total, terms, alpha, beta, gamma, batch, classes, width)
    with torch.cuda.device_of(g):
        if inside:
            _rows[(len(partial),)](f, t, y, w, b, *out, **tile)
        else:
            z = f.view(2 * batch, width) @ w.T
            _rows_of_logits[(len(partial),)](f, t, y, z, b, *out, **tile)
            df[0].addmm_(dz[0], w)
            torch.addmm(df[1], dz[1], w, beta=0, alpha=alpha, out=df[1])
    return total, terms, logits, wrong, f, df, dz


_afd_loss = operation("afd_loss", afd_loss_reference, afd_loss_fused)


@_afd_loss.register_fake
def _(g, t, y, d1, d2, w, b, alpha, beta, gamma, classifier_alpha):
    (batch, width), classes, wide = g.shape, len(w), torch.promote_types(g.dtype, torch.float32)
    logits = g.new_empty(batch, classes, dtype=wide)
    f, dz = g.new_empty(2, batch, width), g.new_empty(2, batch, classes)
    return logits.new_empty(()), logits.new_empty(4), logits, torch.empty_like(y), f, torch.empty_like(f), dz


def _save(ctx: Any, inputs: tuple[Any, ...], output: Rows) -> None:
    g, _, _, d1, _, w, b, *_, ctx.classifier_alpha = inputs
    ctx.has_bias = b is not None
    ctx.set_materialize_grads(False)  # of the other results, which have none: each would be filled with zeros
    ctx.save_for_backward(g, d1, w, *output[4:])


def _backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return 11 * (None,)
    dg, dd1, dd2, dw, db = afd_gradients(grad, *ctx.saved_tensors, ctx.classifier_alpha)
    return dg, None, None, dd1, dd2, dw, db if ctx.has_bias else None, None, None, None, None


_afd_loss.register_autograd(_backward, setup_context=_save)


def _check(g: Tensor, t: Tensor, y: Tensor, d1: Tensor, d2: Tensor, w: Tensor, b: Tensor | None) -> None:
    if g.ndim != 2 or w.ndim != 2:
        raise ValueError(f"features are (B,D) and classifier_weight (C,D), not {tuple(g.shape)} and {tuple(w.shape)}")
    (batch, width), classes = g.shape, w.shape[0]
    wanted = {
        "teacher_features": (t, (batch, width)),
        "labels": (y, (batch,)),
        "d1_weight": (d1, (width, width)),
        "d2_weight": (d2, (width, width)),
        "classifier_weight": (w, (classes, width)),
        "classifier_bias": (b, (classes,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, takes {shape} for features {tuple(g.shape)}")
    if batch == 0:
        raise ValueError("features: the mean over an empty batch is undefined")
    if classes < 2:
        raise ValueError("classifier_weight: a wrong class needs at least two classes")
    if y.dtype != torch.int64:
        raise ValueError(f"labels is {y.dtype}, takes int64")
    if g.dtype not in (*TYPES, torch.float64):
        raise ValueError(f"features is {g.dtype}, takes a floating-point type")
    allowed = (g.dtype, torch.float32)
    for name in ("d1_weight", "d2_weight", "classifier_weight", "classifier_bias"):
        tensor = wanted[name][0]
        if tensor is not None and (tensor.dtype not in allowed or tensor.dtype != d1.dtype):
            raise ValueError(f"{name} is {tensor.dtype}; the parameters share one type, {g.dtype} or torch.float32")
