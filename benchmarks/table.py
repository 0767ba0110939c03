"""python -m benchmarks.table: the README's results table, in Markdown, from the JSON files under benchmarks/results/.

Every number of the table comes from one of these files; a test holds the README to what this prints.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROWS = [  # file, model in it, what the row says it is
    ("digits", "natural", "ResNet-8 of half width, digits, natural (`make train`)"),
    ("digits", "AFD", "… fine-tuned with AFD, recipe `digits`"),
    ("small-resnet8-afd", "natural", "ResNet-8, 10,000 CIFAR-10 images, natural, 15 epochs"),
    ("small-resnet8-off", "AFD", "… fine-tuned, 8 epochs, terms off"),
    ("small-resnet8-afd", "AFD", "… fine-tuned, 8 epochs, AFD"),
    ("small-resnet18-natural", None, "ResNet-18, CIFAR-10, natural, as pyautoattack ships it"),
    ("small-resnet18-off", "AFD", "… fine-tuned, 100 steps of 64, terms off"),
    ("small-resnet18-afd", "AFD", "… fine-tuned, 100 steps of 64, AFD"),
]
ATTACKS = ("clean", "pgd20", "autoattack")


def cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not run"
    low, high = (100 * bound for bound in found["interval"])
    return f"{100 * found['accuracy']:.1f} [{low:.1f}, {high:.1f}] n={found['n']}"


def table() -> str:
    lines = ["| model | clean | PGD-20 | AutoAttack | measured |", "|---|---|---|---|---|"]
    for file, model, label in ROWS:
        result = json.loads((RESULTS / f"{file}.json").read_text())
        figures = result if model is None else result["models"][model]
        cells = " | ".join(cell(figures.get(attack)) for attack in ATTACKS)
        lines.append(f"| {label} | {cells} | [{file}](benchmarks/results/{file}.json), {result['date'][:10]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
