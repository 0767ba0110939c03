"""The losses of AFD from the pooled features: Eq. 1 and 3 to 6 of the paper, with their gradient stops.

    f1 = g D1^T      f2 = stop(g) D2^T      z = f W^T + b      y' = argmax over c != y of z1_c
    L1 = CE(z2, y')                                  trains D2 alone                        (Eq. 3)
    L2 = -D(f1, stop(f2))                            trains everything but D2               (Eq. 4)
    L3 = CE(z1, y) + gamma D(f1, stop(t))            trains everything but D2               (Eq. 5)
    total = alpha L1 + beta L2 + L3                                                         (Eq. 6)
    D(u, v) = the mean over the batch of 1 - cos(u_i, v_i); cos = 0 if a vector has length 0

    dz1 = softmax(z1) - 1_y                          dz2 = softmax(z2) - 1_y'
    df1 = dz1 W + beta cos'(f1, f2) - gamma cos'(f1, t)                df2 = alpha dz2 W
    cos'(u, v) = (v/|v| - cos(u, v) u/|u|) / |u|
    dg = df1 D1 / B   dD1 = df1^T g / B   dD2 = df2^T g / B   dW = (dz1^T f1 + k dz2^T f2) / B   db likewise

k is `classifier_alpha`. In the released code L1 also trains the shared classifier; k changes gradients and no value.
Operands have the features' type, products accumulate in fp32, losses and cosines are fp32 (float64 stays float64), and
autocast has no effect. The factor 1/B comes after the products, so that fp16 rows do not underflow. In fp16,
gamma / |f1| must stay below 65504, and with more than 128 classes 16-bit logits are rounded to their type.

There are three launches besides library products, and no synchronisation: `_project`, one of the row kernels, and
`_gradients` in the backward pass. With 16-bit operands and up to 128 classes, the logits stay inside the row kernel.
Otherwise the logits and dz W are library products (in fp32 as exact as `torch.backends.cuda.matmul` is set to be). At
least these values must move: 3BD of features and their gradient, 4DD + 2CD of parameters and their gradients, BC
logits. For ResNet-18 (B=128, D=512, C=10, bf16 features, fp32 parameters) that is 4.6 MB, nearly all of it D1, D2 and
their gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastafd.kernels.afd_products import afd_gradients, project
from fastafd.kernels.operation import TYPES, cdiv, operation, outside_autocast, packed, power_of_two

SHORTEST = 1e-8  # a shorter vector has cosine 0 with every other one, and the cosine gives it no gradient
INSIDE = 128  # up to so many classes the row kernel computes the logits itself


class AFDLoss(NamedTuple):
    """total (): differentiable. terms: detached scalars. logits (B,C): those of f1. wrong_labels (B,): y'."""

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


# The results of the operation: total (); terms (4,); logits (B,C) of f1; y' (B,). Then, for the backward pass and in
# the features' type: f (2,B,D), which is f1 and f2; df (2,B,D), B times the gradients of f1 and f2; dz (2,B,C), dz1 and
# dz2.
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
    """`afd_loss` in plain PyTorch: the values and the gradients of each row."""
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
    """The mean () of 1 - cos(u_i, v_i) over the rows of u and v (B,D).

    A zero vector has distance 1 to every other one.
    """
    return (1 - (u * _inverse_length(u) * v * _inverse_length(v)).sum(1)).mean()


def _inverse_length(u: Tensor) -> Tensor:
    """1/|u_i|, or 0 for a vector of length 0: (B,D) -> (B,1)."""
    length = u.norm(dim=1, keepdim=True)
    return torch.where(length < SHORTEST, 0.0, 1 / length.clamp_min(SHORTEST))


def rows_tile(classes: int, width: int) -> dict[str, int]:
    """How many rows, padded classes and features a program of `_rows` holds at a time."""
    return {
        "BM": 16,
        "CP": 16 if classes <= 16 and width % 16 == 0 else INSIDE,
        "BD": 64,
        "num_warps": 8,
        "num_stages": 2,
    }


def logits_tile(classes: int) -> dict[str, int]:
    """How many rows, padded classes and features a program of `_rows_of_logits` holds at a time."""
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
    """`afd_loss_reference`, computed by the kernels."""
    from fastafd.kernels.triton_code.afd_loss import _rows, _rows_of_logits

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
    ctx.set_materialize_grads(False)  # else autograd makes a tensor of zeros for every result without a gradient
    ctx.save_for_backward(g, d1, w, *output[4:])


def _backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return 11 * (None,)
    dg, dd1, dd2, dw, db = afd_gradients(grad, *ctx.saved_tensors, ctx.classifier_alpha)
    return dg, None, None, dd1, dd2, dw, db if ctx.has_bias else None, None, None, None, None


_afd_loss.register_autograd(_backward, setup_context=_save)


def _check(g: Tensor, t: Tensor, y: Tensor, d1: Tensor, d2: Tensor, w: Tensor, b: Tensor | None) -> None:
    """Raise ValueError for operands of `afd_loss` whose shapes or types do not fit."""
    if g.ndim != 2 or w.ndim != 2:
        raise ValueError(f"features are (B,D) and classifier_weight (C,D), not {tuple(g.shape)} and {tuple(w.shape)}")
    (batch, width), classes = g.shape, w.shape[0]
    expected = {
        "teacher_features": (t, (batch, width)),
        "labels": (y, (batch,)),
        "d1_weight": (d1, (width, width)),
        "d2_weight": (d2, (width, width)),
        "classifier_weight": (w, (classes, width)),
        "classifier_bias": (b, (classes,)),
    }
    for name, (tensor, shape) in expected.items():
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
        tensor = expected[name][0]
        if tensor is not None and (tensor.dtype not in allowed or tensor.dtype != d1.dtype):
            raise ValueError(f"{name} is {tensor.dtype}; the parameters share one type, {g.dtype} or torch.float32")
