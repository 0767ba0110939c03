"""The paper's figures, drawn from runs: NAME.png, NAME.svg, and NAME.csv with the numbers that are drawn.

Each function takes runs and a folder, returns the PNG's path, and raises UsageError if no run has the data for it.
A run in a folder such as gamma-25-seed0 belongs to a sweep (benchmarks/sweep.py). Figure 4 shows the runs of sweeps;
the other figures leave them out if there are other runs. matplotlib and scikit-learn are imported when a figure is
drawn.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastafd.files import save_text, write_atomic
from fastafd.reporting.runs import Run
from fastafd.settings import ATTACK_NAMES, UsageError

CAPTIONS = {  # figure -> title, caption
    "figure1a": (
        "Feature gap (Figure 1a)",
        "Mean distance by epoch between the features that the classifier reads of attacked training images, and the "
        "natural model's features of the clean images. Bands: one standard deviation over seeds.",
    ),
    "figure3": (
        "t-SNE of one model (Figure 3)",
        "Features of test images attacked by PGD-20, before disentanglement and after it. The silhouette score is that "
        "of the features themselves, not of their picture in the plane.",
    ),
    "figure4": (
        "Weights of the loss (Figure 4)",
        "Clean and PGD-20 accuracy against the weights α, β and γ, each varied alone; the axis spaces the tried values "
        "evenly. Error bars: Wilson 95 % intervals of one seed, one standard deviation over several.",
    ),
    "figure5": (
        "t-SNE of the methods (Figure 5)",
        "Features that the classifier reads, of test images attacked by PGD-20, a panel a method. The silhouette score "
        "is that of the features themselves, not of their picture in the plane.",
    ),
}
COLUMN, PAGE = 3.4, 7.0  # widths in inches: one column of a paper, both columns
# Okabe and Ito's colours, safe for the colour-blind, with grey and wine for the ninth and tenth class.
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000 #B8A800 #999999 #882255".split()
MARKERS = "os^Dv*XP<>"
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fastafd",  # the same picture is the same file
}
SHOWN_CLASSES = 10  # t-SNE shows the first ten classes
# The weights that figure 4 varies: sign, the paper's value.
WEIGHTS = {"alpha": ("α", 0.05), "beta": ("β", 0.25), "gamma": ("γ", 25.0)}


# -- figure 1a ----------------------------------------------------------------------------------------------------


def feature_gap(runs: Sequence[Run], out: Path) -> Path:
    """Figure 1a: L1, L2 and Linf distances between features of attacked images and natural features, by epoch."""
    norms = {"l1": "$L_1$", "l2": "$L_2$", "linf": "$L_\\infty$"}
    logged = [run for run in _methods(runs) if run.by_epoch("gap_l1")]
    if not logged:
        raise UsageError(f"figure1a: none of {_names(runs)} logs the distance to a natural model (gap_l1)")
    groups = _by_name(logged)
    rows: list[dict[str, Any]] = []
    for name, seeds in groups.items():
        for norm in norms:
            of_seeds = [run.by_epoch(f"gap_{norm}") for run in seeds]
            for epoch in sorted(set().union(*of_seeds)):
                values = [by_epoch[epoch] for by_epoch in of_seeds if epoch in by_epoch]
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                row = {"method": name, "norm": norm, "epoch": epoch, "mean": statistics.fmean(values)}
                rows.append(row | {"deviation": deviation, "seeds": len(values)})

    bases = list(dict.fromkeys(_base(name) for name in groups))
    with _figure(1, 3, PAGE, 2.5) as (figure, axes):
        for (norm, sign), ax in zip(norms.items(), axes[0], strict=True):
            for name in groups:
                points = [row for row in rows if (row["method"], row["norm"]) == (name, norm)]
                index = bases.index(_base(name))
                x, mean, spread = (np.array([row[key] for row in points]) for key in ("epoch", "mean", "deviation"))
                form = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
                dashed = {"linestyle": "--", "markerfacecolor": "white"} if "(matched)" in name else {}
                # The first method lies on top.
                ax.plot(x, mean, label=name, markevery=math.ceil(len(x) / 10), zorder=3 - index / 100, **form, **dashed)
                if spread.any():
                    ax.fill_between(x, mean - spread, mean + spread, color=form["color"], alpha=0.2, linewidth=0)
            ax.set(xlabel="epoch", ylabel=f"feature distance, {sign}")
            ax.set_ylim(bottom=0)
            ax.xaxis.get_major_locator().set_params(integer=True)
        across = math.ceil(len(groups) / math.ceil(len(groups) / 5))
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=across)
        return _save(figure, rows, out, "figure1a")


# -- figures 3 and 5 ----------------------------------------------------------------------------------------------


def tsne(runs: Sequence[Run], out: Path) -> Path:
    """Figure 3: the features of attacked images before disentanglement, and f1, of one disentangled run."""
    disentangled = [run for run in runs if run.confused is not None]
    if not disentangled:
        raise UsageError(f"figure3: none of {_names(runs)} is disentangled")
    run = min(_methods(disentangled), key=lambda run: (run.samples is None, not run.label.startswith("AFD"), run.seed))
    panels = {"before disentanglement": (run, "before"), "after it, $f_1$": (run, "f1")}
    return _tsne(panels, out, "figure3", about=f"{run.label}, {run.arch}, {run.dataset}, seed {run.seed}")


def tsne_methods(runs: Sequence[Run], out: Path) -> Path:
    """Figure 5: f1 of attacked images; each method has a panel, which shows its first seed."""
    sampled = [run for run in _methods(runs) if run.samples is not None]
    if not sampled:
        raise UsageError(f"figure5: none of {_names(runs)} has a samples.npz, which a new run writes")
    return _tsne({name: (seeds[0], "f1") for name, seeds in _by_name(sampled).items()}, out, "figure5")


def _tsne(panels: Mapping[str, tuple[Run, str]], out: Path, name: str, about: str = "") -> Path:
    """One t-SNE panel for each (run, name of an array in its samples.npz); about: the title of the legend."""
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score

    rows: list[dict[str, Any]] = []
    titles: dict[str, str] = {}
    names: list[str] = []
    for title, (run, array) in panels.items():
        if run.samples is None:
            raise UsageError(f"{name}: {run.folder} has no samples.npz, which a new run writes")
        features, label = run.samples[array].astype(np.float32), run.samples["feature_label"]
        classes = run.result["dataset"]["classes"]
        features, label = features[label < SHOWN_CLASSES], label[label < SHOWN_CLASSES]
        if not 2 <= len(set(label)) < len(label):
            raise UsageError(f"{name}: {run.folder} keeps features of {len(label)} images, takes more of each class")
        plane = TSNE(perplexity=min(30, (len(label) - 1) / 3), init="pca", random_state=0).fit_transform(features)
        titles[title] = f"{title}\nsilhouette {silhouette_score(features, label):.2f}"
        names += [of_class for of_class in classes[:SHOWN_CLASSES] if of_class not in names]
        for (x, y), class_index in zip(plane.tolist(), label, strict=True):
            rows.append({"panel": title, "x": x, "y": y, "class": classes[class_index]})
    shown = f"first {SHOWN_CLASSES} of {len(classes)} classes" if len(classes) > SHOWN_CLASSES else ""

    across = min(4, len(panels))
    down = math.ceil(len(panels) / across)
    width = COLUMN if len(panels) <= 2 else PAGE
    with _figure(down, across, width, 0.7 + down * (width / across + 0.15)) as (figure, axes):
        for ax in axes.flat[len(panels) :]:
            ax.set_visible(False)
        for (title, full_title), ax in zip(titles.items(), axes.flat):
            for index, of_class in enumerate(names):
                points = [row for row in rows if row["panel"] == title and row["class"] == of_class]
                form = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
                x, y = ([row[key] for row in points] for key in ("x", "y"))
                # The SVG has the points as pixels, because the vectors of twelve methods would be megabytes.
                ax.scatter(x, y, s=5, linewidths=0, rasterized=True, **form)
            ax.set(title=full_title, xticks=[], yticks=[])
        for ax in axes[:, 0]:
            ax.set_ylabel("t-SNE 2")
        for ax in axes.flat[max(0, len(panels) - across) : len(panels)]:  # the lowest panel of each column
            ax.set_xlabel("t-SNE 1")
        legend = figure.legend(
            axes.flat[0].collections,
            [of_class.replace("$", r"\$") for of_class in names],  # else matplotlib reads it as a formula
            loc="outside lower center",
            ncols=math.ceil(len(names) / (1 if width == PAGE else 2)),
            markerscale=2,
            handletextpad=0,
            columnspacing=1,
        )
        legend.set_title(", ".join(part for part in (about, shown) if part) or None, {"size": 7})
        return _save(figure, rows, out, name)


# -- figure 4 -----------------------------------------------------------------------------------------------------


def sweep(runs: Sequence[Run], out: Path) -> Path:
    """Figure 4: clean and PGD-20 accuracy against each of alpha, beta and gamma that was varied."""
    attacks = {attack: ATTACK_NAMES[attack] for attack in ("clean", "pgd20")}
    varied = [run for run in runs if run.varied]
    if not varied:
        raise UsageError(f"figure4: none of {_names(runs)} varies a weight, takes folders such as gamma-25-seed0")
    tasks = sorted({f"{run.arch} on {run.dataset}" for run in varied})
    if len(tasks) > 1:
        raise UsageError(f"figure4: takes sweeps of one network and data set, got {', '.join(tasks)}")
    rows: list[dict[str, Any]] = []
    for weight in WEIGHTS:
        at: dict[float, list[Run]] = {}
        for run in varied:
            if run.varied == weight:
                at.setdefault(_value(run, weight), []).append(run)
        for value, seeds in sorted(at.items()):
            for attack in attacks:
                measured = [run.trained[attack] for run in seeds]
                per_cent = [100 * accuracy["accuracy"] for accuracy in measured]
                row = {"weight": weight, "value": value, "attack": attack, "accuracy": statistics.fmean(per_cent)}
                if len(seeds) > 1:
                    deviation = statistics.stdev(per_cent)
                    row |= {"low": row["accuracy"] - deviation, "high": row["accuracy"] + deviation}
                else:
                    row |= {bound: 100 * at_bound for bound, at_bound in zip(("low", "high"), measured[0]["interval"])}
                rows.append(row | {"seeds": len(seeds), "n": measured[0]["n"]})

    shown = [weight for weight in WEIGHTS if any(row["weight"] == weight for row in rows)]
    width = {1: COLUMN, 2: 5.0, 3: PAGE}[len(shown)]
    with _figure(len(attacks), len(shown), width, 3.4, sharex="col", sharey="row") as (figure, axes):
        for column, weight in zip(axes.T, shown, strict=True):
            sign, of_paper = WEIGHTS[weight]
            values = sorted({row["value"] for row in rows if row["weight"] == weight})
            for index, (attack, ax) in enumerate(zip(attacks, column, strict=True)):
                points = [row for row in rows if (row["weight"], row["attack"]) == (weight, attack)]
                mean, low, high = (np.array([row[key] for row in points]) for key in ("accuracy", "low", "high"))
                if of_paper in values:
                    ax.axvline(values.index(of_paper), color="0.6", linestyle=":", linewidth=1, label="paper's value")
                error, form = (
                    np.maximum([mean - low, high - mean], 0),
                    {"color": COLOURS[index], "marker": MARKERS[index]},
                )
                ax.errorbar(range(len(points)), mean, error, capsize=2, elinewidth=0.8, label=attacks[attack], **form)
                ax.margins(x=0.1)
            column[-1].set(xlabel=sign, xticks=range(len(values)), xticklabels=[f"{value:g}" for value in values])
        for ax, attack in zip(axes[:, 0], attacks.values(), strict=True):
            ax.set_ylabel(f"{attack} accuracy, %")
        entries = {
            label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=3)
        return _save(figure, rows, out, "figure4")


def _value(run: Run, weight: str) -> float:
    """The weight as the paper counts it. In all recipes but `paper`, beta is twice the paper's, for two steps on L2."""
    value = run.config["method"][weight]
    return value / 2 if weight == "beta" and run.config["recipe"] != "paper" else value


# Each figure by the name that the command line takes.
FIGURES: dict[str, Callable[[Sequence[Run], Path], Path]] = {
    "figure1a": feature_gap,
    "figure3": tsne,
    "figure4": sweep,
    "figure5": tsne_methods,
}


# -- which runs ---------------------------------------------------------------------------------------------------


def _methods(runs: Sequence[Run]) -> Sequence[Run]:
    """The runs that belong to no sweep; all runs if every one belongs to a sweep."""
    return [run for run in runs if not run.varied] or runs


def _by_name(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ only in their seed, by the name in the legend; AFD first, then as in Table 5."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (not run.label.startswith("AFD"), run.place, run.seed)):
        parts = [run.label]
        parts += [run.arch] * (len({other.arch for other in runs}) > 1)
        parts += [run.dataset] * (len({other.dataset for other in runs}) > 1)
        same = [other for other in runs if other.label == run.label]
        for setting, value in run.changed.items():
            if any(other.changed.get(setting) != value for other in same):
                parts.append(f"{setting} {value}")
        groups.setdefault(", ".join(parts), []).append(run)
    return groups


def _base(name: str) -> str:
    """The name without "(matched)": a matched run has the colour of its method."""
    return name.replace(" (matched)", "")


def _names(runs: Sequence[Run]) -> str:
    return ", ".join(str(run.folder) for run in runs)


# -- drawing and writing ------------------------------------------------------------------------------------------


@contextmanager
def _figure(rows: int, columns: int, width: float, height: float, **shared: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes (rows, columns), with STYLE until the block ends; width, height: in inches."""
    try:
        import matplotlib
        from matplotlib.figure import Figure  # without pyplot: no window, no global list of figures
    except ImportError:
        raise UsageError("plot: matplotlib is not installed; pip install 'fastafd[plot]'") from None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, **shared)


def _save(figure: Any, rows: Sequence[Mapping[str, Any]], out: Path, name: str) -> Path:
    """Write the picture and its numbers; returns the PNG's path."""
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    save_text(out / f"{name}.csv", text.getvalue())
    write_atomic(out / f"{name}.svg", lambda to: figure.savefig(to, format="svg", dpi=200, metadata={"Date": None}))
    write_atomic(out / f"{name}.png", lambda to: figure.savefig(to, format="png", dpi=200))
    return out / f"{name}.png"
