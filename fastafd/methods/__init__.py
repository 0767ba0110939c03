"""The training methods. A method turns a batch into named loss terms and knows nothing of the optimizer."""

from __future__ import annotations

from fastafd.methods.afd import AFD
from fastafd.methods.base import Loss, Method
from fastafd.methods.natural import Natural
from fastafd.methods.vaft import VAFT

__all__ = ["AFD", "VAFT", "Loss", "Method", "Natural"]
