"""The Triton kernels compared with float64 autograd, on a GPU or in Triton's interpreter (TRITON_INTERPRET=1).

The interpreter runs the kernels' own code on the CPU, with larger tiles than a GPU gets, since its cost is by the
program; the tiles of a GPU are interpreted in `test_with_the_tiles_of_a_gpu`, and compiled in test_kernel_builds.py.
bf16 is for a GPU alone: the interpreter computes its products wrongly.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import fastafd.kernels  # noqa: F401

afd, products, head, crop, kl, linf = (
    sys.modules[f"fastafd.kernels.{name}"]
    for name in ("afd_loss", "afd_products", "attack_head", "augment", "kl_loss", "linf_step")
)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

BATCHES, WIDTHS, CLASSES = (1, 7, 128), (512, 640, 33), (2, 10, 100, 200)
TYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
# What eager arithmetic of that type may be off, in the norm and relative to float64: a check on the check. The fused
# operation may be off twice what eager is, and by FLOOR, since an eager sum may happen to be exact and a GPU's exp and
# quotient are not.
EAGER = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}
FLOOR = 2.0**-22
DRAWS = 8


@pytest.fixture(autouse=True)
def poisoned():
    """Allocated memory is filled with NaN, so that values that were never written show."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all() and torch.ones(3).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def large_tiles(request, monkeypatch):
    """Larger tiles, so that the interpreter runs fewer programs.

    And it patches triton.language once, not at every call.
    """
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpretedFunction

    patched, call = set(), InterpretedFunction.__call__

    def call_once_patched(self, *operands, **named):
        scope = id(self.fn.__globals__)
        if scope in patched:
            return self.rewrite()(*operands, **named)
        patched.add(scope)
        return call(self, *operands, **named)

    monkeypatch.setattr(InterpretedFunction, "__call__", call_once_patched)
    if "tiles_of_a_gpu" in request.node.name:
        return
    monkeypatch.setattr(products, "project_tile", lambda dtype: {"BM": 128, "BN": 512, "BK": 512})
    monkeypatch.setattr(products, "gradients_tile", lambda dtype: {"BM": 512, "BN": 512, "BK": 256})
    monkeypatch.setattr(kl, "TILE", 2**17)
    rows_tile, logits_tile, tile_of = afd.rows_tile, afd.logits_tile, head.tile_of
    monkeypatch.setattr(afd, "rows_tile", lambda *sizes: rows_tile(*sizes) | {"BD": 256})
    monkeypatch.setattr(afd, "logits_tile", lambda *sizes: logits_tile(*sizes) | {"BM": 16})
    monkeypatch.setattr(head, "tile_of", lambda *sizes: tile_of(*sizes) | {"BD": 512})


def seeded(*case) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(str(case).encode()))


def off(results, exact) -> dict[str, float]:
    """The relative distance of each result from float64's, in the norm."""
    distances = {}
    for name, value in exact.items():
        assert results[name].isfinite().all() and results[name].shape == value.shape, name
        distance = float((results[name].double().cpu() - value).norm())
        distances[name] = distance and distance / max(float(value.norm()), 1e-30)
    return distances


def hold(fused, eagers, dtype=None) -> None:
    """Check that each fused result is within twice eager's error, the largest of several draws.

    With a type, eager itself within that type's.
    """
    largest: dict[str, float] = {}
    for eager in eagers:
        assert dtype is None or max(eager.values()) <= EAGER[dtype], f"eager: {eager}"
        largest = {name: max(value, largest.get(name, 0.0)) for name, value in eager.items()}
        over = {name: (value, largest[name]) for name, value in fused.items() if value > 2 * largest[name] + FLOOR}
        if not over:
            return
    raise AssertionError("off from float64, fused and eager: " + str(over))


# -- afd_loss -----------------------------------------------------------------------------------------------------

WEIGHTS = {"alpha": 0.3, "beta": 0.7, "gamma": 2.5, "classifier_alpha": 0.6}
GRADIENTS = ("features", "d1", "d2", "weight", "bias")


def afd_operands(batch, width, classes, dtype, parameters, generator):
    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    g, t = normal(batch, width).relu(), normal(batch, width).relu()
    d1, d2 = (torch.eye(width) + 0.5 * normal(width, width) / width**0.5 for _ in range(2))
    w, b = normal(classes, width) / width**0.5, normal(classes)
    y = torch.randint(0, classes, (batch,), generator=generator)
    return [g.to(dtype), t.to(dtype), y, *(p.to(parameters) for p in (d1, d2, w, b))]


def cosine(u, v):
    """The cosine; 0 for a vector of length 0, and its gradient too."""
    has = (u.norm(dim=1) > 0) & (v.norm(dim=1) > 0)
    one = torch.ones_like(u)
    both = (torch.where(has[:, None], vector, one) for vector in (u, v))
    return torch.where(has, F.cosine_similarity(*both, dim=1), 0.0)


def afd_exactly(operands, wrong, slope, alpha, beta, gamma, classifier_alpha):
    """Eq. 1 and 3 to 6 in float64 with autograd; y' is an argument."""
    g, t, y, d1, d2, w, b = (None if v is None else v if v.dtype == torch.int64 else v.double() for v in operands)
    leaves = [v.requires_grad_() for v in (g, d1, d2, w, b) if v is not None]
    f1, f2 = g @ d1.T, g.detach() @ d2.T
    shift = 0.0 if b is None else b
    z1, z2 = f1 @ w.T + shift, f2 @ w.detach().T + (0.0 if b is None else b.detach())
    confused, cross_entropy = F.cross_entropy(z2, wrong), F.cross_entropy(z1, y)
    exclusion, alignment = -(1 - cosine(f1, f2.detach())).mean(), (1 - cosine(f1, t)).mean()
    total = alpha * confused + beta * exclusion + cross_entropy + gamma * alignment
    shared = classifier_alpha * F.cross_entropy(f2.detach() @ w.T + shift, wrong)
    grads = torch.autograd.grad(slope * (total + shared), leaves)
    losses = torch.stack([total, confused, exclusion, cross_entropy, alignment]).detach()
    return {"losses": losses, "logits": z1.detach(), **dict(zip(GRADIENTS, grads, strict=False))}


def afd_run(forward, backward, operands, slope, weights):
    device = DEVICE if forward is afd.afd_loss_fused else "cpu"
    operands = [None if v is None else v.to(device) for v in operands]
    total, terms, logits, wrong, f, df, dz = forward(*operands, *weights.values())
    losses = torch.cat([total[None], terms])
    g, _, _, d1, _, w, b = operands
    slope = torch.tensor([slope], device=device)
    grads = backward(slope, g, d1, w, f, df, dz, weights["classifier_alpha"])
    grads = grads if b is not None else grads[:4]
    return {"losses": losses, "logits": logits, **dict(zip(GRADIENTS, grads, strict=False))}, wrong.cpu()


def afd_hold(draws, dtype, slope=0.7, weights=WEIGHTS, hard=False):
    """Compare the first draw with float64; returns the results and y'."""
    fused, wrong = afd_run(afd.afd_loss_fused, products.afd_gradients_fused, draws[0], slope, weights)
    exact = afd_exactly(draws[0], wrong, slope, *weights.values())

    def eager(operands):
        results, wrong = afd_run(afd.afd_loss_reference, products.afd_gradients_reference, operands, slope, weights)
        return off(results, afd_exactly(operands, wrong, slope, *weights.values()))

    hold(off(fused, exact), map(eager, [*draws, *beside(draws[0])]), None if hard else dtype)
    y, z = draws[0][2], exact["logits"].clone()
    z.scatter_(1, y[:, None], -torch.inf)
    assert (wrong != y).all() and wrong.dtype == torch.int64
    behind = z.amax(1) - z.gather(1, wrong[:, None])[:, 0]
    assert (behind <= 4 * EAGER[dtype] * exact["logits"].abs().amax(1)).all()  # another class only at a near tie
    return fused, wrong


def beside(operands) -> Iterator[list]:
    """Draws that are ill-conditioned where this one is: each of its numbers about a hundredth larger or smaller.

    Where softmax is near 1, its distance from 1 has few digits in any arithmetic. How few, only such draws tell: the
    one draw alone is a matter of luck, which differs between processors.
    """
    generator = seeded("beside")

    def moved(v):
        if v is None or not v.is_floating_point():
            return v
        factor = 1 + 1e-2 * torch.randn(v.shape, generator=generator, dtype=torch.float64)
        return (v.double() * factor.to(v.device)).to(v.dtype)

    for _ in range(4 * DRAWS):
        yield [moved(v) for v in operands]


def afd_draws(*shape_and_types, generator):
    return [afd_operands(*shape_and_types, generator) for _ in range(DRAWS)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("batch, width, classes", [*product(BATCHES, WIDTHS, CLASSES)])
def test_afd_loss(batch, width, classes, dtype):
    afd_hold(afd_draws(batch, width, classes, dtype, dtype, generator=seeded(batch, width, classes, dtype)), dtype)


@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
@pytest.mark.parametrize("batch, width, classes", [(7, 33, 10), (7, 512, 100), (20, 33, 200), (128, 96, 1000)])
def test_afd_loss_with_float32_parameters(batch, width, classes, dtype):
    draws = afd_draws(batch, width, classes, dtype, torch.float32, generator=seeded("mixed", batch, classes))
    for operands in draws:
        operands[3:] = [p.to(dtype).float() for p in operands[3:]]  # so that rounding them is not an error
    afd_hold(draws, dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("batch, width, classes", [(7, 33, 10), (1, 96, 200), (70, 40, 70), (70, 48, 40)])
def test_with_the_tiles_of_a_gpu(batch, width, classes, dtype):
    afd_hold(afd_draws(batch, width, classes, dtype, dtype, generator=seeded("tiles", batch, classes)), dtype)


HARD = ["zero features", "zero teacher", "one class", "no bias", "large logits", "all weights 0", "equal features"]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 200])
@pytest.mark.parametrize("case", HARD)
def test_afd_loss_on_hard_inputs(case, classes, dtype):
    g, t, y, d1, d2, w, b = afd_operands(20, 33, classes, dtype, dtype, seeded(case, classes))
    weights = WEIGHTS
    if case == "zero features":
        g[3], g[17] = 0, 0
    elif case == "zero teacher":
        t[0], t[19] = 0, 0
    elif case == "one class":
        y[:] = 1
    elif case == "no bias":
        b = None
    elif case == "large logits":  # +-1e4
        w, b = (8192 * w.sign()).to(dtype), b * 0
        g, d1, d2 = g / g.norm(dim=1, keepdim=True), torch.eye(33, dtype=dtype), torch.eye(33, dtype=dtype)
    elif case == "all weights 0":
        weights = dict.fromkeys(WEIGHTS, 0.0)
    elif case == "equal features":  # as at the start of training
        d1, d2 = torch.eye(33, dtype=dtype), torch.eye(33, dtype=dtype)
        t = g.clone()
    results, _ = afd_hold([[g, t, y, d1, d2, w, b]], dtype, weights=weights, hard=True)
    if case == "large logits":
        assert results["logits"].abs().max() > 5e3


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 200])
def test_ties_go_to_the_lowest_class(classes, dtype):
    g, t, y, d1, d2, w, b = afd_operands(20, 33, classes, dtype, dtype, seeded("ties", classes))
    # Every class has the same logit, of whole numbers: a product library may sum its columns in different orders.
    g, d1, d2, w[:], b[:] = g.sign(), torch.eye(33, dtype=dtype), torch.eye(33, dtype=dtype), w[0].sign(), b[0].sign()
    y[:10] = 0
    y[10:] = 3
    _, wrong = afd_hold([[g, t, y, d1, d2, w, b]], dtype, hard=True)
    assert wrong.tolist() == 10 * [1] + 10 * [0]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 200])
def test_operands_of_any_strides_and_addresses(classes, dtype):
    """The same bits as for contiguous operands, in results with the reference's layout."""
    whole = afd_operands(7, 48, classes, dtype, torch.float32, seeded("strided", classes))
    apart = [F.pad(v, (3, 2))[..., 3:-2] for v in whole]  # gaps between rows, and a start off 16 bytes
    apart[3] = whole[3].T.contiguous().T
    assert not apart[0].is_contiguous() and apart[0].data_ptr() % 16
    runs = []
    for operands in (whole, apart):
        operands = [v.to(DEVICE) for v in operands] if not INTERPRETED else operands
        results = afd.afd_loss_fused(*operands, *WEIGHTS.values())
        g, _, _, d1, _, w, _ = operands
        grads = products.afd_gradients_fused(torch.ones((), device=DEVICE), g, d1, w, *results[4:], 0.6)
        runs.append([*results, *grads, head.attack_head_fused(g, operands[2], w, operands[6])])
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    g, _, y, d1, _, w, b = whole
    results = afd.afd_loss_reference(*whole, *WEIGHTS.values())
    grads = products.afd_gradients_reference(torch.ones(()), g, d1, w, *results[4:], 0.6)
    for mine, theirs in zip(runs[0], [*results, *grads, head.attack_head_reference(g, y, w, b)], strict=True):
        assert (mine.dtype, mine.shape, mine.stride()) == (theirs.dtype, theirs.shape, theirs.stride())


def test_the_losses_add_up_in_a_fixed_order():
    """Two runs give the same bits, whichever program finishes last. Only a GPU has more than one order."""
    operands = afd_operands(128, 64, 10, torch.float16, torch.float16, seeded("order"))
    first, _ = afd_run(afd.afd_loss_fused, products.afd_gradients_fused, operands, 1.0, WEIGHTS)
    again, _ = afd_run(afd.afd_loss_fused, products.afd_gradients_fused, operands, 1.0, WEIGHTS)
    assert all(torch.equal(first[name], again[name]) for name in first)


# -- attack_head --------------------------------------------------------------------------------------------------


def head_exactly(a, y, w, b):
    before = a.double().requires_grad_()
    pooled = before.relu().mean((2, 3)) if a.ndim == 4 else before
    z = pooled @ w.double().T + b.double()
    return {"gradient": torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), before)[0]}


def head_hold(a, y, w, b, dtype, hard=False):
    if a.ndim == 4:
        a = a.contiguous(memory_format=torch.channels_last)
    fused = head.attack_head_fused(*(v.to(DEVICE) for v in (a, y, w, b)))
    assert fused.stride() == a.stride() and fused.dtype == dtype
    exact = head_exactly(a, y, w, b)
    eager = off({"gradient": head.attack_head_reference(a, y, w, b)}, exact)
    hold(off({"gradient": fused}, exact), [eager], None if hard else dtype)


def head_operands(shape, classes, dtype, generator):
    a = torch.randn(shape, generator=generator)
    w = torch.randn(classes, shape[1], generator=generator) / shape[1] ** 0.5
    b = torch.randn(classes, generator=generator)
    y = torch.randint(0, classes, shape[:1], generator=generator)
    return a.to(dtype), y, *(v.to(dtype).float() for v in (w, b))  # so that rounding them is not an error of eager


# A program is an image: to the interpreter a large batch is nothing but slow, so there it has two.
LARGE = [(128, 512, 10), (128, 33, 2)]
HEADS = [case for case in product(BATCHES, WIDTHS, CLASSES) if not INTERPRETED or case[0] < 128 or case in LARGE]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("batch, width, classes", HEADS)
def test_attack_head(batch, width, classes, dtype):
    generator = seeded("head", batch, width, classes, dtype)
    head_hold(*head_operands((batch, width, 2, 3), classes, dtype, generator), dtype)
    if batch == 7:
        head_hold(*head_operands((batch, width), classes, dtype, generator), dtype)  # the plain form


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (8, 8), (7, 5), (9, 9)])
def test_attack_head_with_the_tiles_of_a_gpu(size, dtype):
    a, y, w, b = head_operands((2, 130, *size), 10, dtype, seeded("head", size))
    head_hold(a, y, w, b, dtype)
    head_hold(a.relu(), y, w, b, dtype)  # the ReLU's output gives the same


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 1000])
def test_attack_head_on_hard_inputs(classes, dtype):
    a, y, w, b = head_operands((5, 33, 2, 2), classes, dtype, seeded("hard head"))
    head_hold(-a.abs(), y, w, b, dtype, hard=True)  # the ReLU is active nowhere
    head_hold(a, y * 0 + 1, w * 0, b * 0, dtype, hard=True)  # tied logits, one class
    large = a / a.relu().mean((2, 3), keepdim=True).norm(dim=1, keepdim=True)
    head_hold(large, y, 1e4 * w.sign(), b, dtype, hard=True)


# -- linf_step ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", TYPES, ids=str)
@pytest.mark.parametrize("slope", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (7, 3, 32, 32)])
def test_linf_step_is_the_reference_bit_for_bit(shape, slope, pixels):
    generator = seeded(shape, slope, pixels)
    x = torch.rand(shape, generator=generator).contiguous(memory_format=torch.channels_last)
    x.flatten()[:4] = torch.tensor([0.0, 1.0, 0.001, 0.999])
    x = x.to(pixels)
    x_adv = x + 0.1 * torch.randn(shape, generator=generator).to(pixels)  # outside the ball and [0,1], too
    grad = torch.randn(shape, generator=generator).to(slope)  # not channels_last
    grad[0, 0, 0, :3] = torch.tensor([0.0, float("nan"), float("inf")])
    x_adv[0, 0, 0, 3] = float("nan")
    expected, stepped = x_adv.clone(), x_adv.to(DEVICE, copy=True)
    linf.linf_step_reference(expected, grad, x, 8 / 255, 2 / 255)
    linf.linf_step_fused(stepped, grad.to(DEVICE), x.to(DEVICE), 8 / 255, 2 / 255)
    assert stepped.dtype == pixels and stepped.stride() == x_adv.stride()
    assert stepped[0, 0, 0, 3].isnan() and torch.equal(stepped.cpu().nan_to_num(-1), expected.nan_to_num(-1))
    if pixels == torch.float32:
        moved = expected.nan_to_num()
        assert (expected - x).nan_to_num().abs().max() <= 8 / 255 + 1e-7 and moved.min() >= 0 and moved.max() <= 1


def test_linf_step_of_a_view_with_gaps_touches_nothing_else():
    whole = torch.rand(4, 3, 8, 8, device=DEVICE)
    before, x = whole.clone(), torch.rand(2, 3, 8, 8, device=DEVICE)
    linf.linf_step_fused(whole[::2], torch.ones_like(x), x, 0.5, 0.1)
    assert torch.equal(whole[1::2], before[1::2])
    expected = (before[::2] + 0.1).clamp(x - 0.5, x + 0.5).clamp(0, 1)
    torch.testing.assert_close(whole[::2], expected)


# -- augment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 4, 8])
@pytest.mark.parametrize("shape", [(1, 8, 8), (7, 32, 32), (5, 9, 27), (2, 64, 64)])
def test_augment_is_the_reference_bit_for_bit(shape, padding):
    generator = seeded(shape, padding)
    x = torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8)
    offsets = torch.randint(0, 2 * padding + 1, (shape[0], 2), generator=generator)
    offsets[0] = torch.tensor([0, 2 * padding])
    flips = torch.rand(shape[0], generator=generator) < 0.5
    expected = crop.augment_reference(x, offsets, flips, padding)
    cropped = crop.augment_fused(x.to(DEVICE), offsets.to(DEVICE), flips.to(DEVICE), padding)
    assert torch.equal(cropped.cpu(), expected) and cropped.stride() == expected.stride()


# -- kl_loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 20.0, 1e4])
@pytest.mark.parametrize("batch, classes", [*product(BATCHES, (*CLASSES, 1000))])
def test_kl_loss(batch, classes, size, dtype):
    generator = seeded("kl", batch, classes, size)
    adversarial, natural = ((size * torch.randn(batch, classes, generator=generator)).to(dtype) for _ in range(2))
    slopes = torch.randn(batch, generator=generator)
    if batch > 1:
        natural[0] = adversarial[0]

    def run(rows, gradients, device):
        z = adversarial.to(device), natural.to(device)
        values = rows(*z)
        return {"rows": values, **dict(zip(("adversarial", "natural"), gradients(slopes.to(device), *z)))}

    z = [logits.double().requires_grad_() for logits in (adversarial, natural)]
    exact = F.kl_div(z[0].log_softmax(1), z[1].log_softmax(1), reduction="none", log_target=True).sum(1)
    of_adversarial, of_natural = torch.autograd.grad(exact, z, slopes.double())
    expected = {"rows": exact.detach(), "adversarial": of_adversarial, "natural": of_natural}
    fused = run(kl.kl_rows_fused, kl.kl_gradients_fused, DEVICE)
    eager = off(run(kl.kl_rows_reference, kl.kl_gradients_reference, "cpu"), expected)
    hold(off(fused, expected), [eager], dtype if size == 1 else None)
    z = adversarial.to(DEVICE), natural.to(DEVICE)
    one = kl.kl_gradients_fused(slopes[:1].to(DEVICE).expand(batch), *z)  # the mean's gradient comes like this
    assert torch.equal(one[0][0], fused["adversarial"][0])
