"""What the counts of right answers say: intervals, and the table that a command prints."""

from __future__ import annotations

import math
from typing import Any

from fastafd.console import Console


def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion (95 % for the default z). Source: Wilson 1927."""
    share, spread = correct / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def show(results: dict[str, dict[str, Any]], console: Console, title: str) -> None:
    """One row a model, one column an attack: accuracy in per cent, its interval, and n."""
    names = {"clean": "clean", "pgd20": "PGD-20", "autoattack": "AutoAttack"}
    present = [attack for attack in names if any(attack in result for result in results.values())]

    def cell(result: dict[str, Any], attack: str) -> str:
        if attack not in result:
            return "–"
        found = result[attack]
        low, high = found["interval"]
        return f"{100 * found['accuracy']:.2f} [{100 * low:.1f}, {100 * high:.1f}] n={found['n']}"

    rows = [[name, *(cell(result, attack) for attack in present)] for name, result in results.items()]
    console.table(title, ["%", *(names[attack] for attack in present)], rows)
