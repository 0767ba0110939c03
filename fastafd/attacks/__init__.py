"""Attacks: the l-infinity threat model and projected gradient descent in it."""

from fastafd.attacks.pgd import PGD

__all__ = ["PGD"]
