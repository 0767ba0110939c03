"""What a network changes from step to step beside the values of its tensors.

Compiled functions, recorded graphs and the attack's snapshot are made from the network as it is at one time. Values of
its tensors reach them. A replaced tensor, a new hook, another layer or a number kept as an attribute may not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MOST = 1000  # items of a container that are looked at
PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)
LISTS = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
# What every module has and no forward reads. A step switches modes itself.
STANDARD = vars(nn.Module()).keys() - set(LISTS) | {"_compiled_call_impl"}


class Changes:
    """The changes of a network since the last look."""

    def __init__(self, net: nn.Module):
        self.net = net
        self._before = look(net)

    def first(self) -> str | None:
        """A sentence about the first change since the last look; None if there is none."""
        now = look(self.net)
        before, self._before = self._before, now
        if now == before:
            return None
        if len(now) != len(before):
            return "the model has other layers"
        names = [name for name, _ in self.net.named_modules()]
        index = next(index for index, (a, b) in enumerate(zip(before, now, strict=True)) if a != b)
        keys = sorted({*before[index], *now[index]}, key=str)
        key = next(key for key in keys if before[index].get(key, look) != now[index].get(key, look))
        return f"{f'{names[index]}.{key}'.lstrip('.')} of the model has changed"


def look(net: nn.Module) -> list[dict[str, Any]]:
    """For each module: plain attributes by value, also in containers and objects; everything else by identity.

    Tensors count with their versions, which every change in place raises. Globals that a forward reads are not seen.
    """
    return [
        {key: _seen(key, value) for key, value in vars(module).items() if key not in STANDARD} | _of_class(type(module))
        for module in net.modules()
    ]


def _of_class(kind: type) -> dict[str, Any]:
    """The class of a module, and the plain attributes of classes that are not PyTorch's."""
    plain: dict[str, Any] = {"__class__": kind}
    for base in kind.__mro__:
        if not base.__module__.startswith(("torch.", "builtins")):
            plain |= {f"{base.__name__}.{key}": value for key, value in vars(base).items() if type(value) in PLAIN}
    return plain


def _seen(key: str, value: Any, depth: int = 3) -> Any:
    if isinstance(value, PLAIN):
        return value
    if key in LISTS:
        return [*map(id, value.values())] if value else None
    if isinstance(value, Tensor):
        return id(value), 0 if value.is_inference() else value._version
    if depth and isinstance(value, (dict, list, tuple)) and len(value) <= MOST:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return [(str(inner), _seen("", item, depth - 1)) for inner, item in pairs]
    if depth and not isinstance(value, (nn.Module, type)) and isinstance(getattr(value, "__dict__", None), dict):
        return id(value), [(inner, _seen("", item, depth - 1)) for inner, item in vars(value).items()]
    return id(value)
