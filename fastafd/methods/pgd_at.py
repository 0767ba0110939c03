"""PGD adversarial training (Madry et al., arXiv 1706.06083): the loss of vAFT, from fresh weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastafd.methods.vaft import VAFT


@dataclass(frozen=True)
class PGDAT(VAFT):
    label: ClassVar[str] = "PGD-AT"
    begins: ClassVar[str] = "scratch"
