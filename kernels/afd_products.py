"""The products of `afd_loss`: the projection by D1 and D2, and the grouped gradients of the backward pass.

    f1 = g D1^T   f2 = g D2^T
    dg = df1 D1 / B   dD1 = df1^T g / B   dD2 = df2^T g / B   dW = (dz1^T f1 + k dz2^T f2) / B   db likewise

Each is one launch. Operands have the features' type, sums are fp32, a gradient has its parameter's type.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastafd.kernels.operation import cdiv, differentiable_once, operation, outside_autocast, packed


def project_tile(dtype: torch.dtype) -> dict[str, int]:
    """How many rows, columns and terms of a product a program of `_project` takes at a time."""
    narrow = {"BM": 32, "BN": 32, "num_stages": 2}
    return narrow | ({"BK": 16, "num_warps": 8} if dtype == torch.float32 else {"BK": 64, "num_warps": 4})


def gradients_tile(dtype: torch.dtype) -> dict[str, int]:
    """How many rows, columns and terms of a product a program of `_gradients` takes at a time."""
    return {"BM": 64, "BN": 64, "BK": 16 if dtype == torch.float32 else 64, "num_stages": 2, "num_warps": 8}


def project(g: Tensor, d1: Tensor, d2: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f1 and f2 (2,B,D), W (C,D) and b (C) in the features' type, and a counter set to 0, all in one launch."""
    from fastafd.kernels.triton_code.afd_products import _project

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
    """The gradients of features, D1, D2, W and b, from the gradients of the rows and of the total."""
    wide = torch.promote_types(g.dtype, torch.float32)
    scale = grad.to(wide) / len(g)
    dg = scale * (df[0] @ d1.to(g.dtype)).to(wide)
    dd1, dd2 = (scale * (rows.T @ g).to(wide) for rows in df)
    dw = scale * ((dz[0].T @ f[0]).to(wide) + classifier_alpha * (dz[1].T @ f[1]).to(wide))
    db = scale * (dz[0].to(wide) + classifier_alpha * dz[1].to(wide)).sum(0)
    return dg.to(g.dtype), dd1.to(d1.dtype), dd2.to(d1.dtype), dw.to(w.dtype), db.to(w.dtype)


def afd_gradients_fused(
    grad: Tensor, g: Tensor, d1: Tensor, w: Tensor, f: Tensor, df: Tensor, dz: Tensor, classifier_alpha: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`afd_gradients_reference`, computed by the kernel."""
    from fastafd.kernels.triton_code.afd_products import _gradients

    grad, g, d1, f, df, dz = (packed(operand) for operand in (grad, g, d1, f, df, dz))
    (batch, width), classes = g.shape, len(w)
    gradients = (
        torch.empty_like(g),
        torch.empty_like(d1),
        torch.empty_like(d1),
        w.new_empty(w.shape),
        w.new_empty(classes),
    )
    tile = gradients_tile(g.dtype)
    down, across = tile["BM"], tile["BN"]
    grid = ((cdiv(batch, down) + 2 * cdiv(width, down) + cdiv(classes, down)) * cdiv(width, across),)
    operands = (grad, g, d1, f, df, dz, *gradients, classifier_alpha, batch, classes, width)
    with torch.cuda.device_of(g):
        _gradients[grid](*operands, **tile)
    return gradients


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
