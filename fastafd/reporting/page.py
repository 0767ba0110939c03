"""A report as one HTML file. It loads nothing and has no script; it fits light and dark, screen and paper."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastafd.files import save_text
from fastafd.reporting.charts import line_chart
from fastafd.reporting.figures import CAPTIONS, FIGURES
from fastafd.reporting.markdown import Table
from fastafd.reporting.runs import Run, in_order
from fastafd.reporting.tables import OF_PAPER, TABLES, fits, parameters, results
from fastafd.settings import ATTACK_NAMES, UsageError, pixels

# The part of the bar that a logged phase of the training belongs to. All other seconds are the part "other".
PARTS = {
    "data": "data",
    "inputs": "data",
    "augment": "data",
    "attack": "attack",
    "teacher": "teacher",
    "update": "update",
    "step": "step in one graph",
    "compile": "compiling",
    "criticality": "choosing (RiFT)",
    "mixing": "choosing (RiFT)",
}
PHASES = ("pre-training", *dict.fromkeys(PARTS.values()), "other", "evaluation")


def report(runs: Sequence[Run], folder: Path) -> Path:
    """Write `report.html` into the folder, with every table and figure that the runs have data for.

    Returns its path.
    """
    tables = [("Results", results(runs)), ("Parameters", parameters(runs))]
    tables += [(title, TABLES[name](runs)) for name, title in OF_PAPER.items() if any(fits(run) for run in runs)]
    pictures = []
    for draw in FIGURES.values():
        try:
            pictures.append(draw(runs, made(folder / "figures")))
        except UsageError as error:
            if str(error).startswith("plot"):  # matplotlib is missing; any other error: no run for this figure
                raise
    write_page(in_order(runs), tables, pictures, folder / "report.html")
    return folder / "report.html"


def made(folder: Path) -> Path:
    """The folder, which is created if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_page(
    runs: Sequence[Run], tables: Sequence[tuple[str, Sequence[Table]]], figures: Sequence[Path], path: Path
) -> None:
    """Write the report of `runs` to `path`.

    tables: (title, tables below it). figures: PNG files; if an SVG file of the same name lies beside one, it is shown
    instead.
    """
    title = f"{len(runs)} runs"
    if len(runs) == 1:
        title = f"{runs[0].label} on {runs[0].dataset}, eps {runs[0].trained['eps']}"
    inner = "".join(f"<h3>{escape(heading)}</h3>{tables_html(below)}" for heading, below in tables)
    sections = [("tables", "Tables", inner)] if tables else []
    if figures:
        sections.append(("figures", "Figures", "".join(_figure(figure) for figure in figures)))
    sections.append(("time", "Seconds", _time(runs)))
    sections += [(f"run-{index}", _run_title(run), _run(run)) for index, run in enumerate(runs, 1)]
    contents = "".join(f'<li><a href="#{name}">{escape(heading)}</a></li>' for name, heading, _ in sections)
    nav = f'<nav aria-label="Contents"><ol>{contents}</ol></nav>' if len(runs) > 1 else ""
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{escape(heading)}</h2>{inner}'
        "</section>"
        for name, heading, inner in sections
    )
    dates = sorted({run.result["date"][:10] for run in runs})
    style = files("fastafd.reporting").joinpath("page.css").read_text()
    finished = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    save_text(
        path,
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>fastafd: {escape(title)}</title>
<style>{style}</style>
</head>
<body>
<header><h1>fastafd: {escape(title)}</h1>
<p>Finished {escape(finished)}. Accuracy in per cent; attacks are l-infinity.</p>
{nav}</header>
<main>
{body}
</main>
</body>
</html>
""",
    )


# -- tables -------------------------------------------------------------------------------------------------------


def tables_html(tables: Sequence[Table]) -> str:
    """The tables as HTML, with their titles, notes and left-out runs."""
    parts = []
    for table in tables:
        parts.append(f"<p>{_text(table.title)}</p>" if table.title else "")
        rows = [[_text(cell) for cell in row] for row in table.rows]
        parts.append(_table([_text(cell) for cell in table.head], rows))
        parts += [f"<p>{_text(note)}</p>" for note in table.notes]
        if table.left_out:
            items = "".join(f"<li>{_text(line)}</li>" for line in table.left_out)
            parts.append(f"<p>Left out:</p><ul>{items}</ul>")
    return "".join(parts)


def _text(text: str) -> str:
    """The text as HTML; an interval stays on one line."""
    return re.sub(r"(\[[\d.]+,) ([\d.]+\])", r"\1&nbsp;\2", escape(text))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """An HTML table; the cells are HTML. right: indices of the columns that are flush right. A wide table scrolls."""

    def row(cells: Sequence[str]) -> str:
        first, *rest = (f' class="right">{cell}' if at in right else f">{cell}" for at, cell in enumerate(cells))
        return f'<tr><th scope="row"{first}</th>' + "".join(f"<td{cell}</td>" for cell in rest) + "</tr>"

    top = "".join(f'<th scope="col"{" class=right" if at in right else ""}>{cell}</th>' for at, cell in enumerate(head))
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(row(cells) for cells in rows)}</tbody></table></div>"
    )


# -- figures ------------------------------------------------------------------------------------------------------


def _figure(png: Path) -> str:
    title, caption = CAPTIONS.get(png.stem, (png.stem, ""))
    svg = png.with_suffix(".svg")
    kind, file = ("svg+xml", svg) if svg.exists() else ("png", png)
    return (
        f"<figure><h3>{escape(title)}</h3>"
        f'<div class="scroll paper" tabindex="0">{_image(kind, file.read_bytes(), f"{title}: {caption}")}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _image(kind: str, data: bytes, alt: str) -> str:
    return f'<img src="data:image/{kind};base64,{base64.b64encode(data).decode()}" alt="{escape(alt)}">'


# -- seconds ------------------------------------------------------------------------------------------------------


def seconds_by_part(run: Run) -> dict[str, float]:
    """The seconds of each part of a run, without parts that took none and without pre-training of unknown length."""
    seconds = run.result["seconds"]
    parts = dict.fromkeys(PHASES, 0.0)
    parts["pre-training"] = seconds["pretraining"] or 0.0
    for phase, spent in seconds["finetuning"].items():
        if phase in PARTS:
            parts[PARTS[phase]] += spent
    logged = sum(parts[part] for part in set(PARTS.values()))
    parts["other"] = max(0.0, seconds["finetuning"]["wall"] - logged)
    parts["evaluation"] = seconds["evaluation"]
    return {part: spent for part, spent in parts.items() if spent}


def _time(runs: Sequence[Run]) -> str:
    """A bar for each run, and the same numbers in a table."""
    parts_of_runs = [seconds_by_part(run) for run in runs]
    longest = max(sum(parts.values()) for parts in parts_of_runs)
    shown = [part for part in PHASES if part == "pre-training" or any(part in parts for parts in parts_of_runs)]
    bars, rows = [], []
    for run, parts in zip(runs, parts_of_runs, strict=True):
        total = sum(parts.values())
        label = ", ".join(f"{part} {spent:.1f} s" for part, spent in parts.items())
        segments = "".join(
            f'<span class="p{PHASES.index(part)}" style="width:{100 * spent / total:.3f}%" '
            f'title="{part} {spent:.1f} s"></span>'
            for part, spent in parts.items()
        )
        bars.append(
            f'<div class="run"><span>{escape(_run_title(run))}</span><div class="track">'
            f'<div class="bar" role="img" aria-label="{label}" style="width:{100 * total / longest:.3f}%">{segments}'
            "</div></div></div>"
        )
        cells = [f"{parts[part]:.1f}" if part in parts else "–" for part in shown]
        if run.result["seconds"]["pretraining"] is None:
            cells[0] = "not known"
        rows.append([escape(_run_title(run)), *cells, f"{total:.1f}"])
    legend = "".join(f'<li><span class="swatch p{PHASES.index(part)}"></span>{part}</li>' for part in shown)
    head = ["seconds", *shown, "together"]
    return (
        f'<ul class="legend">{legend}</ul><div class="bars">{"".join(bars)}</div>'
        + _table(head, rows, range(1, len(head)))
        + "<p>Data is waiting for batches, moving and augmenting them; other is the weight average, measuring feature "
        "gaps, saving, and what was not logged. Pre-training may have been done once for several runs.</p>"
    )


# -- one run ------------------------------------------------------------------------------------------------------


def _run_title(run: Run) -> str:
    return f"{run.label}, {run.folder.name}"


def _run(run: Run) -> str:
    result = run.result
    data = result["dataset"]
    summary = (
        f"{run.arch} on {data['name']}, {data['train']} training and {data['test']} test images of "
        f"{len(data['classes'])} classes; seed {run.seed}."
    )
    head = ["accuracy, %", *ATTACK_NAMES.values()]
    rows = [
        [escape(name), *(_accuracy(accuracies.get(attack)) for attack in ATTACK_NAMES)]
        for name, accuracies in (result["models"] | {result["label"]: run.trained}).items()
    ]
    made_with = {
        "device": result["device"],
        "arithmetic": result["amp"],
        "date": result["date"],
        "parameters": f"{result['parameters']['model']:,}; in training {result['parameters']['training']:,}",
        "Python": result["python"],
        **result["versions"],
    }
    terms = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in made_with.items()
    )
    return (
        f"<p>{escape(summary)}</p>{_table(head, rows)}"
        f"<h3>Training</h3>{_curves(run)}<h3>Examples</h3>{_examples(run)}"
        f"<h3>Configuration</h3>{_configuration(run)}<h3>Made with</h3><dl>{terms}</dl>"
    )


def _accuracy(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return "not run"
    low, high = (100 * bound for bound in measured["interval"])
    return f"{100 * measured['accuracy']:.2f} <small>[{low:.1f}, {high:.1f}] n={measured['n']}</small>"


def _curves(run: Run) -> str:
    """Charts of the accuracies and of the loss; each line of the log is a point."""

    def points(name: str, factor: float = 1.0) -> list[tuple[float, float]]:
        return [(line["step"], factor * line[name]) for line in run.log if name in line]

    accuracies = {"clean": points("clean_accuracy", 100), "adversarial": points("adversarial_accuracy", 100)}
    charts = [
        line_chart("accuracy of training batches, %", {name: line for name, line in accuracies.items() if line}, 100),
        line_chart("loss", {"loss": points("loss")}),
    ]
    return f'<div class="charts">{"".join(charts)}</div>'


def _examples(run: Run) -> str:
    samples = run.samples
    if samples is None:
        return "<p>This run kept no examples (samples.npz).</p>"
    classes, eps = run.result["dataset"]["classes"], pixels(run.trained["eps"], "eps")
    shown = []
    for image, change, label, clean, attacked in zip(
        samples["images"],
        samples["perturbation"].astype(np.float32),
        samples["label"],
        samples["clean"],
        samples["attacked"],
    ):
        true, seen, fooled = (classes[index] for index in (label, clean, attacked))
        pictures = {
            f"clean: {seen}": (image, seen == true, f"clean image of {true}, taken for {seen}"),
            f"attacked: {fooled}": (
                _pixels(image / 255 + change),
                fooled == true,
                f"attacked image of {true}, taken for {fooled}",
            ),
            f"change ×{0.5 / eps:.0f}": (
                _pixels(change / eps * 0.5 + 0.5),
                True,
                f"its perturbation, magnified {0.5 / eps:.0f} times",
            ),
        }
        cells = "".join(
            f'<div class="{"" if right else "wrong"}">{_image("png", _png(picture), alt)}'
            f"<span>{escape(caption)}{'' if right else '&nbsp;✗'}</span></div>"
            for caption, (picture, right, alt) in pictures.items()
        )
        shown.append(f"<li><p>{escape(true)}</p><div>{cells}</div></li>")
    return (
        f"<p>Test images, each under its true class: clean and attacked by PGD-20 with eps {run.trained['eps']}, with "
        f"what the model takes it for (✗ if wrong), and the perturbation, magnified {0.5 / eps:.0f} times around "
        f'grey.</p><ul class="examples">{"".join(shown)}</ul>'
    )


def _pixels(x: np.ndarray) -> np.ndarray:
    return np.round(255 * np.clip(x, 0, 1)).astype(np.uint8)


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=True)
    return file.getvalue()


def _configuration(run: Run) -> str:
    """Every setting; those that differ from the recipe's are marked."""
    rows = []
    for name, value in run.settings.items():
        shown = escape(value if isinstance(value, str) else "none" if value is None else json.dumps(value))
        mark = f"<strong>{shown}</strong> <mark>not the recipe's</mark>" if name in run.changed else shown
        rows.append([f"<code>{escape(name)}</code>", mark])
    count = f"{len(run.changed)} of {len(rows)} differ from recipe {escape(str(run.config['recipe']))}"
    return f"<details><summary>{len(rows)} settings; {count}</summary>{_table(['setting', 'value'], rows)}</details>"
