"""The operations in PyTorch: registration, compilation without breaks, one derivative, checks of operands."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from fastafd.kernels import afd_loss, attack_head, augment, kl_loss, linf_step
from fastafd.kernels.operation import OPERATIONS, references

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OPS = torch.ops.fastafd


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def operands(device, dtype=torch.float32, batch=6, width=48, classes=10, bias=True):
    """Features, teacher's features, labels, D1, D2, W, b; the trained ones require gradients."""
    torch.manual_seed(0)
    g, t = (torch.randn(batch, width, dtype=dtype, device=device) for _ in range(2))
    d1, d2 = (torch.eye(width, dtype=dtype, device=device) + 0.1 * torch.randn_like(g[:1]) for _ in range(2))
    w, b = torch.randn(classes, width, dtype=dtype, device=device), torch.randn(classes, dtype=dtype, device=device)
    y = torch.randint(0, classes, (batch,), device=device)
    leaves = [v.requires_grad_() for v in (g, d1, d2, w, b)]
    return leaves[0], t, y, *leaves[1:4], leaves[4] if bias else None


def images(device, batch=4):
    torch.manual_seed(0)
    x = torch.randint(0, 256, (batch, 8, 8, 3), dtype=torch.uint8, device=device)
    return x, torch.randint(0, 9, (batch, 2), device=device), torch.rand(batch, device=device) < 0.5


def pixels(device):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    return (x + 0.1).contiguous(memory_format=torch.channels_last), torch.randn_like(x).bfloat16(), x


@pytest.mark.parametrize("classes", [10, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_opcheck_afd_loss(dtype, classes, device):
    for bias in (True, False):
        held = operands(device, dtype, classes=classes, bias=bias)
        opcheck(OPS.afd_loss, (*held, 0.3, 0.7, 2.0, 0.1))
    *_, f, df, dz = OPS.afd_loss(*held, 0.3, 0.7, 2.0, 0.1)
    g, d1, w = held[0].detach(), held[3].detach(), held[5].detach()
    slope = torch.ones((), device=device, dtype=torch.promote_types(dtype, torch.float32))
    opcheck(OPS.afd_gradients, (slope, g, d1, w, f.detach(), df.detach(), dz.detach(), 0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_opcheck_of_the_others(dtype, device):
    g, _, y, _, _, w, b = (v.detach() for v in operands(device, dtype))
    slope = torch.ones(6, device=device, dtype=torch.promote_types(dtype, torch.float32))
    opcheck(OPS.attack_head, (g, y, w.to(slope.dtype), b.to(slope.dtype)))
    activation = torch.randn(6, 48, 4, 4, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    for a in (activation, activation.contiguous()):
        opcheck(OPS.attack_head, (a, y, w.to(slope.dtype), None))
    z = [torch.randn(6, 10, device=device, dtype=dtype, requires_grad=True) for _ in range(2)]
    opcheck(OPS.kl_rows, tuple(z))
    opcheck(OPS.kl_gradients, (slope, *(v.detach() for v in z)))
    opcheck(OPS.linf_step, (*pixels(device), 0.1, 0.02))
    opcheck(OPS.augment, (*images(device), 4))


def everything(device):
    """A function that calls every operation, and its operands."""
    g, t, y, d1, d2, w, b = operands(device)
    x, offsets, flips = images(device)
    x_adv, grad, x_float = pixels(device)
    activation = torch.randn(6, 48, 4, 4, device=device).contiguous(memory_format=torch.channels_last)

    def call(g, d1, d2, w, b, x_adv):
        out = afd_loss(g, t, y, d1, d2, w, b, classifier_alpha=0.1)
        loss = out.total + kl_loss(g @ w.T, t @ w.T)
        grads = torch.autograd.grad(loss, (g, d1, d2, w, b))
        head = attack_head(activation, y, w @ d1, b)
        linf_step(x_adv, grad, x_float, 0.1, 0.02)
        return [
            loss.detach(),
            *grads,
            out.logits,
            out.wrong_labels,
            *out.terms.values(),
            head,
            augment(x, offsets, flips, 4),
        ]

    return call, (g, d1, d2, w, b, x_adv)


def test_whole_graphs_of_every_operation(device):
    """torch.compile(fullgraph=True) has no graph break and gives the same results."""
    call, inputs = everything(device)
    *leaves, x_adv = inputs
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(call, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
        moved = x_adv.clone()
        got = compiled(*leaves, moved)
    for a, b in zip(got, call(*inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert a.stride() == b.stride()
    assert torch.equal(moved, x_adv)


def test_compiled_whole_by_inductor_on_a_cpu():
    g, t, y, d1, d2, w, b = operands("cpu")
    step = torch.compile(lambda *v: afd_loss(v[0], t, y, *v[1:]).total, fullgraph=True)
    leaves = (g, d1, d2, w, b)
    got = torch.autograd.grad(step(*leaves), leaves)
    for a, e in zip(got, torch.autograd.grad(afd_loss(g, t, y, d1, d2, w, b).total, leaves), strict=True):
        torch.testing.assert_close(a, e)


def test_first_derivatives_are_exact(device):
    g, t, y, d1, d2, w, b = operands(device, torch.float64, batch=3, width=5, classes=4)
    z = [torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(kl_loss, z)
    # L2 and L1 stop gradients, which finite differences do not see: without them every leaf but D2 can be checked
    assert torch.autograd.gradcheck(
        lambda g, d1, w, b: afd_loss(g, t, y, d1, d2.detach(), w, b, 0.0, 0.0, 3.0).total, (g, d1, w, b)
    )
    assert torch.autograd.gradcheck(
        lambda d2: afd_loss(g.detach(), t, y, d1.detach(), d2, w.detach(), b.detach(), 0.6, 0.0, 3.0).total, (d2,)
    )


@pytest.mark.parametrize("name", ["afd_loss", "kl_loss"])
def test_a_second_derivative_is_an_error_and_not_zero(name, device):
    g, t, y, d1, d2, w, b = operands(device)
    loss = afd_loss(g, t, y, d1, d2, w, b).total if name == "afd_loss" else kl_loss(g, t)
    (first,) = torch.autograd.grad(loss, g, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
        first.sum().backward()


class Launches(torch.utils._python_dispatch.TorchDispatchMode):
    """The operations that run, without views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, operands=(), named=None):
        if not function.is_view:
            self.names.append(function.name())
        return function(*operands, **(named or {}))


@pytest.mark.parametrize("bias", [True, False])
def test_nothing_runs_beside_the_operations(bias):
    """There are no casts, fills or copies around the two calls, which are three launches on a GPU."""
    g, t, y, d1, d2, w, b = operands("cpu", bias=bias)
    slope, low = torch.ones(()), g.detach().half()
    with Launches() as launches:
        out = afd_loss(g, t, y, d1, d2, w, b)
        torch.autograd.grad(out.total, (g, d1, d2, w), slope)
        attack_head(low, y, w, b)
    names = [name for name in launches.names if name not in ("aten::detach", "aten::promote_types")]
    assert names == ["fastafd::afd_loss", "fastafd::afd_gradients", "fastafd::attack_head"]


def test_what_comes_beside_the_total_passes_no_gradient(device):
    g, t, y, d1, d2, w, b = operands(device)
    out = afd_loss(g, t, y, d1, d2, w, b)
    assert out.total.requires_grad and not out.logits.requires_grad
    assert not any(term.requires_grad for term in out.terms.values())
    assert not attack_head(g, y, w, b).requires_grad


def test_slope_of_the_total_is_honoured(device):
    g, t, y, d1, d2, w, b = operands(device)
    leaves = (g, d1, d2, w, b)
    once = torch.autograd.grad(afd_loss(g, t, y, d1, d2, w, b).total, leaves)
    scaled = torch.autograd.grad(-3 * afd_loss(g, t, y, d1, d2, w, b).total.square(), leaves)
    total = float(afd_loss(g, t, y, d1, d2, w, b).total.detach())
    for a, e in zip(scaled, once, strict=True):
        torch.testing.assert_close(a, -6 * total * e, rtol=1e-5, atol=1e-6)


def test_attack_head_is_the_gradient_that_pgd_needs(device):
    """Used instead of the loss: the grad_outputs of the last ReLU's input."""
    _, _, y, _, _, w, b = (v.detach() for v in operands(device))
    conv = torch.nn.Conv2d(3, 48, 3, padding=1).to(device)
    x = torch.rand(6, 3, 4, 4, device=device, requires_grad=True)
    logits = F.linear(conv(x).relu().mean((2, 3)), w, b)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x)
    before = conv(x)
    (got,) = torch.autograd.grad(before, x, attack_head(before, y, w, b))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x: attack_head(x[0], x[2][:1], x[5], x[6]), "labels is"),
        (lambda x: attack_head(x[0][0], x[2], x[5], x[6]), "activation is"),
        (lambda x: attack_head(x[0], x[2].int(), x[5], x[6]), "int64"),
        (lambda x: attack_head(x[0], x[2], x[5][:, :5], x[6]), "weight is"),
        (lambda x: kl_loss(x[0], x[1][:, :3]), "one shape"),
        (lambda x: kl_loss(x[0], x[1].double()), "one floating-point type"),
        (lambda x: linf_step(x[0], x[1][:3], x[1], 0.1, 0.1), "x_adv, grad and x are"),
        (lambda x: linf_step(x[0].detach(), x[1], x[1].double(), 0.1, 0.1), "take one type"),
        (lambda x: linf_step(x[2], x[2], x[2], 0.1, 0.1), "floating-point"),
        (lambda x: augment(x[0], x[2], x[2], 4), "x is torch.float32"),
        (lambda x: augment(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), x[2], x[2], 4), "offsets is"),
        (lambda x: afd_loss(x[0].half(), x[1], x[2], x[3].bfloat16(), *x[4:]), "d1_weight is torch.bfloat16"),
        (lambda x: afd_loss(x[0][:0], x[1][:0], x[2][:0], *x[3:]), "empty batch"),
        (lambda x: afd_loss(x[0], x[1], x[2].int(), *x[3:]), "labels is torch.int32"),
    ],
)
def test_what_does_not_fit_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(operands("cpu"))


class OnCuda(torch.Tensor):
    """A CPU tensor whose is_cuda is True."""

    is_cuda = True


def test_without_triton_the_references_run_on_any_device():
    """Without Triton everything can be imported, and CUDA tensors get the references."""
    code = """
import sys
sys.modules["triton"] = None
import torch, fastafd.kernels
from fastafd.kernels.operation import OPERATIONS
class OnCuda(torch.Tensor):
    is_cuda = True
assert not any(operation.is_fused((torch.zeros(1).as_subclass(OnCuda),)) for operation in OPERATIONS.values())
x = torch.rand(2, 3, 4, 4)
fastafd.kernels.linf_step(x, torch.ones_like(x), x.clone(), 0.1, 0.1)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_which_operands_the_kernels_compute(name):
    """Kernels run on CUDA except for float64, and never inside `references()`, in other threads too."""
    operation, cuda = OPERATIONS[name], torch.zeros(1).as_subclass(OnCuda)
    assert operation.is_fused((cuda, None, 0.1)) and not operation.is_fused((torch.zeros(1), None, 0.1))
    assert not operation.is_fused((cuda, cuda.double()))
    with references():
        with ThreadPoolExecutor(1) as thread:
            assert not thread.submit(operation.is_fused, (cuda,)).result()
        with references():
            pass
        assert not operation.is_fused((cuda,))
    assert operation.is_fused((cuda,))
    with pytest.raises(ValueError), references():
        raise ValueError
    assert operation.is_fused((cuda,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [10, 200])
def test_no_operation_waits_for_the_device_and_all_can_be_captured(classes, dtype):
    g, t, y, d1, d2, w, b = operands("cuda", classes=classes)
    low, teacher = g.detach().to(dtype).requires_grad_(), t.to(dtype)
    x, offsets, flips = images("cuda")
    x_adv, grad, x_float = pixels("cuda")
    start = x_adv.clone()
    activation = torch.randn(6, 48, 4, 4, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)

    def call():
        out = afd_loss(low, teacher, y, d1, d2, w, b)
        grads = torch.autograd.grad(out.total, (low, d1, d2, w, b))
        z = F.linear(low.detach(), w.detach().to(dtype)).requires_grad_()
        of_kl = torch.autograd.grad(kl_loss(z, z.detach().flip(0)), z)
        linf_step(x_adv, grad, x_float, 0.1, 0.02)
        head = attack_head(activation, y, w, b)
        return [out.total, *grads, *of_kl, head, augment(x, offsets, flips, 4), x_adv.clone()]

    call()  # compiles
    x_adv.copy_(start)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):  # the count of the row kernel starts anew every time
        x_adv.copy_(start)
        graph.replay()
    torch.cuda.synchronize()
    for a, e in zip(captured, expected, strict=True):
        assert torch.equal(a, e)
