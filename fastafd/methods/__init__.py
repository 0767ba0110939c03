"""The training methods by name. A method turns a batch into named loss terms and knows nothing of the optimizer."""

from __future__ import annotations

from types import MappingProxyType

from fastafd.methods.afd import AFD
from fastafd.methods.base import Loss, Method
from fastafd.methods.natural import Natural

__all__ = ["AFD", "METHODS", "Loss", "Method", "Natural"]

METHODS = MappingProxyType({"afd": AFD, "natural": Natural})
