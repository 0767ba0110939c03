"""Attacks: the l-infinity threat model, projected gradient descent in it, and AutoAttack."""

from fastafd.attacks.autoattack import AutoAttackFound, check_classes, run_autoattack
from fastafd.attacks.pgd import PGD

__all__ = ["PGD", "AutoAttackFound", "check_classes", "run_autoattack"]
