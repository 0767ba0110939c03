"""The interval of an accuracy, and the table of accuracies that a command prints."""

from __future__ import annotations

import math
from typing import Any

from fastafd.console import Console
from fastafd.settings import ATTACK_NAMES


def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion (95 % for the default z). Source: Wilson 1927."""
    share, spread = correct / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def show_accuracies(results: dict[str, dict[str, Any]], console: Console, title: str) -> None:
    """Print a table: a row for each model, a column for each attack, with accuracy in per cent, interval and n."""
    present = [attack for attack in ATTACK_NAMES if any(attack in result for result in results.values())]

    def cell(result: dict[str, Any], attack: str) -> str:
        if attack not in result:
            return "–"
        measured = result[attack]
        low, high = measured["interval"]
        return f"{100 * measured['accuracy']:.2f} [{100 * low:.1f}, {100 * high:.1f}] n={measured['n']}"

    rows = [[name, *(cell(result, attack) for attack in present)] for name, result in results.items()]
    console.table(title, ["%", *(ATTACK_NAMES[attack] for attack in present)], rows)
