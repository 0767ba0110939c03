"""Evaluation: accuracy under attack, counted by this package, in eager fp32. It knows nothing of training."""

from fastafd.evaluation.autoattack import AutoAttackResult, run_autoattack
from fastafd.evaluation.counting import show_accuracies, wilson
from fastafd.evaluation.measurements import ATTACKS, PGD20, accuracy_under, evaluate

__all__ = [
    "ATTACKS",
    "PGD20",
    "AutoAttackResult",
    "accuracy_under",
    "evaluate",
    "run_autoattack",
    "show_accuracies",
    "wilson",
]
