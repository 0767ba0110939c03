"""Which nn.Linear computes a network's logits. The forward pass decides, not the order in which layers are registered.

The layer's output must be the network's output. Only log_softmax may stand behind it, since it changes neither the
cross-entropy, nor a divergence, nor the predicted class.

torch.fx traces the forward, in eval mode and in train mode. Where it cannot trace, a run on example images decides.
Without such images the last registered nn.Linear is taken. A forward may tell a trace from a run, so `check_split`
compares both networks on images in any case: on the example images, or at the first batch.
"""

from __future__ import annotations

import copy
import dis
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

WRAPPERS = {  # classes of PyTorch, and the attribute of each that holds the network
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "OptimizedModule": "_orig_mod",  # of torch.compile
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class LogitsLayer(NamedTuple):
    """The name of the nn.Linear; whether log_softmax is behind it."""

    name: str
    log_softmax: bool


def unwrapped(net: nn.Module, name: str = "") -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel, AveragedModel or torch.compile.

    name: what the network is called in another one. Raises ValueError for a wrapper that cannot be taken off.
    """
    shown = f"{name} ({type(net).__name__})" if name else type(net).__name__
    kinds: dict[str, Any] = {kind.__name__: kind for kind in type(net).__mro__ if kind.__module__.startswith("torch.")}
    for kind, attribute in WRAPPERS.items():
        if kind in kinds:
            own = type(net).forward is not kinds[kind].forward or type(net).__call__ is not kinds[kind].__call__
            if own or ("forward" in vars(net) and kind != "OptimizedModule"):
                raise ValueError(f"{shown} has a forward of its own around its {attribute}; write it into the network")
            if any(getattr(net, hooks) for hooks in HOOKS):
                raise ValueError(f"{shown} has hooks, which are lost with it; register them on its {attribute}")
            return unwrapped(getattr(net, attribute), name)
    if isinstance(net, torch.jit.ScriptModule):
        raise ValueError(f"{shown} is a compiled script; take the nn.Module that it was made from")
    if "FullyShardedDataParallel" in kinds or any(hasattr(p, "placements") for p in net.parameters()):
        raise ValueError(f"{shown} has sharded weights; take the network before it is sharded")
    return net


def copied(net: nn.Module) -> nn.Module:
    """A copy of the network without wrappers, at any depth. It has its own weights, which are no inference tensors.

    Raises ValueError if the network cannot be copied or unwrapped.
    """
    source = unwrapped(net)
    try:
        with torch.inference_mode(False):
            net = copy.deepcopy(source)
    except (RuntimeError, TypeError) as error:
        results = [
            f"{path}.{name}".lstrip(".")
            for path, module in net.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, Tensor) and not value.is_leaf
        ]
        what = f"{' and '.join(results)} is a result with a history, as of weight_norm" if results else str(error)
        raise ValueError(f"{type(net).__name__} cannot be copied: {what.splitlines()[0]}") from error
    for name, module in list(net.named_modules()):
        module._compiled_call_impl = None  # of net.compile()
        if name and (inner := unwrapped(module, name)) is not module:
            net.set_submodule(name, inner)
    check_copy(net, source)
    return net


def check_copy(net: nn.Module, source: nn.Module) -> None:
    """Raise ValueError if a function that the copy keeps would use the network that it was copied from."""
    kind = type(net).__name__
    if type(net).__call__ is not nn.Module.__call__ and not isinstance(net, fx.GraphModule):
        raise ValueError(f"{kind} has a __call__ of its own; pass nn.Sequential(net), or write it into the forward")
    theirs = {id(tensor): f"its {name}" for name, tensor in [*source.named_parameters(), *source.named_buffers()]}
    theirs |= {id(module): f"its {name}" if name else "the network" for name, module in source.named_modules()}
    for path, module in net.named_modules():
        where = f"{path} ({type(module).__name__})" if path else "the network itself"
        if "forward" in vars(module):
            raise ValueError(f"{kind} cannot be copied: the forward of {where} was replaced; use a subclass instead")
        held = [theirs[id(value)] for value in _held(vars(module), set()) if id(value) in theirs]
        if held:
            raise ValueError(
                f"{kind} cannot be copied: a function kept in {where}, such as a hook, reads {held[0]}, and would read"
                " that of the original; let it read its arguments instead"
            )


def _held(value: Any, seen: set[int]) -> Iterator[nn.Module | Tensor]:
    """The modules and tensors in a container, and those that its functions use from outside."""
    if id(value) in seen:
        return
    seen.add(id(value))
    inner: list[Any] = []
    if isinstance(value, (nn.Module, Tensor)):
        yield value
    elif isinstance(value, FunctionType):
        used = {step.argval for step in dis.get_instructions(value) if step.opname == "LOAD_GLOBAL"}
        shared = [value.__globals__[name] for name in used & value.__globals__.keys()]
        inner += [item for item in shared if isinstance(item, (nn.Module, Tensor))]
        inner += [*gc.get_referents(*(value.__closure__ or ())), value.__defaults__, value.__kwdefaults__]
    elif isinstance(value, MethodType):
        inner += [value.__self__, value.__func__]
    elif isinstance(value, (dict, list, tuple)):
        inner += value.values() if isinstance(value, dict) else value
    for item in inner:
        yield from _held(item, seen)


def find_logits_layer(net: nn.Module, name: str | None = None, example: Tensor | None = None) -> LogitsLayer:
    """The one nn.Linear whose output is the network's output.

    name: the layer that the user names; it is checked as any other. example: images (B,3,H,W) to run the network on.
    Raises ValueError, which names the layer and the reason, if there is no such layer.
    """
    layers = dict(net.named_modules())
    if name is not None and not isinstance(layers.get(name), nn.Linear):
        linears = ", ".join(key for key, layer in layers.items() if isinstance(layer, nn.Linear)) or "none"
        got = f"a {type(layers[name]).__name__}" if name in layers else "no layer of that name"
        raise ValueError(f"classifier: {name!r} is {got}; the nn.Linear layers of {type(net).__name__}: {linears}")
    traces = {training: trace(net, training) for training in (False, True)}
    results = [traced_layer(net, graph, training) for training, graph in traces.items() if graph is not None]
    if len(results) < 2 and example is not None:
        results = [layer_by_run(net, example, training) for training in (False, True)]
    if not results:
        results = [LogitsLayer(name or last_linear(net), False)]
    layer = results[0]
    if any(result != layer for result in results):
        raise refusal(net, f"{layer.name} computes its output in eval mode, {results[1].name} in train mode")
    if name is not None and layer.name != name:
        raise refusal(net, f"{layer.name} computes its output, not {name}")
    check_layer(net, layer.name)
    return layer


def refusal(net: nn.Module, reason: str) -> ValueError:
    """The error for a network that cannot be split."""
    return ValueError(
        f"{type(net).__name__} cannot be split before its last nn.Linear: {reason}. The output must be that of one"
        ' nn.Linear; name another layer with disentangle(net, classifier="head.fc")'
    )


def check_layer(net: nn.Module, name: str) -> None:
    """Raise ValueError if a merged weight in this layer would change more than its own output."""
    layer = net.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    if not name:
        raise refusal(net, "it is an nn.Linear itself; put it into nn.Sequential(nn.Flatten(), layer)")
    if type(layer).forward is not nn.Linear.forward:
        raise refusal(net, f"{name} ({type(layer).__name__}) has a forward of its own")
    if parametrize.is_parametrized(layer):
        raise refusal(net, f"the weight of {name} is computed (torch.nn.utils.parametrizations); remove that first")
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        raise refusal(net, f"{name} is a LazyLinear without weights; run the network once first")
    if any(getattr(layer, hooks) for hooks in HOOKS):
        raise refusal(net, f"{name} has hooks, such as those of weight_norm or spectral_norm; remove them first")
    if layer.out_features < 2:
        raise refusal(net, f"{name} has {layer.out_features} output, takes one for each of at least 2 classes")
    names = [key for key, module in net.named_modules(remove_duplicate=False) if module is layer]
    if len(names) > 1:
        raise refusal(net, f"one layer has the names {' and '.join(names)}")
    for tensor in layer.parameters():
        owners = [key for key, p in net.named_parameters(remove_duplicate=False) if p is tensor]
        if len(owners) > 1:
            raise refusal(net, f"{' and '.join(owners)} are one tensor")


def last_linear(net: nn.Module) -> str:
    """The name of the nn.Linear that is registered last. ValueError if there is none."""
    names = [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear)]
    if not names:
        raise refusal(net, "it has no nn.Linear")
    return names[-1]


# -- by torch.fx --------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """A tracer that does not look into subclasses of nn.Linear.

    It calls the network as a user does: with images alone, so that other arguments have their defaults, and with hooks.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m is self.root:
            return False
        return isinstance(m, nn.Linear) or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        return super().create_args_for_root(lambda net, x: net(x), is_module, concrete_args)


def trace(net: nn.Module, training: bool) -> fx.Graph | None:
    """The graph of the forward in that mode; None if torch.fx cannot trace it."""
    tensors = [*net.parameters(), *net.buffers()]
    # A forward may keep what it computes in an attribute, so a copy is traced; it shares the tensors.
    shadow = copy.deepcopy(net, {id(tensor): tensor for tensor in tensors})
    if training != shadow.training:
        shadow.train(training)
    try:
        return _Tracer().trace(shadow)
    except Exception:  # a forward may do anything with torch.fx's proxies
        return None


def traced_layer(net: nn.Module, graph: fx.Graph, training: bool) -> LogitsLayer:
    """The layer whose call is the graph's output. ValueError for a graph that ends differently."""
    mode = "train" if training else "eval"
    layers = dict(net.named_modules())
    output = next(node for node in graph.nodes if node.op == "output").args[0]
    if not isinstance(output, fx.Node):
        raise refusal(net, f"in {mode} mode {returns(output)}")
    node, log_softmax = output, False
    while _is_identity(node, layers) or _is_log_softmax(node, layers):
        log_softmax |= _is_log_softmax(node, layers)
        (node,) = node.all_input_nodes
    layer = layers.get(str(node.target)) if node.op == "call_module" else None
    before = next((n for n in reversed(graph.nodes) if _calls_linear(n, layers) and _leads_to(n, node)), None)
    if not isinstance(layer, nn.Linear):
        behind = "" if before is None else f"; the last nn.Linear before it is {before.target}"
        raise refusal(net, f"in {mode} mode its output comes from {described(node, layers)}{behind}")
    name = str(node.target)
    if type(layer).forward is not nn.Linear.forward:
        raise refusal(net, f"{name} ({type(layer).__name__}) has a forward of its own")
    calls = sum(n.op == "call_module" and layers.get(str(n.target)) is layer for n in graph.nodes)
    if calls > 1:
        raise refusal(net, f"in {mode} mode {name} is called {calls} times")
    for n in graph.nodes:
        if n.op == "get_attr" and str(n.target).startswith(f"{name}."):
            raise refusal(net, f"{n.target} is also read elsewhere in the forward, even if only its type or device")
    return LogitsLayer(name, log_softmax)


def _is_identity(node: fx.Node, layers: dict[str, nn.Module]) -> bool:
    layer = layers.get(str(node.target)) if node.op == "call_module" else None
    return type(layer) is nn.Identity and not any(getattr(layer, hooks) for hooks in HOOKS)


def _is_log_softmax(node: fx.Node, layers: dict[str, nn.Module]) -> bool:
    """True if the node is the log_softmax over the classes."""
    if node.op == "call_module":
        layer = layers[str(node.target)]
        hooked = any(getattr(layer, hooks) for hooks in HOOKS)
        return type(layer) is nn.LogSoftmax and layer.dim in (1, -1) and not hooked
    if node.target not in (F.log_softmax, torch.log_softmax, "log_softmax") or node.kwargs.get("dtype") is not None:
        return False
    return node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None) in (1, -1)


def _calls_linear(node: fx.Node, layers: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(layers.get(str(node.target)), nn.Linear)


def _leads_to(node: fx.Node, last: fx.Node) -> bool:
    """True if `last` is computed from `node`, or is it."""
    seen, queue = {last}, [last]
    while queue:
        inputs = set(queue.pop().all_input_nodes) - seen
        seen |= inputs
        queue += inputs
    return node in seen


def described(node: fx.Node, layers: dict[str, nn.Module]) -> str:
    """What a node calls, in words for an error message."""
    if node.op == "call_module":
        return f"{node.target} ({type(layers[str(node.target)]).__name__})"
    if node.op == "placeholder":
        return "the images themselves"
    read = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    return str(getattr(node.target, "__name__", node.target)) + (f" with {' and '.join(read)}" if read else "")


def returns(output: object) -> str:
    """The reason for an output that is no tensor."""
    count = f" of {len(output)}" if isinstance(output, (tuple, list, dict)) else ""
    return f"it returns a {type(output).__name__}{count}, takes one tensor of logits"


# -- by a run -----------------------------------------------------------------------------------------------------


def same(x: Tensor, y: Tensor, tolerance: float) -> bool:
    """True if the tensors differ by at most `tolerance` times the largest value, 30 times as much in 16 bits."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    x, y = x.detach(), y.detach()
    tolerance *= 1 if torch.finfo(y.dtype).bits >= 32 else 30
    return torch.allclose(x, y, 0, tolerance * (1e-3 + float(y.nan_to_num(0, 0, 0).abs().max())), equal_nan=True)


class Call(NamedTuple):
    """A call of an nn.Linear: the shape of its input, its result, and a copy of the result."""

    shape: torch.Size
    result: Tensor
    copy: Tensor

    def makes(self, output: Tensor) -> bool:
        """True if the network's output is the result, unchanged since."""
        return same(self.copy, output, 0.0)

    def makes_log_softmax(self, output: Tensor) -> bool:
        """True if the network's output is the log_softmax of the result (B,C), and not equal to it."""
        return self.copy.dim() == 2 and not self.makes(output) and same(self.copy.log_softmax(1), output, 1e-5)


def noted(net: nn.Module, x: Tensor, training: bool) -> tuple[Tensor, dict[str, list[Call]]]:
    """The output of a network on images, and the calls of each nn.Linear. The network is changed: pass a copy."""
    calls: dict[str, list[Call]] = {}

    def hook(name: str) -> Any:
        def note(_: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            (features,) = [*inputs, *keywords.values()]
            calls.setdefault(name, []).append(Call(features.shape, output, output.detach().clone()))

        return note

    if training != net.training:
        net.train(training)
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(hook(name), with_kwargs=True)
    # BatchNorm in train mode needs two images
    output = run(net, torch.cat([x, x]) if training else x, net, "its copy fails")
    if not isinstance(output, Tensor):
        raise refusal(net, f"in {'train' if training else 'eval'} mode {returns(output)}")
    return output, calls


def run(part: Callable[[Tensor], Any], x: Tensor, net: nn.Module, fails: str) -> Any:
    """What a part of the network returns on images, which stay as they are. ValueError with `fails` if it fails."""
    try:
        with same_draws():
            return part(x.clone())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a forward may do anything
        raise refusal(net, f"{fails} ({(str(error) or type(error).__name__).splitlines()[0]})") from error


@torch.no_grad()
def layer_by_run(net: nn.Module, example: Tensor, training: bool) -> LogitsLayer:
    """The layer that returns the network's output on the example images. ValueError if there is none."""
    mode = "train" if training else "eval"
    output, calls = noted(copy.deepcopy(net), on_device(example, net), training)
    names = [name for name, made in calls.items() if any(call.makes(output) for call in made)]
    names.sort(key=lambda name: any(call.result is output for call in calls[name]))
    logs = [name for name, made in calls.items() if any(call.makes_log_softmax(output) for call in made)]
    if not names + logs:
        last = f"; the nn.Linear called last is {list(calls)[-1]}" if calls else ""
        raise refusal(net, f"in {mode} mode its output is not that of an nn.Linear{last}")
    name = (names or logs)[-1]
    if len(calls[name]) > 1:
        raise refusal(net, f"in {mode} mode {name} is called {len(calls[name])} times")
    if len(calls[name][0].shape) != 2:
        raise refusal(net, f"the input of {name} is {tuple(calls[name][0].shape)}, takes features (B,D)")
    return LogitsLayer(name, not names)


def on_device(x: Tensor, net: nn.Module) -> Tensor:
    """The images on the device and, if they are floating, in the type of the network's weights."""
    weight = next(net.parameters())
    return x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype)


@contextmanager
def same_draws() -> Iterator[None]:
    """Draw the same random numbers each time, and leave the global generators as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
