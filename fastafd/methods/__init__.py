"""The training methods. A method turns a batch into named loss terms and knows nothing of the optimizer."""

from __future__ import annotations

from fastafd.methods.afd import AFD
from fastafd.methods.afkd import AFKD
from fastafd.methods.arrest import ARREST
from fastafd.methods.atas import ATAS
from fastafd.methods.base import Batch, Loss, Method
from fastafd.methods.free_at import FreeAT
from fastafd.methods.grad_align import GradAlign
from fastafd.methods.natural import Natural
from fastafd.methods.pgd_at import PGDAT
from fastafd.methods.rift import RiFT
from fastafd.methods.trades import TRADES
from fastafd.methods.vaft import VAFT

__all__ = [
    "AFD",
    "AFKD",
    "ARREST",
    "ATAS",
    "PGDAT",
    "TRADES",
    "VAFT",
    "Batch",
    "FreeAT",
    "GradAlign",
    "Loss",
    "Method",
    "Natural",
    "RiFT",
]
