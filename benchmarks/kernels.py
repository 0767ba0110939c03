"""Times of every operation of `fastafd.kernels` on this machine.

    python -m benchmarks.kernels [--out FILE]

Times each case of benchmarks/bench_kernels.py with `benchmarks.clock.median_seconds`, prints a Markdown table (median
of a call; GB/s of the bytes that must move, and their share of what a large copy reaches, but none above 100 %, which
a cache makes possible) and writes it as JSON (default: benchmarks/measured/DEVICE/kernels.json, which git ignores). On
CUDA a round is one replay of a graph of the calls on all input sets, so that launches do not count and the larger
operations find no warm cache; on a CPU it is the calls themselves, in one thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_kernels import BATCH, CALLS, CASES, FORMS, form_of
from benchmarks.clock import device_name, median_seconds, result_file, save
from benchmarks.limits import share
from fastafd.device import resolve_device
from fastafd.reporting.markdown import markdown_table

ROUNDS = 100


def measured_rows(device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """A row for each operation, size and form: microseconds a call, GB/s, share of a copy's GB/s."""
    rows: list[dict[str, Any]] = []

    def time(name: str, size: str, form: str, call: Callable[..., Any], inputs: list[Any], moved: int) -> None:
        seconds = median_seconds(call, inputs, rounds, device)
        row = {"operation": name, "size": size, "form": form, "bytes": moved}
        rows.append(row | {"us": round(seconds * 1e6, 2), "gb_s": round(moved / seconds / 1e9, 1)})

    for (name, size), make in CASES.items():
        for form in FORMS:
            torch.manual_seed(0)
            case = make()
            with torch._dynamo.config.patch(trace_autograd_ops=True):
                time(name, size, form, form_of(case, form), [case.draw() for _ in range(CALLS)], case.moved)
    numbers = 2**26 if device.type == "cuda" else 2**24
    pairs = [[torch.rand(numbers, device=device) for _ in range(2)] for _ in range(2)]
    time("copy", "float32", "eager", lambda a, b: b.copy_(a), pairs, 2 * 4 * numbers)
    return [row | {"of_copy": round(row["gb_s"] / rows[-1]["gb_s"], 3)} for row in rows]


def kernels_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each operation and size."""
    lines = []
    for name, size in dict.fromkeys((row["operation"], row["size"]) for row in rows):
        forms = {row["form"]: row for row in rows if (row["operation"], row["size"]) == (name, size)}
        best = forms.get("ours", forms["eager"])
        times = [f"{forms[form]['us']:.1f}" if form in forms else "" for form in FORMS]
        lines.append([name, size, *times, f"{best['gb_s']:.1f}", share(best["of_copy"])])
    return markdown_table(["operation", "size", "eager us", "compiled us", "ours us", "GB/s", "of a copy's"], lines)


def kernels_note(result: dict[str, Any]) -> str:
    """The line below the table: device, version, date."""
    return f"{result['device']}, PyTorch {result['torch']}, {result['date']}."


def main() -> int:
    device = resolve_device("auto")
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=result_file("kernels", device), metavar="FILE")
    out = parser.parse_args().out
    name = device_name(device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # two threads that wait for each other measure everything else on the machine too
        name += ", one thread"
    rows = measured_rows(device, ROUNDS)
    result = {"device": name, "torch": torch.__version__, "date": str(date.today()), "batch": BATCH, "rows": rows}
    save(result, out)
    print(f"{kernels_table(rows)}\n\n{kernels_note(result)}\nall of it in {out}")
    return 0


if __name__ == "__main__":
    from fastafd.cli import run_script

    run_script(main)
