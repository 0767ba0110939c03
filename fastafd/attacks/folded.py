"""A convolution of the snapshot with the shift of its BatchNorm, and with the residual sum and the ReLU behind it."""

from __future__ import annotations

import copy
import operator
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastafd.attacks.arms import ARMS, Form, joined, site_of

RELUS = (nn.ReLU, F.relu, torch.relu, "relu", F.relu_, torch.relu_, "relu_")
SUMS = (operator.add, torch.add, "add")
SUMS_IN_PLACE = (operator.iadd, "add_")


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def ordinary(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """True if the module is of this class, not of a subclass, without hooks and with the class's forward."""
    if module is None or type(module) is not kind or "forward" in vars(module):
        return False
    return not any(getattr(module, hooks) for hooks in HOOKS)


class Folded(nn.Module):
    """A convolution in the snapshot's type, and the shift of the BatchNorm behind it in the network's type.

    relu: True if a ReLU is part of it. forms: its form (`fastafd.attacks.arms`) by the shape of its input; all other
    shapes have the plain form.
    """

    shift: Tensor

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype):
        super().__init__()
        wide = conv.weight.dtype
        self.conv = copy.deepcopy(conv).requires_grad_(False)
        self.conv.bias = None
        narrow = dtype if dtype.itemsize < wide.itemsize else wide
        self.conv.to(dtype=narrow).to(memory_format=torch.channels_last)
        self.register_buffer("shift", torch.zeros(conv.out_channels, dtype=wide, device=conv.weight.device))
        self.relu = False
        self.forms: dict[tuple[int, ...], Form] = {}
        self.counts: dict[str, int] = {}  # the number of tensors that each arm prepares

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = x.to(self.conv.weight.dtype)
        form = self.forms.get(tuple(x.shape), ())
        if form:
            site = site_of(self.conv, self.relu)
            assert site is not None
            prepared = [self._prepared(name) for name in form]
            return joined(x, residual, self.conv.weight, self.shift, site, form, prepared)
        out = self.conv(x)
        out = (out + self.shift[:, None, None]).to(out.dtype)
        out = out if residual is None else out + residual
        return out.relu() if self.relu else out

    def take(self, shape: tuple[int, ...], form: Form) -> None:
        """Use the form for inputs of this shape from now on."""
        self.forms[shape] = form
        site = site_of(self.conv, self.relu)
        for name in form:
            if name not in self.counts:
                assert site is not None
                tensors = ARMS[name].prepare(self.conv.weight, self.shift, site)
                self.counts[name] = len(tensors)
                for index, tensor in enumerate(tensors):
                    self.register_buffer(f"{name}_{index}", tensor.clone(memory_format=torch.preserve_format))

    def prepare(self) -> None:
        """Compute the prepared tensors of the forms from the current weight, in place; called once a step."""
        site = site_of(self.conv, self.relu) if self.counts else None
        if site is not None:
            for name in self.counts:
                tensors = ARMS[name].prepare(self.conv.weight, self.shift, site)
                for buffer, tensor in zip(self._prepared(name), tensors, strict=True):
                    buffer.copy_(tensor)

    def _prepared(self, name: str) -> list[Tensor]:
        return [getattr(self, f"{name}_{index}") for index in range(self.counts[name])]


def join(net: fx.GraphModule) -> None:
    """Make the residual sum and the ReLU behind a `Folded` part of it, if nothing else reads the values between them.

    The arithmetic does not change. The convolution moves to the place of the sum. Its input is still unchanged there:
    the gradient of a weight would need it too.
    """
    graph, modules = net.graph, dict(net.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in list(graph.nodes):
        folded = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(folded, Folded) or calls[node.target] > 1 or len(node.users) != 1:
            continue
        (x,), (after,) = node.args, node.users
        residual = _added(after, node)
        last = after if residual is None else _only_user(after)
        if last is None or not _is_relu(last, modules):
            continue
        if residual is x:
            continue  # PyTorch 2.14 compiles no autograd.Function that takes a tensor twice
        with graph.inserting_before(node if residual is None else after):
            whole = graph.call_module(node.target, (x,) if residual is None else (x, residual))
        last.replace_all_uses_with(whole)
        for gone in dict.fromkeys((last, after, node)):
            graph.erase_node(gone)
        folded.relu = True


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _added(after: fx.Node, node: fx.Node) -> fx.Node | None:
    """The other operand if `after` is the sum of the node and another tensor, else None."""
    if after.kwargs or len(after.args) != 2 or after.op not in ("call_function", "call_method"):
        return None
    first, second = after.args
    if after.target in SUMS_IN_PLACE and first is not node:
        return None
    other = second if first is node else first
    named = after.target in (*SUMS, *SUMS_IN_PLACE)
    return other if named and isinstance(other, fx.Node) and other is not node else None


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return ordinary(modules[str(node.target)], nn.ReLU)
    return node.op in ("call_function", "call_method") and node.target in RELUS
