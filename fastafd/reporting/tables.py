"""The paper's tables, and one of all runs, as Markdown.

Tables 1 to 6 take runs of the published settings on whole data sets, and say which they left out and why; what was not
run is shown as not run. Of several seeds they show mean and standard deviation, of one the Wilson 95 % interval.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastafd.reporting.paper import ABLATION, ACCURACY, FEATURES, PARAMETERS, PRETRAINED
from fastafd.reporting.runs import Run, in_order

ATTACKS = ("clean", "pgd20", "autoattack")
WHOLE = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "tiny-imagenet": (100_000, 10_000)}
HEAD = ("clean", "PGD-20", "AutoAttack", "average")


# -- cells --------------------------------------------------------------------------------------------------------


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def per_cent(found: Sequence[dict[str, Any]], of_paper: float | None = None) -> str:
    """One figure of each run (seeds of one setting), and how far the paper's is from their mean."""
    if not found:
        return "not run" if of_paper is None else f"not run; paper {of_paper:.2f}"
    values = [100 * figure["accuracy"] for figure in found]
    mean = statistics.fmean(values)
    if len(values) > 1:
        said = f"{mean:.2f} ± {statistics.stdev(values):.2f} of {len(values)} seeds, n={found[0]['n']}"
    else:
        low, high = (100 * bound for bound in found[0]["interval"])
        said = f"{mean:.2f} [{low:.1f}, {high:.1f}] n={found[0]['n']}"
    return said if of_paper is None else f"{said}; paper {of_paper:.2f}, {mean - of_paper:+.2f}"


def average(models: Sequence[dict[str, Any]], of_paper: Sequence[float] | None = None) -> str:
    """The mean of the three accuracies, where all were measured."""
    whole = [figures for figures in models if all(attack in figures for attack in ATTACKS)]
    means = [100 * statistics.fmean(figures[attack]["accuracy"] for attack in ATTACKS) for figures in whole]
    said = "not run" if not means else f"{statistics.fmean(means):.2f}"
    if len(means) > 1:
        said += f" ± {statistics.stdev(means):.2f}"
    if of_paper is None:
        return said
    theirs = statistics.fmean(of_paper)
    return f"{said}; paper {theirs:.2f}" + (f", {statistics.fmean(means) - theirs:+.2f}" if means else "")


def cells(models: Sequence[dict[str, Any]], of_paper: Sequence[float] | None = None) -> list[str]:
    """Clean, PGD-20, AutoAttack and their average, of the figures of one model a seed."""
    theirs: Sequence[float | None] = of_paper or (None, None, None)
    measured = [
        per_cent([figures[attack] for figures in models if attack in figures], figure)
        for attack, figure in zip(ATTACKS, theirs, strict=True)
    ]
    return [*measured, average(models, of_paper)]


# -- which runs ---------------------------------------------------------------------------------------------------


def fits(run: Run) -> bool:
    """Whether the run is one of the published settings on a whole data set."""
    return not why_not(run)


def settings(run: Run) -> list[str]:
    """What of a run's settings is not its recipe's; how many images it was evaluated on is said elsewhere."""
    changed = {name: value for name, value in run.changed.items() if name not in ("eval_n", "autoattack_n")}
    return [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in changed.items()]


def why_not(run: Run) -> str:
    """What of a run is not as published, or nothing."""
    said = settings(run) + (["of a sweep"] if run.varied else [])
    train, test = WHOLE.get(run.dataset, (0, 0))
    held_out = run.config["method"].get("held_out", 0)
    if (run.result["dataset"]["train"] + held_out, run.result["dataset"]["test"]) != (train, test):
        said.append(f"{run.result['dataset']['train']} images of {run.dataset}")
    return ", ".join(said)


def left_out(runs: Sequence[Run], used: Sequence[Run]) -> str:
    """A line for each run that is in no row, and why."""
    rest = [run for run in runs if run not in used]
    lines = [f"- {run.folder}: {why_not(run) or 'of a network, data set or method without a row'}" for run in rest]
    return "\n\nLeft out:\n\n" + "\n".join(lines) if lines else ""


def by_setting(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in their seed alone, under what a row calls them; of a seed that ran twice the first."""
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        same = found.setdefault(run.label + (f", from {run.origin}" if run.origin else ""), [])
        if run.seed not in [other.seed for other in same]:
            same.append(run)
    return found


def rows_for(labels: Iterable[str], runs: Sequence[Run]) -> Iterator[tuple[str, str, list[Run]]]:
    """(label, row's name, its runs): of each of the paper's rows, then other recipes, conditions and starts of it."""
    found = by_setting(runs)
    for label in labels:
        yield label, label, found.get(label, [])
        for name, same in found.items():
            if name.startswith((f"{label} (", f"{label}, from")):
                yield label, name, same


# -- tables -------------------------------------------------------------------------------------------------------


def results(runs: Sequence[Run]) -> str:
    """Natural models, then every run in the order of the paper's Table 5; those of other seeds alone in one row."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in in_order(runs):
        own = ", ".join(settings(run) + ([f"pretrained {run.origin}"] if run.origin else []))
        groups.setdefault((run.dataset, run.arch, run.label, own, run.result["amp"]), []).append(run)
    rows: list[list[str]] = []
    of_networks = set()
    for (dataset, arch, label, own, _), same in groups.items():
        if (dataset, arch) not in of_networks:
            of_networks.add((dataset, arch))
            rows += natural_rows([run for run in runs if (run.dataset, run.arch) == (dataset, arch)])
        (chosen,) = by_setting(same).values()
        measured = cells([run.trained for run in chosen])
        spent = mean_seconds(run.result["seconds"]["finetuning"]["wall"] for run in same)
        rows.append([label, arch, images(same[0]), *measured, spent, own])
    return markdown(["method", "network", "data", *HEAD, "s of training", "not as in its recipe"], rows)


def images(run: Run) -> str:
    return f"{run.dataset}, {run.result['dataset']['train']} images"


def natural_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Of the natural models that these runs of a network began with: one of each seed, or the given weights."""
    groups: dict[tuple[str, str], dict[int, Run]] = {}
    for run in runs:
        if "natural" in run.result["models"]:
            own = ", ".join(said.removeprefix("pretrain.") for said in settings(run) if said.startswith("pretrain."))
            how, seed = (f"pretrained {run.origin}", 0) if run.origin else (own, run.seed)
            groups.setdefault((how, run.result["amp"]), {}).setdefault(seed, run)
    rows = []
    for (how, _), of_seeds in sorted(groups.items()):
        same = [*of_seeds.values()]
        measured = cells([run.result["models"]["natural"] for run in same])
        spent = mean_seconds(run.result["seconds"]["pretraining"] for run in same)
        rows.append(["Natural", same[0].arch, images(same[0]), *measured, spent, how])
    return rows


def mean_seconds(spent: Iterable[float | None]) -> str:
    """The mean; those that made given weights are not known (None)."""
    known = [seconds for seconds in spent if seconds is not None]
    return f"{statistics.fmean(known):.0f}" if known else "not known"


def accuracy_table(arch: str, runs: Sequence[Run]) -> str:
    """Table 1 or 2: a table for each data set."""
    parts, used = [], []
    for dataset, of_paper in ACCURACY[arch].items():
        ours = [run for run in runs if (run.arch, run.dataset) == (arch, dataset) and fits(run)]
        rows = []
        for label, name, same in rows_for(of_paper, ours):
            rows.append([name, *cells([run.trained for run in same], of_paper[label])])
            used += same
        parts.append(f"{arch}, {dataset}\n\n" + markdown(["method", *HEAD], rows))
    return "\n\n".join(parts) + left_out(runs, used)


def table1(runs: Sequence[Run]) -> str:
    return accuracy_table("resnet18", runs)


def table2(runs: Sequence[Run]) -> str:
    return accuracy_table("wrn34_10", runs)


def table3(runs: Sequence[Run]) -> str:
    """The ablation. D1 stays in +D and +A, so that only the losses differ."""
    ours = [run for run in runs if (run.arch, run.dataset) == ("resnet18", "cifar10") and fits(run)]
    rows, used = [], []
    for label, name, same in rows_for(ABLATION, ours):
        rows.append([name, *cells([run.trained for run in same], ABLATION[label])])
        used += same
    return markdown(["method", *HEAD], rows) + left_out(runs, used)


def table4(runs: Sequence[Run]) -> str:
    """Clean accuracy of f1 and of f2, of AFD."""
    rows, used = [], []
    for (arch, dataset), (of_f1, of_f2) in FEATURES.items():
        ours = [run for run in runs if (run.arch, run.dataset) == (arch, dataset) and fits(run)]
        for _, name, same in rows_for(["AFD"], [run for run in ours if run.confused is not None]):
            f1 = [run.trained["clean"] for run in same]
            f2 = [run.confused["clean"] for run in same if run.confused is not None]
            gaps = [100 * (a["accuracy"] - b["accuracy"]) for a, b in zip(f1, f2, strict=True)]
            gap = f"{statistics.fmean(gaps):.2f}" if gaps else "not run"
            of_both = per_cent(f1, of_f1), per_cent(f2, of_f2)
            rows.append([name, arch, dataset, *of_both, f"{gap}; paper {of_f1 - of_f2:.2f}"])
            used += same
    return markdown(["method", "network", "data", "f1", "f2", "f1 - f2"], rows) + left_out(runs, used)


def table6(runs: Sequence[Run]) -> str:
    """Clean accuracy of the natural models that the runs began with."""
    rows = []
    for (arch, dataset), theirs in PRETRAINED.items():
        found: dict[str, dict[str, Any]] = {}
        for run in runs:
            natural = run.result["models"].get("natural")
            whole = run.result["dataset"]["test"] == WHOLE.get(run.dataset, (0, 0))[1]
            if (run.arch, run.dataset) == (arch, dataset) and natural is not None and whole:
                given = run.config["pretrained"]
                found[Path(given).name if given else f"own, seed {run.seed}"] = natural["clean"]
        for origin, figure in found.items() or [("", None)]:
            rows.append([arch, dataset, origin, per_cent([figure] if figure else [], theirs)])
    return markdown(["network", "data", "weights", "clean"], rows)


def parameters(runs: Sequence[Run]) -> str:
    """Of the networks, and what a method adds in training."""
    rows = {}
    for run in runs:
        model, training = (run.result["parameters"][name] for name in ("model", "training"))
        more = training - model
        theirs = PARAMETERS.get(run.arch) if more else None
        of_paper = "" if theirs is None else f"{theirs[0]} M + {theirs[1]} M, {100 * theirs[1] / theirs[0]:.2f} %"
        rows[run.arch, more] = [run.arch, f"{model:,}", f"{more:,}", f"{100 * more / model:.2f} %", of_paper]
    note = (
        "\n\nD1 and D2 add 2 D² weights for D features, in training alone. A WRN-34-10 has 640 features: 0.8 M, where"
        " the paper, for 1024, has 2 M (4.33 %)."
    )
    head = ["network", "parameters", "more in training", "share", "paper"]
    return markdown(head, [rows[key] for key in sorted(rows)]) + note


TABLES: dict[str, Callable[[Sequence[Run]], str]] = {
    "results": results,
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "table4": table4,
    "table6": table6,
    "parameters": parameters,
}
OF_PAPER = {"table1": "Table 1", "table2": "Table 2", "table3": "Table 3", "table4": "Table 4", "table6": "Table 6"}
