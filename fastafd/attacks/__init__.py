"""Attacks: the l-infinity threat model, PGD, and the snapshot of a model on which PGD is fast."""

from fastafd.attacks.choice import Choice, machine
from fastafd.attacks.inputs import check_images, check_labels, check_logits, check_network, named_failure
from fastafd.attacks.kl import KLPGD
from fastafd.attacks.pgd import PGD, check_target, input_gradient, overrides, weakness, weights_of
from fastafd.attacks.snapshot import Snapshot
from fastafd.attacks.threat import Ball, linf_noise

__all__ = [
    "KLPGD",
    "PGD",
    "Ball",
    "Choice",
    "Snapshot",
    "check_images",
    "check_labels",
    "check_logits",
    "check_network",
    "check_target",
    "input_gradient",
    "linf_noise",
    "machine",
    "named_failure",
    "overrides",
    "weakness",
    "weights_of",
]
