"""The tables of results in the README and in docs/, in Markdown, from the JSON files under benchmarks/results/.

    python -m benchmarks.table                  # natural and fine-tuned models
    python -m benchmarks.table overview         # the rows of it that the README has
    python -m benchmarks.table engines          # models of the fast engine and of the reference engine
    python -m benchmarks.table reproduced       # our figures beside the paper's (results/DEVICE/, benchmarks.reproduce)
    python -m benchmarks.table natural RUNS     # JSON: RUNS/natural-ENGINE-SEED, evaluated (benchmarks/engines.sh)

Every number of the tables comes from one of these files; a test compares the pages with the output of this command.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastafd.reporting.markdown import markdown_table
from fastafd.reporting.paper import ACCURACY, PRETRAINED
from fastafd.settings import ATTACK_NAMES, UsageError

RESULTS = Path(__file__).parent / "results"
ROWS = [  # file, model in it, name of the row
    ("digits", "natural", "ResNet-8 of half width, digits, natural (`make train`)"),
    ("digits", "AFD", "… fine-tuned with AFD, recipe `digits`"),
    ("small-resnet8-afd", "natural", "ResNet-8, 10,000 CIFAR-10 images, natural, 15 epochs"),
    ("small-resnet8-off", "AFD", "… fine-tuned, 8 epochs, terms off"),
    ("small-resnet8-afd", "AFD", "… fine-tuned, 8 epochs, AFD"),
    ("small-resnet18-natural", None, "ResNet-18, CIFAR-10, natural, as pyautoattack ships it"),
    ("small-resnet18-off", "AFD", "… fine-tuned, 100 steps of 64, terms off"),
    ("small-resnet18-afd", "AFD", "… fine-tuned, 100 steps of 64, AFD"),
]
ENGINES = [  # file, engine, name of the row
    ("digits", "reference", "ResNet-8 of half width, recipe `digits`"),
    ("digits-fast", "fast", "the same"),
    ("small-resnet8-afd", "reference", "ResNet-8, 10,000 CIFAR-10 images, AFD, 8 epochs"),
    ("small-resnet8-fast", "fast", "the same"),
]
OVERVIEW = (
    "digits",
    "small-resnet18-natural",
    "small-resnet18-off",
    "small-resnet18-afd",
)  # files of the README's rows
HEAD = list(ATTACK_NAMES.values())
OF_PAPER: dict[str, dict[str, float]] = {  # per cent, ResNet-18 on CIFAR-10
    "natural": {"clean": PRETRAINED["resnet18", "cifar10"]},
    **{of: dict(zip(ATTACK_NAMES, ACCURACY["resnet18"]["cifar10"][of], strict=True)) for of in ("AFD", "vAFT")},
}
REPRODUCED = [  # file, model in it, name of the row
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
    """An accuracy with its Wilson 95 % interval and n."""
    if measured is None:
        return "not run"
    low, high = (100 * bound for bound in measured["interval"])
    return f"{100 * measured['accuracy']:.1f} [{low:.1f}, {high:.1f}] n={measured['n']}"


def link(file: Path, date: str, base: str) -> str:
    """A link to a file of results; base: the path of results/ from the page."""
    return f"[{file.stem}]({base}/{file.relative_to(RESULTS)}), {date[:10]}"


def results(rows: Sequence[tuple[str, str | None, str]] = tuple(ROWS), base: str = "../benchmarks/results") -> str:
    """Natural and fine-tuned models."""
    lines = []
    for name, model, label in rows:
        file = RESULTS / f"{name}.json"
        result = json.loads(file.read_text())
        accuracies = result if model is None else result["models"][model]
        cells = [cell(accuracies.get(attack)) for attack in ATTACK_NAMES]
        lines.append([label, accuracies["eps"], *cells, link(file, result["date"], base)])
    return markdown_table(["model", "eps", *HEAD, "measured"], lines)


def overview() -> str:
    """The rows of `results` that the README shows."""
    return results([row for row in ROWS if row[0] in OVERVIEW], "benchmarks/results")


def engines() -> str:
    """Fine-tuned models of both engines."""
    lines = []
    for name, engine, label in ENGINES:
        file = RESULTS / f"{name}.json"
        result = json.loads(file.read_text())
        accuracies = result["models"]["AFD"]
        cells = [cell(accuracies.get(attack)) for attack in ATTACK_NAMES]
        lines.append([label, engine, accuracies["eps"], *cells, link(file, result["date"], "../benchmarks/results")])
    return markdown_table(["run", "engine", "eps", *HEAD, "measured"], lines)


def reproduced(folders: Sequence[Path] = ()) -> str:
    """Our figures beside the paper's: those that `benchmarks.reproduce` left in these folders, or in results/*/."""
    lines = []
    committed = sorted({file.parent for name, *_ in REPRODUCED for file in RESULTS.glob(f"*/{name}.json")})
    for folder in folders or committed or [Path("none yet")]:
        for name, model, label in REPRODUCED:
            file = folder / f"{name}.json"
            if file.exists():
                lines.append(measured_row(label, model, file))
            elif not label.startswith("tried"):
                cells = (beside(None, OF_PAPER[model].get(attack)) for attack in ATTACK_NAMES)
                lines.append([label, "", *cells, "", "", ""])
    return markdown_table(["model", "device", *HEAD, "s of training", "of them compiling", "measured"], lines)


def measured_row(label: str, model: str, file: Path) -> list[str]:
    """The cells of a model that was measured."""
    result = json.loads(file.read_text())
    accuracies = result["models"][model] if "models" in result else result
    cells = [beside(accuracies.get(attack), OF_PAPER[model].get(attack)) for attack in ATTACK_NAMES]
    seconds = (
        result["seconds"] if "models" not in result else result["seconds"]["finetuning"] if model != "natural" else {}
    )
    spent = ["" if seconds.get(part) is None else f"{seconds[part]:.0f}" for part in ("wall", "compile")]
    path = f"../benchmarks/results/{file.parent.name}/{file.name}"
    return [label, result["device"], *cells, *spent, f"[{file.stem}]({path}), {result['date'][:10]}"]


def beside(measured: dict[str, Any] | None, of_paper: float | None) -> str:
    """An accuracy with its interval, the paper's, and whether the interval contains the paper's."""
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
    """Clean and PGD-20 accuracy of the natural models in folders natural-ENGINE-SEED, as JSON.

    UsageError if there are none.
    """
    rows = []
    folders = sorted(file.parent for file in runs.glob("natural-*-*/evaluation-pgd20.json"))
    if not folders:
        raise UsageError(f"runs: {runs} has no natural-ENGINE-SEED/evaluation-pgd20.json (benchmarks/engines.sh)")
    for folder in folders:
        result = json.loads((folder / "evaluation-pgd20.json").read_text())
        _, engine, seed = folder.name.split("-")
        figures = {attack: result[attack]["accuracy"] for attack in ("clean", "pgd20")}
        rows.append({"engine": engine, "seed": int(seed), "n": result["clean"]["n"], **figures})
    return json.dumps({"device": result["device"], "date": result["date"], "rows": rows}, indent=1)


TABLES = {"all": results, "overview": overview, "engines": engines, "reproduced": reproduced}


def main() -> int:
    parser = argparse.ArgumentParser(
        "benchmarks.table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", nargs="?", default="all", choices=[*TABLES, "natural"], help="default: all")
    parser.add_argument("runs", nargs="?", type=Path, help="folder of runs, for natural alone")
    args = parser.parse_args()
    if (args.runs is None) == (args.table == "natural"):
        parser.error("natural takes a folder of runs, the other tables none")
    print(TABLES[args.table]() if args.runs is None else natural(args.runs))
    return 0


if __name__ == "__main__":
    from fastafd.cli import run_script

    run_script(main)
