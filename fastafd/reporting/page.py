"""A report as one HTML file: nothing is loaded from elsewhere, no script, light and dark, screen and paper."""

from __future__ import annotations

import base64
import io
import json
import math
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
from fastafd.reporting.figures import CAPTIONS
from fastafd.reporting.runs import Run
from fastafd.settings import pixels

ATTACKS = {"clean": "clean", "pgd20": "PGD-20", "autoattack": "AutoAttack"}
# Of the seconds of fine-tuning: logged phase -> part of the bar. What is in none, logged or not, is "other".
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
FLAT = ("task", "method", "sgd")  # parts of a config whose settings go by their own names
IN_PIXELS = ("eps", "step_size", "step_low", "step_high")  # settings that are written as 8/255


def write_page(runs: Sequence[Run], tables: Sequence[tuple[str, str]], figures: Sequence[Path], path: Path) -> None:
    """Write the report of `runs` to `path`.

    tables: (title, Markdown); figures: PNGs; an SVG of the same name beside one is shown in its place.
    """
    title = f"{runs[0].label} on {runs[0].dataset}" if len(runs) == 1 else f"{len(runs)} runs"
    own = "".join(_table_section(*table) for table in tables)
    sections = [("tables", "Tables", own)] if tables else []
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
    made = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
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
<header><h1>fastafd: {escape(title)}</h1><p>Finished {escape(made)}. Accuracy in per cent; attacks are l-infinity.</p>
{nav}</header>
<main>
{body}
</main>
</body>
</html>
""",
    )


# -- tables -------------------------------------------------------------------------------------------------------


def _table_section(title: str, text: str) -> str:
    return f"<h3>{escape(title)}</h3>{markdown_html(text)}"


def markdown_html(text: str) -> str:
    """Tables, lists and paragraphs of Markdown as HTML, with **bold** and `code`; all else is shown as it stands."""
    parts = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.splitlines()
        if all(line.lstrip().startswith("|") for line in lines) and len(lines) > 1:
            head, below, *rows = ([_inline(cell) for cell in _cells(line)] for line in lines)
            right = [index for index, dashes in enumerate(below) if dashes.endswith(":")]
            parts.append(_table(head, rows, right))
        elif all(line.startswith("- ") for line in lines):
            parts.append("<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in lines) + "</ul>")
        else:
            parts.append(f"<p>{_inline(' '.join(lines))}</p>")
    return "".join(parts)


def _cells(line: str) -> list[str]:
    inner = line.strip().removeprefix("|").removesuffix("|")
    return [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", inner)]


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    text = re.sub(r"(\[[\d.]+,) ([\d.]+\])", r"\1&nbsp;\2", text)  # an interval stays on one line
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Cells are HTML; columns `right` are set flush right. Wide tables scroll by themselves."""

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
    title, about = CAPTIONS.get(png.stem, (png.stem, ""))
    svg = png.with_suffix(".svg")
    kind, file = ("svg+xml", svg) if svg.exists() else ("png", png)
    return (
        f"<figure><h3>{escape(title)}</h3>"
        f'<div class="scroll paper" tabindex="0">{_image(kind, file.read_bytes(), f"{title}: {about}")}</div>'
        f"<figcaption>{escape(about)}</figcaption></figure>"
    )


def _image(kind: str, data: bytes, alt: str) -> str:
    return f'<img src="data:image/{kind};base64,{base64.b64encode(data).decode()}" alt="{escape(alt)}">'


# -- seconds ------------------------------------------------------------------------------------------------------


def seconds_by_part(run: Run) -> dict[str, float]:
    """Seconds of the parts of a run, PHASES, that took any; pre-training of unknown length is left out."""
    seconds = run.result["seconds"]
    found = dict.fromkeys(PHASES, 0.0)
    found["pre-training"] = seconds["pretraining"] or 0.0
    for phase, spent in seconds["finetuning"].items():
        if phase in PARTS:
            found[PARTS[phase]] += spent
    logged = sum(found[part] for part in set(PARTS.values()))
    found["other"] = max(0.0, seconds["finetuning"]["wall"] - logged)
    found["evaluation"] = seconds["evaluation"]
    return {part: spent for part, spent in found.items() if spent}


def _time(runs: Sequence[Run]) -> str:
    """A bar a run, and the same in a table."""
    of_runs = [seconds_by_part(run) for run in runs]
    longest = max(sum(parts.values()) for parts in of_runs)
    shown = [part for part in PHASES if part == "pre-training" or any(part in parts for parts in of_runs)]
    bars, rows = [], []
    for run, parts in zip(runs, of_runs, strict=True):
        total = sum(parts.values())
        said = ", ".join(f"{part} {spent:.1f} s" for part, spent in parts.items())
        segments = "".join(
            f'<span class="p{PHASES.index(part)}" style="width:{100 * spent / total:.3f}%" '
            f'title="{part} {spent:.1f} s"></span>'
            for part, spent in parts.items()
        )
        bars.append(
            f'<div class="run"><span>{escape(_run_title(run))}</span><div class="track">'
            f'<div class="bar" role="img" aria-label="{said}" style="width:{100 * total / longest:.3f}%">{segments}'
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
    about = (
        f"{run.arch} on {data['name']}, {data['train']} training and {data['test']} test images of "
        f"{len(data['classes'])} classes; seed {run.seed}."
    )
    head = ["accuracy, %", *ATTACKS.values()]
    rows = [
        [escape(name), *(_accuracy(figures.get(attack)) for attack in ATTACKS)]
        for name, figures in (result["models"] | {result["label"]: run.trained}).items()
    ]
    made = {
        "device": result["device"],
        "arithmetic": result["amp"],
        "date": result["date"],
        "parameters": f"{result['parameters']['model']:,}; in training {result['parameters']['training']:,}",
        "Python": result["python"],
        **result["versions"],
    }
    terms = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in made.items())
    return (
        f"<p>{escape(about)}</p>{_table(head, rows)}"
        f"<h3>Training</h3>{_curves(run)}<h3>Examples</h3>{_examples(run)}"
        f"<h3>Configuration</h3>{_configuration(run)}<h3>Made with</h3><dl>{terms}</dl>"
    )


def _accuracy(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "not run"
    low, high = (100 * bound for bound in found["interval"])
    return f"{100 * found['accuracy']:.2f} <small>[{low:.1f}, {high:.1f}] n={found['n']}</small>"


def _curves(run: Run) -> str:
    """Accuracies and loss, a point a line of the log."""

    def points(name: str, factor: float = 1.0) -> list[tuple[float, float]]:
        return [(line["step"], factor * line[name]) for line in run.log if name in line]

    accuracies = {"clean": points("clean_accuracy", 100), "adversarial": points("adversarial_accuracy", 100)}
    charts = [
        line_chart("accuracy of training batches, %", {name: line for name, line in accuracies.items() if line}, 100),
        line_chart("loss", {"loss": points("loss")}),
    ]
    return f'<div class="charts">{"".join(charts)}</div>'


def _examples(run: Run) -> str:
    kept = run.samples
    if kept is None:
        return "<p>This run kept no examples (samples.npz).</p>"
    classes, eps = run.result["dataset"]["classes"], pixels(run.trained["eps"], "eps")
    shown = []
    for image, change, label, clean, attacked in zip(
        kept["images"], kept["perturbation"].astype(np.float32), kept["label"], kept["clean"], kept["attacked"]
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
            f"<span>{escape(said)}{'' if right else '&nbsp;✗'}</span></div>"
            for said, (picture, right, alt) in pictures.items()
        )
        shown.append(f"<li><p>{escape(true)}</p><div>{cells}</div></li>")
    return (
        f"<p>Test images, each under its true class: clean and attacked by PGD-20 with eps {run.trained['eps']}, with "
        f"what the model takes it for (✗ where wrong), and the perturbation, magnified {0.5 / eps:.0f} times around "
        f'grey.</p><ul class="examples">{"".join(shown)}</ul>'
    )


def _pixels(x: np.ndarray) -> np.ndarray:
    return np.round(255 * np.clip(x, 0, 1)).astype(np.uint8)


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=True)
    return file.getvalue()


def _configuration(run: Run) -> str:
    """Every setting; those that are not the recipe's own are marked."""
    rows = []
    for name, value in _settings(run.config):
        shown = escape(_shown(name, value))
        mark = f"<strong>{shown}</strong> <mark>not the recipe's</mark>" if name in run.changed else shown
        rows.append([f"<code>{escape(name)}</code>", mark])
    count = f"{len(run.changed)} of {len(rows)} are not those of recipe {escape(str(run.config['recipe']))}"
    return f"<details><summary>{len(rows)} settings; {count}</summary>{_table(['setting', 'value'], rows)}</details>"


def _settings(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(name as the command line has it, value) of every setting."""
    found: list[tuple[str, Any]] = []
    for name, value in config.items():
        if isinstance(value, dict):
            found += _settings(value, prefix if name in FLAT else f"{prefix}{name}.")
        else:
            found.append((prefix + name, value))
    return found


def _shown(name: str, value: Any) -> str:
    if (
        isinstance(value, float)
        and name.rpartition(".")[2] in IN_PIXELS
        and math.isclose(round(255 * value), 255 * value)
    ):
        return f"{round(255 * value)}/255"
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)
