"""Attacks: the l-infinity threat model, projected gradient descent in it, and AutoAttack."""

from fastafd.attacks.autoattack import AutoAttackFound, check_classes, run_autoattack
from fastafd.attacks.pgd import PGD, input_gradient
from fastafd.attacks.snapshot import Snapshot

__all__ = ["PGD", "AutoAttackFound", "Snapshot", "check_classes", "input_gradient", "run_autoattack"]
