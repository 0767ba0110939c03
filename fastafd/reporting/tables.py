"""The paper's tables made from runs, and a table of all runs.

Tables 1 to 6 take only runs of the published settings on whole data sets. They name the runs that they leave out, and
why. A row without runs says "not run". A row of several seeds has the mean and the standard deviation, a row of one
seed the Wilson 95 % interval.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from fastafd.reporting.markdown import Table
from fastafd.reporting.paper import ABLATION, ACCURACY, FEATURES, PARAMETERS, PRETRAINED
from fastafd.reporting.runs import Run, in_order
from fastafd.settings import ATTACK_NAMES

WHOLE = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "tiny-imagenet": (100_000, 10_000)}  # train, test
HEAD = (*ATTACK_NAMES.values(), "average")


# -- cells --------------------------------------------------------------------------------------------------------


def per_cent(accuracies: Sequence[dict[str, Any]], of_paper: float | None = None) -> str:
    """The mean accuracy of the seeds of one setting, and how far it is from the paper's."""
    if not accuracies:
        return "not run" if of_paper is None else f"not run; paper {of_paper:.2f}"
    values = [100 * accuracy["accuracy"] for accuracy in accuracies]
    mean, n = statistics.fmean(values), accuracies[0]["n"]
    if len(values) > 1:
        cell = f"{mean:.2f} ± {statistics.stdev(values):.2f} of {len(values)} seeds, n={n}"
    else:
        low, high = (100 * bound for bound in accuracies[0]["interval"])
        cell = f"{mean:.2f} [{low:.1f}, {high:.1f}] n={n}"
    return cell if of_paper is None else f"{cell}; paper {of_paper:.2f}, {mean - of_paper:+.2f}"


def average(models: Sequence[dict[str, Any]], of_paper: Sequence[float] | None = None) -> str:
    """The mean of the three accuracies, over the models of which all three were measured."""
    complete = [accuracies for accuracies in models if all(attack in accuracies for attack in ATTACK_NAMES)]
    means = [100 * statistics.fmean(model[attack]["accuracy"] for attack in ATTACK_NAMES) for model in complete]
    cell = "not run" if not means else f"{statistics.fmean(means):.2f}"
    if len(means) > 1:
        cell += f" ± {statistics.stdev(means):.2f}"
    if of_paper is None:
        return cell
    paper_mean = statistics.fmean(of_paper)
    return f"{cell}; paper {paper_mean:.2f}" + (f", {statistics.fmean(means) - paper_mean:+.2f}" if means else "")


def cells(models: Sequence[dict[str, Any]], of_paper: Sequence[float] | None = None) -> list[str]:
    """Clean, PGD-20, AutoAttack and their average; models: the accuracies of one model a seed."""
    paper_accuracies: Sequence[float | None] = of_paper or (None, None, None)
    measured = [
        per_cent([accuracies[attack] for accuracies in models if attack in accuracies], of_attack)
        for attack, of_attack in zip(ATTACK_NAMES, paper_accuracies, strict=True)
    ]
    return [*measured, average(models, of_paper)]


# -- which runs ---------------------------------------------------------------------------------------------------


def fits(run: Run) -> bool:
    """True for a run of the published settings on a whole data set."""
    return not differences(run)


def changed_settings(run: Run) -> list[str]:
    """The settings that differ from the recipe's, without the numbers of evaluated images, which a cell shows."""
    changed = {name: value for name, value in run.changed.items() if name not in ("eval_n", "autoattack_n")}
    return [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in changed.items()]


def differences(run: Run) -> str:
    """How the run differs from the published settings; empty if it does not."""
    lines = changed_settings(run) + (["of a sweep"] if run.varied else [])
    train, test = WHOLE.get(run.dataset, (0, 0))
    held_out = run.config["method"].get("held_out", 0)
    if (run.result["dataset"]["train"] + held_out, run.result["dataset"]["test"]) != (train, test):
        lines.append(f"{run.result['dataset']['train']} images of {run.dataset}")
    return ", ".join(lines)


def left_out(runs: Sequence[Run], used: Sequence[Run]) -> list[str]:
    """A line for each run that is in no row, which says why."""
    rest = [run for run in runs if run not in used]
    return [f"{run.folder}: {differences(run) or 'of a network, data set or method without a row'}" for run in rest]


def by_setting(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ only in their seed, by the name of their row. A seed that ran twice counts once."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        group = groups.setdefault(run.label + (f", from {run.origin}" if run.origin else ""), [])
        if run.seed not in [other.seed for other in group]:
            group.append(run)
    return groups


def rows_for(labels: Iterable[str], runs: Sequence[Run]) -> Iterator[tuple[str, str, list[Run]]]:
    """(the paper's label, the row's name, its runs).

    First the row of each label, then rows of the same method with another recipe, other conditions or other weights.
    """
    groups = by_setting(runs)
    for label in labels:
        yield label, label, groups.get(label, [])
        for name, group in groups.items():
            if name.startswith((f"{label} (", f"{label}, from")):
                yield label, name, group


# -- tables -------------------------------------------------------------------------------------------------------


def results(runs: Sequence[Run]) -> list[Table]:
    """The natural models, then every run in the order of the paper's Table 5; a row has all seeds of a setting."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in in_order(runs):
        changed = ", ".join(changed_settings(run) + ([f"pretrained {run.origin}"] if run.origin else []))
        groups.setdefault((run.dataset, run.arch, run.label, changed, images(run), run.result["amp"]), []).append(run)
    rows: list[list[str]] = []
    of_networks = set()
    for (dataset, arch, label, changed, *_), group in groups.items():
        if (dataset, arch) not in of_networks:
            of_networks.add((dataset, arch))
            rows += natural_rows([run for run in runs if (run.dataset, run.arch) == (dataset, arch)])
        (seeds,) = by_setting(group).values()
        seconds = mean_seconds(run.result["seconds"]["finetuning"]["wall"] for run in group)
        rows.append([label, arch, images(group[0]), *cells([run.trained for run in seeds]), seconds, changed])
    return [Table(["method", "network", "data", *HEAD, "s of training", "not as in its recipe"], rows)]


def images(run: Run) -> str:
    """The data set, its number of training images, and the eps of the evaluation."""
    return f"{run.dataset}, {run.result['dataset']['train']} images, eps {run.trained['eps']}"


def natural_rows(runs: Sequence[Run]) -> list[list[str]]:
    """The rows of the natural models that these runs of a network started from."""
    groups: dict[tuple[str, str, str], dict[int, Run]] = {}
    for run in runs:
        if "natural" in run.result["models"]:
            changed = [text for text in changed_settings(run) if text.startswith("pretrain.")]
            of_pretraining = ", ".join(text.removeprefix("pretrain.") for text in changed)
            how, seed = (f"pretrained {run.origin}", 0) if run.origin else (of_pretraining, run.seed)
            groups.setdefault((how, images(run), run.result["amp"]), {}).setdefault(seed, run)
    rows = []
    for (how, *_), by_seed in sorted(groups.items()):
        group = [*by_seed.values()]
        measured = cells([run.result["models"]["natural"] for run in group])
        seconds = mean_seconds(run.result["seconds"]["pretraining"] for run in group)
        rows.append(["Natural", group[0].arch, images(group[0]), *measured, seconds, how])
    return rows


def mean_seconds(seconds: Iterable[float | None]) -> str:
    """The mean of the seconds that are known; None stands for weights that were trained elsewhere."""
    known = [value for value in seconds if value is not None]
    return f"{statistics.fmean(known):.0f}" if known else "not known"


def accuracy_table(arch: str, runs: Sequence[Run]) -> list[Table]:
    """Table 1 or 2: a table for each data set."""
    parts: list[tuple[str, list[list[str]]]] = []
    used: list[Run] = []
    for dataset, of_paper in ACCURACY[arch].items():
        ours = [run for run in runs if (run.arch, run.dataset) == (arch, dataset) and fits(run)]
        rows = []
        for label, name, group in rows_for(of_paper, ours):
            rows.append([name, *cells([run.trained for run in group], of_paper[label])])
            used += group
        parts.append((f"{arch}, {dataset}", rows))
    *first, (title, rows) = parts
    head = ["method", *HEAD]
    return [
        *(Table(head, other_rows, other_title) for other_title, other_rows in first),
        Table(head, rows, title, left_out=left_out(runs, used)),
    ]


def table1(runs: Sequence[Run]) -> list[Table]:
    """ResNet-18 beside the paper's Table 1."""
    return accuracy_table("resnet18", runs)


def table2(runs: Sequence[Run]) -> list[Table]:
    """WRN-34-10 beside the paper's Table 2."""
    return accuracy_table("wrn34_10", runs)


def table3(runs: Sequence[Run]) -> list[Table]:
    """The ablation. +D and +A keep D1, so that only the losses differ."""
    ours = [run for run in runs if (run.arch, run.dataset) == ("resnet18", "cifar10") and fits(run)]
    rows, used = [], []
    for label, name, group in rows_for(ABLATION, ours):
        rows.append([name, *cells([run.trained for run in group], ABLATION[label])])
        used += group
    return [Table(["method", *HEAD], rows, left_out=left_out(runs, used))]


def table4(runs: Sequence[Run]) -> list[Table]:
    """The clean accuracy of AFD's f1 and f2."""
    rows, used = [], []
    for (arch, dataset), (of_f1, of_f2) in FEATURES.items():
        ours = [run for run in runs if (run.arch, run.dataset) == (arch, dataset) and fits(run)]
        for _, name, group in rows_for(["AFD"], [run for run in ours if run.confused is not None]):
            f1 = [run.trained["clean"] for run in group]
            f2 = [run.confused["clean"] for run in group if run.confused is not None]
            gaps = [100 * (a["accuracy"] - b["accuracy"]) for a, b in zip(f1, f2, strict=True)]
            gap = f"{statistics.fmean(gaps):.2f}" if gaps else "not run"
            of_both = per_cent(f1, of_f1), per_cent(f2, of_f2)
            rows.append([name, arch, dataset, *of_both, f"{gap}; paper {of_f1 - of_f2:.2f}"])
            used += group
    head = ["method", "network", "data", "f1", "f2", "f1 - f2"]
    return [Table(head, rows, left_out=left_out(runs, used))]


def table6(runs: Sequence[Run]) -> list[Table]:
    """The clean accuracy of the natural models that the runs started from."""
    rows = []
    for (arch, dataset), of_paper in PRETRAINED.items():
        by_origin: dict[str, dict[str, Any]] = {}
        for run in runs:
            natural = run.result["models"].get("natural")
            whole = run.result["dataset"]["test"] == WHOLE.get(run.dataset, (0, 0))[1]
            if (run.arch, run.dataset) == (arch, dataset) and natural is not None and whole:
                by_origin[run.origin or f"own, seed {run.seed}"] = natural["clean"]
        for origin, accuracy in by_origin.items() or [("", None)]:
            rows.append([arch, dataset, origin, per_cent([accuracy] if accuracy else [], of_paper)])
    return [Table(["network", "data", "weights", "clean"], rows)]


def parameters(runs: Sequence[Run]) -> list[Table]:
    """The parameters of the networks, and those that a method adds during training."""
    rows = {}
    for run in runs:
        model, training = (run.result["parameters"][name] for name in ("model", "training"))
        more = training - model
        paper = PARAMETERS.get(run.arch) if more else None
        of_paper = "" if paper is None else f"{paper[0]} M + {paper[1]} M, {100 * paper[1] / paper[0]:.2f} %"
        rows[run.arch, more] = [run.arch, f"{model:,}", f"{more:,}", f"{100 * more / model:.2f} %", of_paper]
    note = (
        "D1 and D2 add 2 D² weights for D features, in training alone. A WRN-34-10 has 640 features: 0.8 M, where"
        " the paper, for 1024, has 2 M (4.33 %)."
    )
    head = ["network", "parameters", "more in training", "share", "paper"]
    return [Table(head, [rows[key] for key in sorted(rows)], notes=[note])]


TABLES: dict[str, Callable[[Sequence[Run]], list[Table]]] = {
    "results": results,
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "table4": table4,
    "table6": table6,
    "parameters": parameters,
}
OF_PAPER = {"table1": "Table 1", "table2": "Table 2", "table3": "Table 3", "table4": "Table 4", "table6": "Table 6"}
