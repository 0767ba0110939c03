"""The kernel of `linf_step`: elementwise, in place."""

import triton
import triton.language as tl


@triton.jit
def _step(x_adv, grad, x, eps, step_size, n, BLOCK: tl.constexpr):
    # x_adv, grad, x: n elements each, in the same order
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    slope = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    image = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    stepped = tl.load(x_adv + at, mask=inside, other=0.0).to(tl.float32)
    stepped += step_size * ((slope > 0).to(tl.float32) - (slope < 0).to(tl.float32))
    nan: tl.constexpr = tl.PropagateNan.ALL  # a NaN pixel stays NaN, as in the reference
    stepped = tl.maximum(stepped, image - eps, propagate_nan=nan)
    stepped = tl.minimum(stepped, image + eps, propagate_nan=nan)
    stepped = tl.minimum(tl.maximum(stepped, 0.0, propagate_nan=nan), 1.0, propagate_nan=nan)
    tl.store(x_adv + at, stepped.to(x_adv.dtype.element_ty), mask=inside)
