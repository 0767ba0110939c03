"""The pictures of the README and of docs/, as SVG, from committed results and from the code's imports.

    python -m benchmarks.pictures

Writes docs/figures/overview.svg (accuracies), epoch-time.svg (a step's forms on a CPU), roofline.svg (the parts of a
step by the roofline of its code) and map.svg (who imports whom). A test compares the committed files with this output.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from benchmarks.clock import RESULTS
from fastafd.settings import ATTACK_NAMES

ROOT = RESULTS.parents[1]
STYLE = """<style>
text{font:13px system-ui,sans-serif;fill:#222}.small{font-size:11px;fill:#555}.title{font-weight:600}
.a{fill:#0072B2}.b{fill:#D55E00}.c{fill:#009E73}.line{stroke:#888;fill:none}.grid{stroke:#ddd}
.room{fill:#eef3f8;stroke:#0072B2}
@media (prefers-color-scheme:dark){text{fill:#eee}.small{fill:#bbb}.grid{stroke:#444}.room{fill:#1d2a36}
.a{fill:#56B4E9}.b{fill:#E69F00}.c{fill:#2fc08f}}
</style>"""
# From the bottom up: a room imports from the rows below it alone (tests/test_structure.py holds the order).
ROOMS = [
    ["settings", "console", "kernels"],
    ["files", "device", "capture"],
    ["models", "attacks", "data", "reporting", "cli"],
    ["methods", "weights", "evaluation"],
    ["config", "checkpoint", "samples"],
    ["recipes"],
    ["training"],
    ["verification"],
    ["train", "pretrain", "verify", "evaluate", "report"],
]


def svg(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """A picture that fits light and dark pages."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img"'
        f' aria-label="{escape(title)}">\n{STYLE}\n' + "\n".join(parts) + "\n</svg>\n"
    )


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def bar(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" class="{kind}" rx="2"/>'


def overview() -> str:
    """Clean, PGD-20 and AutoAttack accuracy of two natural models and of the fine-tuned ones."""
    rows = [
        ("digits", "natural", "digits: natural"),
        ("digits", "AFD", "digits: AFD"),
        ("small-resnet18-natural", None, "ResNet-18, CIFAR-10: natural"),
        ("small-resnet18-off", "AFD", "100 steps, terms off"),
        ("small-resnet18-afd", "AFD", "100 steps of AFD"),
    ]
    parts = [text(10, 20, "Accuracy in per cent, l-infinity (small runs on a CPU)", "title")]
    for index, kind in enumerate("abc"):
        parts += [bar(10 + 120 * index, 30, 12, 12, kind), text(27 + 120 * index, 41, [*ATTACK_NAMES.values()][index])]
    y = 56
    for name, model, label in rows:
        result = json.loads((RESULTS / f"{name}.json").read_text())
        accuracies = result if model is None else result["models"][model]
        parts.append(text(200, y + 20, label, anchor="end"))
        parts.append(text(200, y + 35, f"eps {accuracies['eps']}", "small", anchor="end"))
        for index, attack in enumerate(ATTACK_NAMES):
            measured = accuracies.get(attack)
            at = y + 15 * index
            if measured is None:
                parts.append(text(212, at + 11, "not run", "small"))
                continue
            length = 3.2 * 100 * measured["accuracy"]
            parts.append(bar(210, at, max(length, 1), 12, "abc"[index]))
            label = f"{100 * measured['accuracy']:.1f}  n={measured['n']}"
            parts.append(text(216 + length, at + 11, label, "small"))
        y += 54
    return svg(640, y + 4, "Accuracies of natural and fine-tuned models", parts)


def bars(title: str, rows: Sequence[tuple[str, float, str]], note: str) -> str:
    """Horizontal bars: (label, value, words behind the bar)."""
    most = max(value for _, value, _ in rows)
    parts = [text(10, 20, title, "title")]
    for index, (label, value, words) in enumerate(rows):
        y = 34 + 24 * index
        parts += [text(150, y + 14, label, anchor="end"), bar(158, y, max(340 * value / most, 1), 18, "a")]
        parts.append(text(164 + 340 * value / most, y + 14, words, "small"))
    height = 34 + 24 * len(rows)
    return svg(640, height + 24, title, [*parts, text(10, height + 14, note, "small")])


def epoch_time() -> str:
    """Seconds of one AFD step of 16 images on a CPU, in five forms."""
    result = json.loads((RESULTS / "epoch-time-cpu.json").read_text())
    steps = 50_000 // result["batch"]
    rows = [
        (
            row["form"],
            row["epoch_s"] / steps,
            f"{row['epoch_s'] / steps:.2f} s, {row['times_paper_style']:.2f} x paper-style",
        )
        for row in result["rows"]
        if row["task"] == "afd"
    ]
    note = f"ResNet-18, batch {result['batch']}, {result['device']}, {result['threads']} threads, {result['date']}"
    return bars("Seconds of one AFD step on a CPU", rows, note)


def roofline() -> str:
    """Milliseconds of the parts of an AFD step on an H100, by the roofline of the generated code."""
    result = json.loads((RESULTS / "generated-resnet18.json").read_text())
    rows = []
    for part in result["rows"][0]["parts"]:
        spent = part["convolution_ms"] + part["other_ms"]
        if part["part"] != "step" and spent >= 0.01:
            rows.append((part["part"], spent, f"{spent:.2f} ms, {sum(part['launches'].values())} launches"))
    note = f"ResNet-18, batch {result['batch']}, bf16; a prediction, nothing has run; {result['date']}"
    return bars("An AFD step on an H100, by the roofline of its code", rows, note)


def imports() -> dict[str, set[str]]:
    """The rooms of fastafd that each room imports, from the source files."""
    direct: dict[str, set[str]] = {room: set() for row in ROOMS for room in row}
    for folder, prefix in ((ROOT / "fastafd", ""), (ROOT / "kernels", "kernels.")):
        for path in folder.rglob("*.py"):
            room = (prefix + ".".join(path.relative_to(folder).with_suffix("").parts)).split(".")[0]
            for node in ast.walk(ast.parse(path.read_text())):
                if room in direct and isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastafd"):
                    below = (node.module or "").split(".")[1:2] or [alias.name for alias in node.names]
                    direct[room] |= {target for target in below if target in direct and target != room}
    return direct


def essential(direct: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports without those that follow from others: a -> c where a -> b -> c."""

    def reached(room: str) -> set[str]:
        return direct[room].union(*(reached(target) for target in direct[room]))

    return {
        room: {target for target in targets if not any(target in reached(other) for other in targets - {target})}
        for room, targets in direct.items()
    }


def module_map() -> str:
    """The rooms of the code, each above all rooms that it imports."""
    width, step = 900, 84
    place = {}
    for level, row in enumerate(ROOMS):
        for index, room in enumerate(row):
            place[room] = (width * (index + 0.5) / len(row), 40 + step * (len(ROOMS) - 1 - level))
    parts = [
        text(10, 18, "A room imports rooms below it alone (imports that follow from others are not drawn)", "title")
    ]
    for room, targets in essential(imports()).items():
        for target in sorted(targets):
            (x, y), (to_x, to_y) = place[room], place[target]
            middle = (y + to_y) / 2 + 10
            parts.append(
                f'<path class="line" d="M{x:.0f} {y + 30:.0f}C{x:.0f} {middle:.0f} {to_x:.0f}'
                f' {middle:.0f} {to_x:.0f} {to_y:.0f}"/>'
            )
    for room, (x, y) in place.items():
        folder = (ROOT / "fastafd" / room).is_dir() or room == "kernels"
        parts.append(f'<rect class="room" x="{x - 62:.0f}" y="{y:.0f}" width="124" height="30" rx="4"/>')
        parts.append(text(x, y + 20, f"{room}/" if folder else f"{room}.py", anchor="middle"))
    return svg(width, 40 + step * len(ROOMS), "Map of the modules and their imports", parts)


PICTURES = {"overview": overview, "epoch-time": epoch_time, "roofline": roofline, "map": module_map}


def main() -> int:
    argparse.ArgumentParser(
        "benchmarks.pictures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for name, draw in PICTURES.items():
        path: Path = ROOT / "docs" / "figures" / f"{name}.svg"
        path.write_text(draw())
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    from fastafd.cli import run_script

    run_script(main)
