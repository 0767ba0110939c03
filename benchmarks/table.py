"""The README's tables of results, in Markdown, from the JSON files under benchmarks/results/.

    python -m benchmarks.table                  # natural and fine-tuned models
    python -m benchmarks.table engines          # the fast engine's beside the reference's
    python -m benchmarks.table natural RUNS     # JSON: RUNS/natural-ENGINE-SEED, evaluated (benchmarks/engines.sh)

Every number of the tables comes from one of these files; a test holds the README to what this prints.
"""

from __future__ import annotations

import json
import sys
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
ENGINES = [  # file, engine, what the row says it is
    ("digits", "reference", "ResNet-8 of half width, recipe `digits`"),
    ("digits-fast", "fast", "the same"),
    ("small-resnet8-afd", "reference", "ResNet-8, 10,000 CIFAR-10 images, AFD, 8 epochs"),
    ("small-resnet8-fast", "fast", "the same"),
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


def engines() -> str:
    """Fine-tuned models of both engines."""
    lines = ["| run | engine | clean | PGD-20 | AutoAttack | measured |", "|---|---|---|---|---|---|"]
    for file, engine, label in ENGINES:
        result = json.loads((RESULTS / f"{file}.json").read_text())
        cells = " | ".join(cell(result["models"]["AFD"].get(attack)) for attack in ATTACKS)
        link = f"[{file}](benchmarks/results/{file}.json), {result['date'][:10]}"
        lines.append(f"| {label} | {engine} | {cells} | {link} |")
    return "\n".join(lines)


def natural(runs: Path) -> str:
    """Clean and PGD-20 accuracy of the natural models in folders natural-ENGINE-SEED, as JSON."""
    rows = []
    for folder in sorted(runs.glob("natural-*-*")):
        found = json.loads((folder / "evaluation-pgd20.json").read_text())
        _, engine, seed = folder.name.split("-")
        figures = {attack: found[attack]["accuracy"] for attack in ("clean", "pgd20")}
        rows.append({"engine": engine, "seed": int(seed), "n": found["clean"]["n"], **figures})
    return json.dumps({"device": found["device"], "date": found["date"], "rows": rows}, indent=1)


if __name__ == "__main__":
    print({"engines": engines, "natural": lambda: natural(Path(sys.argv[2]))}.get("".join(sys.argv[1:2]), table)())
