"""Records every launch of a step on fake CUDA tensors; nothing is launched."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from benchmarks.launches import Launch, Operand
from fastafd.kernels.operation import OPERATIONS

ALLOCATIONS = re.compile(r"aten\.(empty|new_empty|_unsafe_view|detach)")  # operations besides views that launch nothing
PRODUCTS = re.compile(r"aten\.(addmm|mm|bmm|baddbmm)")


def operand(tensor: Tensor) -> Operand:
    return Operand(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.untyped_storage()._cdata)


def operands(values: Any) -> list[Operand]:
    return [operand(leaf) for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Recorder(FakeTensorMode):
    """Fake tensors whose launches are recorded in `launches` while `on` is True, each with its `part` of the step.

    `sources`: of every Triton kernel that Inductor made, by its name, which holds a hash of it. RuntimeError where the
    launcher of an operation of fastafd returns other shapes, strides or types than its fake kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.sources: dict[str, str] = {}
        self.part, self.on, self.inside = "", False, 0

    def __deepcopy__(self, memo: Any) -> Recorder:
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        self.inside += 1  # calls inside a fake kernel are not launches
        try:
            fused_sgd = func.name().startswith("aten::_fused_sgd_")  # it has no fake kernel and returns nothing
            out = None if fused_sgd else super().__torch_dispatch__(func, types, args, named)
        finally:
            self.inside -= 1
        if self.on and not self.inside and launches(func):
            self.note(func, args, named, out)
        return out

    def note(self, func: Any, args: Any, named: Any, out: Any) -> None:
        """Record the launches of an operation's call."""
        name = str(func)
        if "convolution" in name or name.startswith("fastafd.conv_relu"):
            self.launches += convolutions(self.part, name, args, out)
            return
        reads, writes = accesses(func, args, named, out)
        if name.startswith("fastafd."):
            count = self.launched(func, args, out)
            self.launches.append(Launch(self.part, "own", name, reads, writes, own_flops(name, args), count))
        elif PRODUCTS.match(name):
            first, second = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)][-2:]
            flops = 2 * first.numel() * second.shape[-1]
            self.launches.append(Launch(self.part, "product", name, reads, writes, flops))
        else:
            self.launches.append(Launch(self.part, "other", name, reads, writes))

    def launched(self, func: Any, args: Any, out: Any) -> int:
        """The number of kernels that the launcher of an operation launches.

        Its library calls are recorded separately.
        """
        if any(leaf.dtype == torch.float64 for leaf in tree_leaves(args) if isinstance(leaf, Tensor)):
            return 1  # the reference runs instead; count it as one launch
        counted: list[Any] = []
        with self, kernels_noted(counted):
            returned = launcher(func)(*args)
        if (theirs := facts(returned)) != (ours := facts(out)):
            raise RuntimeError(f"{func}: the launcher returns {theirs}, the fake kernel {ours}")
        return len(counted)

    def triton(self, compiler: Any, name: str, source: str, device_str: str = "cuda") -> Any:
        """A stand-in for `AsyncCompile.triton`: it records the kernel of Inductor and does not compile it."""
        label = f"{name}_{sha256(source.encode()).hexdigest()[:6]}"
        self.sources[label] = source
        signature = re.search(r"'signature': (\{.*?\})", source)
        assert signature is not None
        names = list(eval(signature[1]))

        def run(*values: Any, **named: Any) -> None:
            if not self.on:
                return
            reads, writes = [], []
            for argument, value in zip(names, values):
                if isinstance(value, Tensor):
                    if not argument.startswith("out_ptr"):
                        reads.append(operand(value))
                    if not argument.startswith("in_ptr"):  # also in_out_ptr and workspaces
                        writes.append(operand(value))
            self.launches.append(Launch(self.part, "Triton", label, reads, writes))

        return type("Noted", (), {"run": staticmethod(run)})

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Launches inside this block belong to that part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def tagged(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose launches belong to that part."""

        def run(*args: Any, **named: Any) -> Any:
            with self.of(part):
                return function(*args, **named)

        return run

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside this block, Inductor's kernels come here; they are generated again even if a cache has them."""
        fresh = torch._inductor.config.patch(compile_threads=1, force_disable_caches=True)
        noted = mock.patch.object(AsyncCompile, "triton", lambda *of, **named: self.triton(*of, **named))
        with self, fresh, noted, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
            yield


def launches(func: Any) -> bool:
    """True if an operation launches a kernel; False for views and allocations."""
    name = str(func)
    returns = func._schema.returns
    view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return not (view or ALLOCATIONS.match(name) or name.startswith(("prim", "profiler", "aten.promote")))


def accesses(func: Any, args: Any, named: Any, out: Any) -> tuple[list[Operand], list[Operand]]:
    """The tensors that an operation reads and writes, from its schema."""
    schema, reads, writes = func._schema, [], []
    values = dict(zip((a.name for a in schema.arguments), args)) | named
    overwrites = schema.name.split("::")[1] in ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_")
    for argument in schema.arguments:
        of = operands(values.get(argument.name))
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and argument.name != "grads":  # fused SGD writes gradients only with a loss scale
            writes += of
        if not (written and (overwrites or argument.name == "out")):
            reads += of
    if not any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments):
        writes += operands(out)
    return reads, writes


def convolutions(part: str, name: str, args: Any, out: Any) -> list[Launch]:
    """The launches of a convolution, or one launch for each of its gradients."""
    if "backward" not in name:
        weight, residual = args[1], args[3] if "conv_relu" in name else None
        flops = 2 * out.shape[0] * out[0, 0].numel() * weight.numel()
        return [Launch(part, "convolution", name, operands((*args[:3], residual)), operands(out), flops)]
    grad, x, weight = args[:3]
    flops = 2 * grad.shape[0] * grad[0, 0].numel() * weight.numel()
    launches = []
    for kind, reads, written in (("dgrad", (grad, weight), out[0]), ("wgrad", (grad, x), out[1])):
        if written is not None:
            launches.append(Launch(part, kind, name, operands(reads), operands(written), flops))
    if out[2] is not None:
        launches.append(Launch(part, "other", name, operands(grad), operands(out[2])))
    return launches


def own_flops(name: str, args: Any) -> int:
    """The FLOPs of the products inside an operation of fastafd: D1, D2, and the classifier on both features."""
    if "afd_loss" in name:
        (batch, width), classes = args[0].shape, len(args[5])
        return 2 * 2 * batch * width * (width + 2 * classes)
    if "afd_gradients" in name:
        batch, width = args[1].shape
        return 3 * 2 * batch * width**2
    return 0


def launcher(func: Any) -> Callable[..., Any]:
    """The function that launches the kernels of an operation of fastafd."""
    return OPERATIONS[func._schema.name.split("::")[1]].fused


@contextmanager
def kernels_noted(counted: list[Any]) -> Iterator[None]:
    """Inside this block, a launch of a Triton kernel is noted and does not take place."""
    from triton import KernelInterface

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *values, **options: counted.append(kernel)

    with mock.patch.object(KernelInterface, "__getitem__", launch):
        yield


def facts(returned: Any) -> list[tuple[Any, ...]]:
    """The shape, strides, type and device of every tensor."""
    tensors = [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]
    return [(tuple(t.shape), t.stride(), t.dtype, t.device.type) for t in tensors]
