"""The time of each kernel in an AFD step, for the reference engine and for the fast engine.

    python -m benchmarks.profile_step [--arch resnet18] [--batch 128] [--device auto] [--out FILE]

On CUDA the device time of every kernel of a step, on a CPU the time of every operation, largest first. Batches are
random pixels; the arithmetic is that of a run. FILE is by default benchmarks/measured/DEVICE/profile.json, which git
ignores.
"""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.clock import device_name, result_file, save, wait
from benchmarks.forms import our_step, random_batches
from fastafd.device import resolve_amp, resolve_device
from fastafd.models import build_model
from fastafd.training.graphs import WARM_UPS

STEPS, SHOWN = 3, 25  # profiled steps, lines of the table


def rows_of(engine: str, arch: str, batch: int, device: torch.device) -> list[dict[str, Any]]:
    """A row for each kernel or operation: calls and milliseconds a step, and the share of the total."""
    torch.manual_seed(0)
    net = build_model(arch, 10).to(device)
    step = our_step(net, "afd", resolve_amp("auto", device), engine)
    (batch_of,) = random_batches(batch, 1, device)
    for _ in range(WARM_UPS + 2 if device.type == "cuda" else 1):
        step(*batch_of)
    wait(device)
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            step(*batch_of)
        wait(device)
    events = [
        (e.key, e.count, e.self_device_time_total if cuda else e.self_cpu_time_total) for e in profiler.key_averages()
    ]
    total = sum(us for *_, us in events) or 1.0
    rows = [
        {"engine": engine, "name": name, "calls": count / STEPS, "ms": us / STEPS / 1e3, "share": us / total}
        for name, count, us in events
        if us > 0
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def profile_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the most expensive rows of each engine."""
    lines = ["| engine | kernel | calls a step | ms a step | share |", "|---" * 5 + "|"]
    for engine in dict.fromkeys(row["engine"] for row in rows):
        of_engine = [row for row in rows if row["engine"] == engine]
        for row in of_engine[:SHOWN]:
            name = " ".join(row["name"].replace("|", " ").split())[:80]
            lines.append(f"| {engine} | {name} | {row['calls']:.0f} | {row['ms']:.3f} | {row['share']:.1%} |")
        calls, ms = (sum(row[key] for row in of_engine) for key in ("calls", "ms"))
        lines.append(f"| {engine} | all {len(of_engine)} | {calls:.0f} | {ms:.3f} | 100.0% |")
    return "\n".join(lines)


def profile_note(result: dict[str, Any]) -> str:
    """The line below the table: network, batch, device, version and date."""
    return (
        f"{result['arch']}, batch {result['batch']}, {result['device']}, PyTorch {result['torch']}, {result['date']}."
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.profile_step", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--batch", type=int, default=128, help="images a step")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    device = resolve_device(args.device)
    out = args.out or result_file("profile", device)
    torch.backends.cudnn.benchmark = True  # for both engines, because cuDNN keeps the first choice for a shape
    rows = [row for engine in ("reference", "fast") for row in rows_of(engine, args.arch, args.batch, device)]
    result: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__, "date": str(date.today())}
    result |= {"arch": args.arch, "batch": args.batch, "rows": rows}
    save(result, out)
    print(f"{profile_table(rows)}\n\n{profile_note(result)}\nall of it in {out}")
    return 0


if __name__ == "__main__":
    from fastafd.cli import run_script

    run_script(main)
