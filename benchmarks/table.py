"""The README's tables of results, in Markdown, from the JSON files under benchmarks/results/.

    python -m benchmarks.table                  # natural and fine-tuned models
    python -m benchmarks.table engines          # the fast engine's beside the reference's
    python -m benchmarks.table reproduced       # the paper's figures and ours (results/DEVICE/, benchmarks.reproduce)
    python -m benchmarks.table natural RUNS     # JSON: RUNS/natural-ENGINE-SEED, evaluated (benchmarks/engines.sh)

Every number of the tables comes from one of these files; a test holds the README to what this prints.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastafd.reporting.paper import ACCURACY, PRETRAINED

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
OF_PAPER: dict[str, dict[str, float]] = {  # per cent, ResNet-18 on CIFAR-10
    "natural": {"clean": PRETRAINED["resnet18", "cifar10"]},
    **{of: dict(zip(ATTACKS, ACCURACY["resnet18"]["cifar10"][of], strict=True)) for of in ("AFD", "vAFT")},
}
REPRODUCED = [  # file, model in it, what the row says it is
    ("afd-released", "natural", "natural, as pyautoattack ships it"),
    ("natural", "natural", "natural, 100 epochs by the appendix"),
    ("afd-released", "AFD", "AFD, recipe `released`"),
    ("afd-paper", "AFD", "AFD, recipe `paper`"),
    ("afd-own", "AFD", "AFD, `released`, from the own natural model"),
    ("vaft-matched", "vAFT", "vAFT, `--recipe vaft --matched`"),
    ("afd-released-seed1", "AFD", "tried: `released`, seed 1"),
    ("afd-released-seed2", "AFD", "tried: `released`, seed 2"),
    ("afd-released-step-size", "AFD", "tried: `released`, training PGD of 2/255"),
    ("afd-released-no-average", "AFD", "tried: `released` without the weight average"),
    ("afd-released-no-random-start", "AFD", "tried: `released` without a random start"),
    ("afd-released-batch-statistics", "AFD", "tried: `released`, attack in train mode"),
]


def cell(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "not run"
    low, high = (100 * bound for bound in measured["interval"])
    return f"{100 * measured['accuracy']:.1f} [{low:.1f}, {high:.1f}] n={measured['n']}"


def results() -> str:
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


def reproduced(folders: Sequence[Path] = ()) -> str:
    """Measured figures beside the paper's: of what `benchmarks.reproduce` left in these folders, or in results/*/."""
    head = ["model", "device", *("clean", "PGD-20", "AutoAttack"), "s of training", "of them compiling", "measured"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    committed = sorted({file.parent for name, *_ in REPRODUCED for file in RESULTS.glob(f"*/{name}.json")})
    for folder in folders or committed or [Path("none yet")]:
        for name, model, label in REPRODUCED:
            file = folder / f"{name}.json"
            if file.exists():
                lines.append(measured_row(label, model, file))
            elif not label.startswith("tried"):
                cells = ["", *(beside(None, OF_PAPER[model].get(attack)) for attack in ATTACKS), "", "", ""]
                lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(lines)


def measured_row(label: str, model: str, file: Path) -> str:
    result = json.loads(file.read_text())
    figures = result["models"][model] if "models" in result else result
    cells = [beside(figures.get(attack), OF_PAPER[model].get(attack)) for attack in ATTACKS]
    seconds = (
        result["seconds"] if "models" not in result else result["seconds"]["finetuning"] if model != "natural" else {}
    )
    spent = ["" if seconds.get(part) is None else f"{seconds[part]:.0f}" for part in ("wall", "compile")]
    link = f"[{file.stem}](benchmarks/results/{file.parent.name}/{file.name}), {result['date'][:10]}"
    return "| " + " | ".join([label, result["device"], *cells, *spent, link]) + " |"


def beside(measured: dict[str, Any] | None, of_paper: float | None) -> str:
    """A figure with its interval, the paper's, and whether the one holds the other."""
    text = cell(measured)
    if of_paper is None:
        return "" if measured is None else text
    text += f"; paper {of_paper:.2f}"
    if measured is None:
        return text
    low, high = (100 * bound for bound in measured["interval"])
    missed = f"missed by {100 * measured['accuracy'] - of_paper:+.2f}"
    return f"{text}, {'within' if low <= of_paper <= high else missed}"


def natural(runs: Path) -> str:
    """Clean and PGD-20 accuracy of the natural models in folders natural-ENGINE-SEED, as JSON."""
    rows = []
    for folder in sorted(runs.glob("natural-*-*")):
        result = json.loads((folder / "evaluation-pgd20.json").read_text())
        _, engine, seed = folder.name.split("-")
        figures = {attack: result[attack]["accuracy"] for attack in ("clean", "pgd20")}
        rows.append({"engine": engine, "seed": int(seed), "n": result["clean"]["n"], **figures})
    return json.dumps({"device": result["device"], "date": result["date"], "rows": rows}, indent=1)


if __name__ == "__main__":
    which = "".join(sys.argv[1:2])
    if which == "natural":
        print(natural(Path(sys.argv[2])))
    else:
        print({"": results, "engines": engines, "reproduced": reproduced}[which]())
