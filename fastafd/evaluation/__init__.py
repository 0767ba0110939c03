"""Evaluation: accuracy under attack, counted by this package, in eager fp32. It knows nothing of training."""

from fastafd.evaluation.autoattack import AutoAttackResult, run_autoattack
from fastafd.evaluation.counting import show_accuracies, wilson
from fastafd.evaluation.measurements import ATTACKS, EPS, accuracy_under, evaluate, pgd20

__all__ = [
    "ATTACKS",
    "EPS",
    "AutoAttackResult",
    "accuracy_under",
    "evaluate",
    "pgd20",
    "run_autoattack",
    "show_accuracies",
    "wilson",
]
