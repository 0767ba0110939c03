"""Times of every operation of `fastafd.kernels` on this machine.

    python -m benchmarks.kernels [--out FILE]

Runs benchmarks/bench_kernels.py under pytest-benchmark, prints a Markdown table (median of a call; GB/s of the bytes
that must move, and their share of what a plain copy reaches) and writes it as JSON (default:
benchmarks/results/kernels-DEVICE.json).
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


def device_name(device: torch.device) -> str:
    """The GPU's or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else []
    return models[0] if models else platform.machine()


def rows_of(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a form: microseconds a call, GB/s, share of a copy's."""
    rows = []
    for found in measured:
        info, seconds = found["extra_info"], found["stats"]["median"] / found["extra_info"]["calls"]
        kept = {name: info[name] for name in ("operation", "size", "form", "bytes")}
        rows.append(kept | {"us": round(seconds * 1e6, 2), "gb_s": round(info["bytes"] / seconds / 1e9, 1)})
    (copy,) = [row for row in rows if row["operation"] == "copy"]
    return [row | {"of_copy": round(row["gb_s"] / copy["gb_s"], 3)} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each operation and size."""
    lines = ["| operation | size | eager us | compiled us | ours us | GB/s | of a copy's |", "|---" * 7 + "|"]
    for name, size in dict.fromkeys((row["operation"], row["size"]) for row in rows):
        forms = {row["form"]: row for row in rows if (row["operation"], row["size"]) == (name, size)}
        best = forms.get("ours", forms["eager"])
        times = [f"{forms[form]['us']:.1f}" if form in forms else "" for form in ("eager", "compiled", "ours")]
        lines.append(f"| {name} | {size} | {' | '.join(times)} | {best['gb_s']:.1f} | {best['of_copy']:.0%} |")
    return "\n".join(lines)


def about(found: dict[str, Any]) -> str:
    """What was measured on what, and when."""
    return f"{found['device']}, PyTorch {found['torch']}, {found['date']}."


def main() -> int:
    cuda = torch.cuda.is_available()
    device = device_name(torch.device("cuda")) if cuda else device_name(torch.device("cpu")) + ", one thread"
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()) if cuda else "cpu"
    default = HERE / "results" / f"kernels-{name}.json"
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=default, metavar="FILE")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, "-m", "pytest", str(HERE / "bench_kernels.py"), f"--benchmark-json={found}"]
        done = subprocess.run([*command, "--benchmark-disable-gc", "--benchmark-quiet"], cwd=HERE.parent)
        if done.returncode:
            return 1
        rows = rows_of(json.loads(found.read_text())["benchmarks"])
    result = {"device": device, "torch": torch.__version__, "date": str(date.today()), "batch": 128, "rows": rows}
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{table(rows)}\n\n{about(result)}\nall of it in {out}")
    return 0


if __name__ == "__main__":
    from fastafd.console import run as run_command

    run_command(main)
