"""Attacks: the l-infinity threat model, projected gradient descent in it, and AutoAttack."""

from fastafd.attacks.autoattack import AutoAttackFound, check_classes, run_autoattack
from fastafd.attacks.choice import Choice, machine
from fastafd.attacks.kl import KLPGD
from fastafd.attacks.pgd import PGD, input_gradient
from fastafd.attacks.snapshot import Snapshot
from fastafd.attacks.threat import Ball, linf_noise

__all__ = [
    "KLPGD",
    "PGD",
    "AutoAttackFound",
    "Ball",
    "Choice",
    "Snapshot",
    "check_classes",
    "input_gradient",
    "linf_noise",
    "machine",
    "run_autoattack",
]
