"""A copy of a network for the attack: cheap features in eval mode, and the gradient of the input alone.

Once a step the network's weights are written into the snapshot's tensors, in the attack's type and channels_last:

    convolution, BatchNorm       W' = W gamma / sqrt(var + eps),  shift = beta + (bias - mean) gamma / sqrt(var + eps)
    BatchNorm behind no convolution (pre-activation networks)    one scale and shift a channel
    D1, classifier               W·W_D1, so that PGD reads logits off the pooled features

torch.fx finds the pairs in any network that it can trace; a network that it cannot trace is copied in eval mode. The
shift is added in the network's type, usually fp32. No weight of a snapshot requires a gradient, so none is computed.

A forward may do in a trace something else than in a run, and a network may change what is no tensor. So the fast engine
compares the snapshot with the network itself (`fastafd.training.engine`).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastafd.attacks.folded import RELUS, Folded, join, ordinary
from fastafd.kernels import attack_head


class Snapshot(nn.Module):
    """A copy of `backbone` (pooled features) in eval mode, and of the logits of f1 if `classifier` (and `d1`) are
    passed.

    log_softmax: True if the network returns the log_softmax of its logits; then `logits` does so too.
    dtype: the type of weights and activations; float32 or wider keeps the network's type. reason: why the network could
    not be traced; None if it could. leaf: the type that the network casts images to first, or None. Images in that type
    give the same features, and the same gradient without its cast. The snapshot is empty until the first `refresh`.
    """

    d1: Tensor | None
    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        backbone: nn.Module,
        dtype: torch.dtype,
        classifier: nn.Linear | None = None,
        d1: nn.Linear | None = None,
        log_softmax: bool = False,
    ):
        super().__init__()
        self.log_softmax = log_softmax
        self.reason: str | None = None
        self.leaf: torch.dtype | None = None
        self.pools = False
        self._folds: list[tuple[nn.Conv2d, nn.BatchNorm2d | None, Folded]] = []
        self._affines: list[tuple[nn.BatchNorm2d, Affine]] = []
        self._copies: list[tuple[Tensor, nn.Module, str]] = []  # a tensor, and the live module and name of its source
        net = copy.deepcopy(backbone).eval().requires_grad_(False)
        try:
            self.net = self._fold(backbone, fx.GraphModule(net, _Tracer().trace(net)), dtype)
        except Exception as error:  # a forward may do anything with torch.fx's proxies
            self.reason = f"torch.fx cannot trace it: {(str(error) or type(error).__name__).splitlines()[0]}"
            self.net, self.leaf, self.pools, self._folds, self._affines = net, None, False, [], []
        live = sources_of(backbone)
        for name, (module, attribute) in sources_of(self.net).items():
            if name in live:  # the others are folded, or constants of the trace
                self._copies.append((getattr(module, attribute), *live[name]))

        self._heads: tuple[nn.Linear, nn.Linear | None] | None = None
        if classifier is not None:
            self._heads = classifier, d1
            wide = torch.promote_types(classifier.weight.dtype, torch.float32)
            self.register_buffer("d1", None if d1 is None else d1.weight.detach().clone())
            self.register_buffer("weight", classifier.weight.detach().to(wide, copy=True))
            bias = None if classifier.bias is None else classifier.bias.detach().to(wide, copy=True)
            self.register_buffer("bias", bias)

    def fits(self) -> bool:
        """False if the network now has a tensor of another shape or type, or none, where `refresh` reads one."""
        pairs = [(copied, getattr(module, name, None)) for copied, module, name in self._copies]
        norms = [norm for _, norm, _ in self._folds if norm is not None] + [norm for norm, _ in self._affines]
        if any(norm.running_mean is None or norm.running_var is None for norm in norms):
            return False
        for conv, _, folded in self._folds:
            if conv.weight.shape != folded.conv.weight.shape or conv.weight.dtype != folded.shift.dtype:
                return False
        if self._heads is not None:
            classifier, _ = self._heads
            if classifier.weight.shape != self.weight.shape or (classifier.bias is None) != (self.bias is None):
                return False
        return all(
            isinstance(live, Tensor) and live.shape == copied.shape and live.dtype == copied.dtype
            for copied, live in pairs
        )

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the network's current weights and statistics into the snapshot, in place."""
        for conv, norm, folded in self._folds:
            if norm is None:
                folded.conv.weight.copy_(conv.weight)
                if conv.bias is not None:
                    folded.shift.copy_(conv.bias)
            else:
                scale, shift = scale_and_shift(norm)
                folded.conv.weight.copy_(conv.weight * scale[:, None, None, None])
                folded.shift.copy_(shift if conv.bias is None else shift + conv.bias * scale)
            folded.prepare()
        for norm, affine in self._affines:
            scale, shift = scale_and_shift(norm)
            affine.scale.copy_(scale)
            affine.shift.copy_(shift)
        for copied, module, name in self._copies:
            copied.copy_(getattr(module, name))
        if self._heads is not None:
            classifier, d1 = self._heads
            if d1 is None or self.d1 is None:
                self.weight.copy_(classifier.weight)
            else:
                self.d1.copy_(d1.weight)
                self.weight.copy_(classifier.weight.to(self.weight.dtype) @ d1.weight.to(self.weight.dtype))
            if self.bias is not None:
                self.bias.copy_(classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """From images (B,3,H,W) in [0,1].

        The input of the last ReLU (B,D,h,w) if `pools`, else pooled features (B,D).
        """
        return self.net(x)

    def features(self, x: Tensor) -> Tensor:
        """The pooled features g(x) (B,D) of images (B,3,H,W)."""
        out = self(x)
        return out.relu().mean((2, 3)) if self.pools else out

    def logits(self, x: Tensor) -> Tensor:
        """What the network returns, (B,C), computed in fp32 or wider, for an attack with a gradient or target of its
        own.
        """
        features = self.features(x)
        with torch.autocast(features.device.type, enabled=False):
            logits = F.linear(features.to(self.weight.dtype), self.weight, self.bias)
            return logits.log_softmax(1) if self.log_softmax else logits

    def f1(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The features f1 (B,D) and their logits (B,C)."""
        features = self.features(x)
        logits = F.linear(features.to(self.weight.dtype), self.weight, self.bias)
        return features if self.d1 is None else F.linear(features, self.d1.to(features.dtype)), logits

    def gradient(self, x_adv: Tensor, target: Tensor) -> Tensor:
        """The gradient (B,3,H,W) of the summed cross-entropy of f1's logits at x_adv, which requires grad.

        target: labels (B,) int64, or weights of the classes (B,C), usually probabilities. PGD uses only the signs of
        the gradient.
        Source: Eq. 2 of the AFD paper.
        """
        before = self(x_adv)
        (grad,) = torch.autograd.grad(before, x_adv, self._slope(before.detach(), target))
        return grad

    def _slope(self, before: Tensor, target: Tensor) -> Tensor:
        """The gradient with respect to the result of `forward`."""
        if not target.is_floating_point():
            return attack_head(before, target, self.weight, self.bias)
        pooled = before.relu().mean((2, 3)) if self.pools else before
        with torch.autocast(before.device.type, enabled=False):
            logits = F.linear(pooled.to(self.weight.dtype), self.weight, self.bias)
            target = target.to(self.weight.dtype)
            away = target.sum(1, keepdim=True) * logits.softmax(1) - target
            slope = (away @ self.weight).to(before.dtype)
        if not self.pools:
            return slope
        return torch.where(before > 0, slope[:, :, None, None] / before.shape[2:].numel(), 0.0)

    def _fold(self, live: nn.Module, net: fx.GraphModule, dtype: torch.dtype) -> nn.Module:
        graph, modules = net.graph, dict(net.named_modules())
        sources = dict(live.named_modules())
        calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        read = [str(node.target) for node in graph.nodes if node.op == "get_attr"]

        def plain(node: fx.Node, kind: type[nn.Module]) -> bool:
            """True if the node calls exactly this class on one operand, and nothing else reads the module's tensors."""
            module = modules.get(str(node.target)) if node.op == "call_module" else None
            looked_at = any(name.startswith(f"{node.target}.") for name in read)
            return ordinary(module, kind) and len(node.args) == 1 and not (node.kwargs or looked_at)

        tail = _last_relu(graph, modules)
        if tail is not None:
            self.pools = True
            (activation,) = tail.all_input_nodes
            node = next(node for node in graph.nodes if node.op == "output")
            while node is not activation:
                (before,) = node.all_input_nodes
                graph.erase_node(node)
                node = before
            graph.output(activation)
        for node in list(graph.nodes):
            if not plain(node, nn.BatchNorm2d):
                continue
            norm, before = sources[node.target], node.args[0]
            assert isinstance(norm, nn.BatchNorm2d)
            if norm.running_mean is None:
                continue
            alone = plain(before, nn.Conv2d) and len(before.users) == 1 and calls[before.target] == 1
            if alone and calls[node.target] == 1:
                source = sources[before.target]
                assert isinstance(source, nn.Conv2d)
                folded = Folded(source, dtype)
                self._folds.append((source, norm, folded))
                net.set_submodule(before.target, folded)
                node.replace_all_uses_with(before)
                graph.erase_node(node)
            elif not isinstance(net.get_submodule(node.target), Affine):
                affine = Affine(norm)
                self._affines.append((norm, affine))
                net.set_submodule(node.target, affine)
        for node in graph.nodes:
            if plain(node, nn.Conv2d) and type(net.get_submodule(node.target)) is nn.Conv2d:
                source = sources[node.target]
                assert isinstance(source, nn.Conv2d)
                folded = Folded(source, dtype)
                self._folds.append((source, None, folded))
                net.set_submodule(node.target, folded)
        join(net)
        (images,) = (node for node in graph.nodes if node.op == "placeholder")
        if len(images.users) == 1:
            (first,) = images.users
            if first.op == "call_module" and isinstance(stem := net.get_submodule(first.target), Folded):
                self.leaf = stem.conv.weight.dtype
        net.delete_all_unused_submodules()
        net.recompile()
        return net


class _Tracer(fx.Tracer):
    """A tracer that calls the network as its user does: with images alone, and with hooks.

    What a forward computes from buffers alone is part of the graph, too.
    """

    proxy_buffer_attributes = True

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        return super().create_args_for_root(lambda net, x: net(x), is_module, concrete_args)


def sources_of(net: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where the network keeps its tensors, under all names: parameters, buffers and tensors that are attributes."""
    return {
        f"{path}.{name}".lstrip("."): (module, name)
        for path, module in net.named_modules(remove_duplicate=False)
        for name, value in [*vars(module).items(), *module._parameters.items(), *module._buffers.items()]
        if isinstance(value, Tensor)
    }


class Affine(nn.Module):
    """A BatchNorm with fixed statistics: a scale and a shift for each channel, in the network's type."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        assert norm.running_mean is not None
        self.register_buffer("scale", torch.ones_like(norm.running_mean))
        self.register_buffer("shift", torch.zeros_like(norm.running_mean))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale[:, None, None] + self.shift[:, None, None]).to(x.dtype)


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The a and b (C,) of a BatchNorm in eval mode, which computes a x + b."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def _last_relu(graph: fx.Graph, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The ReLU whose global average pool is the graph's output; None if the graph ends differently."""
    outputs = next(node for node in graph.nodes if node.op == "output").all_input_nodes
    if len(outputs) != 1:
        return None
    node, pooled = outputs[0], False
    while len(node.users) == 1 and node.op.startswith("call") and len(node.all_input_nodes) == 1:
        kind: Any = node.target
        if node.op == "call_module":
            kind = type(modules[node.target])
            if not ordinary(modules[node.target], kind):
                return None
        if _pools(node, modules):
            pooled = True
        elif pooled and kind in RELUS:
            return node
        elif kind not in (nn.Identity, nn.Dropout, nn.Flatten, torch.flatten, "flatten"):
            return None
        (node,) = node.all_input_nodes
    return None


def _pools(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """True if the node is a global average pool."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1))
    if node.target is F.adaptive_avg_pool2d:
        return node.args[1:] in ((1,), ((1, 1),))
    if node.target in ("mean", torch.mean):
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        return isinstance(dims, (tuple, list)) and {d % 4 for d in dims if isinstance(d, int)} == {2, 3}
    return False
