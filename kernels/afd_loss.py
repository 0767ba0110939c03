"""The losses of AFD behind the pooled features: Eq. 1 and 3 to 6 of the paper, with their gradient stops.

    f1 = g D1^T      f2 = stop(g) D2^T      z = f W^T + b      y' = argmax over c != y of z1_c
    L1 = CE(z2, y')                                  trains D2 alone                        (Eq. 3)
    L2 = -D(f1, stop(f2))                            trains everything but D2               (Eq. 4)
    L3 = CE(z1, y) + gamma D(f1, stop(t))            trains everything but D2               (Eq. 5)
    total = alpha L1 + beta L2 + L3                                                         (Eq. 6)
    D(u, v) = 1 - u.v / (|u| |v|), per sample, then the mean over the batch

`classifier_alpha` adds that much of dL1/d(W, b) to the classifier's gradient and nothing to the value: in the released
code L1 reaches the shared classifier as well. Cosines and cross-entropies are computed in fp32 whatever the operands'
type (float64 stays float64), outside any autocast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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

    features (B,D) of the student on x_adv, teacher_features (B,D) of the frozen teacher on x, labels (B,) int64,
    d1_weight and d2_weight (D,D), classifier_weight (C,D), classifier_bias (C,) or None. The terms are
    {"confused": L1, "exclusion": L2, "cross_entropy": CE(z1, y), "alignment": D(f1, teacher)}.
    Raises ValueError for shapes that do not fit. Source: the AFD paper, Eq. 1 and 3 to 6.
    """
    _check_shapes(features, teacher_features, labels, d1_weight, d2_weight, classifier_weight, classifier_bias)
    with torch.autocast(features.device.type, enabled=False):
        return afd_loss_reference(
            features,
            teacher_features,
            labels,
            d1_weight,
            d2_weight,
            classifier_weight,
            classifier_bias,
            alpha,
            beta,
            gamma,
            classifier_alpha,
        )


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
) -> AFDLoss:
    """`afd_loss` in plain PyTorch: what every other implementation is held against."""
    wide = torch.promote_types(g.dtype, torch.float32)
    g, t, d1, d2, w = (operand.to(wide) for operand in (g, t, d1, d2, w))
    b = None if b is None else b.to(wide)

    f1 = F.linear(g, d1)  # Eq. 1
    f2 = F.linear(g.detach(), d2)
    z1 = F.linear(f1, w, b)
    wrong = z1.detach().scatter(1, y[:, None], float("-inf")).argmax(dim=1)  # y' of Eq. 3

    confused = F.cross_entropy(F.linear(f2, w.detach(), None if b is None else b.detach()), wrong)  # Eq. 3
    exclusion = -angular_distance(f1, f2.detach())  # Eq. 4
    cross_entropy = F.cross_entropy(z1, y)
    alignment = angular_distance(f1, t.detach())
    total = alpha * confused + beta * exclusion + cross_entropy + gamma * alignment  # Eq. 5, 6
    if classifier_alpha:
        shared = F.cross_entropy(F.linear(f2.detach(), w, b), wrong)
        total = total + classifier_alpha * (shared - shared.detach())

    terms = {"confused": confused, "exclusion": exclusion, "cross_entropy": cross_entropy, "alignment": alignment}
    return AFDLoss(total, {name: term.detach() for name, term in terms.items()}, z1.detach(), wrong)


def angular_distance(u: Tensor, v: Tensor) -> Tensor:
    """Mean over the batch of 1 - cos(u_i, v_i): (B,D), (B,D) -> scalar. A zero vector has distance 1 to everything."""
    return (1 - F.cosine_similarity(u, v, dim=1)).mean()


def _check_shapes(g: Tensor, t: Tensor, y: Tensor, d1: Tensor, d2: Tensor, w: Tensor, b: Tensor | None) -> None:
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
    if classes < 2:
        raise ValueError("classifier_weight: a wrong class needs at least two classes")
