"""Everything that a first session on a GPU measures, in one command and within a time budget.

    python -m benchmarks.gpu_suite --budget 9m --out DIR
    python -m benchmarks.gpu_suite --budget 9m --out DIR --device cpu --tiny     # a rehearsal on any machine

The parts run one after another, each for as long as its cap and what is left of the budget allow; where one fails or
runs out of time, the next one starts. DIR, which must be new or empty, then holds a JSON file of each part that writes
one, summary.json, and all that the parts said in logs.txt. Exit code 1 where a part that ran is not ok.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import device_name
from fastafd.engine import resolve_device

ROOT = Path(__file__).resolve().parents[1]
LEAST = 5  # seconds: with less left of the budget a part is not begun
KEPT = 200 * 1024  # bytes of each log, its end
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
ASIDE = re.compile(r"all of it in |[IW]\d{4} \d\d:|\W*$")  # where the results are, PyTorch's log, ornaments


@dataclass(frozen=True)
class Part:
    """A command, the most seconds it may take, and why it is left out, if it is."""

    name: str
    command: list[str]
    cap: float
    left_out: str = ""


def parts(out: Path, device: str, tiny: bool, data_dir: Path | None = None) -> list[Part]:
    """The suite. Later parts find less of the budget: what matters most comes first."""

    def python(module: str, *arguments: object) -> list[str]:
        return [sys.executable, "-m", module, *map(str, arguments)]

    pytest = ["--tb=line", "--continue-on-collection-errors"]
    for_gpus = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    tests = ["tests/test_formulas.py"] if tiny else ["-m", "gpu", *for_gpus]
    where = [] if device == "auto" else ["--device", device]
    small = [*where, "--arch", "resnet8_half"] if tiny else where
    fewer, rehearsal = (["--batch", "4", "--rounds", "2"], ["--tiny"]) if tiny else ([], [])
    few = ["--batch-size", "8", "--comparisons", "2"] if tiny else []
    slow = "takes minutes on a CPU" if tiny else ""
    names = ("verify", "epoch-resnet18", "profile", "epoch", "kernels", "convolutions")
    verify, first, profile, epoch, kernels, convolutions = (["--out", out / f"{name}.json"] for name in names)
    times = ["--quick", *where, *rehearsal, *([] if data_dir is None else ["--data-dir", data_dir])]
    return [
        Part("tests", python("pytest", *pytest, *tests), 120),
        Part("numerics", python("pytest", *pytest, "tests/test_kernel_numerics.py"), 60, slow),
        Part("verify", python("fastafd.verify", *small, *few, *verify), 150),
        Part(
            "epoch-resnet18",
            python("benchmarks.epoch_time", *times, "--arch", "resnet18", "--tasks", "afd", *first),
            150,
        ),
        Part("profile", python("benchmarks.profile_step", *small, *profile), 60, slow),
        Part("kernels", python("benchmarks.kernels", *kernels), 60, slow),
        Part("epoch", python("benchmarks.epoch_time", *times, *epoch), 240, "the same as before" if tiny else ""),
        Part("convolutions", python("benchmarks.convolutions", *small, *fewer, *convolutions), 240),
    ]


def run_part(part: Part, limit: float, log: Path) -> dict[str, Any]:
    """Run a part for at most `limit` seconds, then end its whole process group; parts share what they compile."""
    began, cache = time.monotonic(), str(Path(tempfile.gettempdir()) / "fastafd-gpu-suite")
    with log.open("wb") as said:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env={"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache} | os.environ | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            result = "failed" if process.wait(limit) else "ok"
        except subprocess.TimeoutExpired:
            result = "out of time"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = round(time.monotonic() - began, 1)
    return {"part": part.name, "seconds": seconds, "result": result, "line": last_line(log.read_text(errors="replace"))}


def last_line(said: str) -> str:
    """The last line that tells something, without colours."""
    lines = [" ".join(ESCAPES.sub("", line).split()) for line in said.splitlines()]
    telling = [line for line in lines if not ASIDE.match(line)]
    return telling[-1][:160] if telling else ""


def join_logs(out: Path, names: list[str]) -> None:
    """One file logs.txt of the ends of all logs, in the place of them."""
    with (out / "logs.txt").open("wb") as joined:
        for name in names:
            log = out / f"{name}.log"
            said = log.read_bytes()
            left = f", its last {KEPT} of {len(said)} bytes" if len(said) > KEPT else ""
            joined.write(f"==== {name}{left} ====\n".encode() + said[-KEPT:] + b"\n")
            log.unlink()


def run(chosen: list[Part], budget: float, out: Path) -> int:
    """Run the parts within `budget` seconds, leave what they found in `out`, print a table of them; the exit code."""
    ends = time.monotonic() + budget
    rows: list[dict[str, Any]] = []
    for part in chosen:
        left = ends - time.monotonic()
        why = part.left_out or ("no time left" if left < LEAST else "")
        if why:
            rows.append({"part": part.name, "seconds": 0.0, "result": "left out", "line": why})
            continue
        print(f"{part.name}: {left:.0f} s left", flush=True)
        rows.append(run_part(part, min(part.cap, left), out / f"{part.name}.log"))
    join_logs(out, [row["part"] for row in rows if row["result"] != "left out"])
    summary = {
        "device": device_name(resolve_device("auto")),
        "versions": versions(),
        "date": str(date.today()),
        "budget_s": budget,
    }
    (out / "summary.json").write_text(json.dumps(summary | {"rows": rows}, indent=1) + "\n")
    print(f"\n{about(summary)}\n\n{table(rows)}")
    return int(any(row["result"] not in ("ok", "left out") for row in rows))


def versions() -> dict[str, str]:
    """Of Python, PyTorch with what it was built for, and Triton where it is."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    with suppress(metadata.PackageNotFoundError):
        found["triton"] = metadata.version("triton")
    return found | {"cudnn": str(torch.backends.cudnn.version())}


def table(rows: list[dict[str, Any]]) -> str:
    """In columns: part, seconds, result, the last line that it said."""
    width = max(len(row["part"]) for row in rows)
    lines = [f"{'part':{width}}  seconds  {'result':11}  last line"]
    lines += [f"{row['part']:{width}}  {row['seconds']:7.1f}  {row['result']:11}  {row['line']}" for row in rows]
    return "\n".join(lines)


def about(found: dict[str, Any]) -> str:
    """What ran on what, and when."""
    return f"{found['device']}; {', '.join(' '.join(item) for item in found['versions'].items())}; {found['date']}."


def seconds(text: str) -> float:
    """Of a budget such as 9m, 540s or 540."""
    given = re.fullmatch(r"(\d+(?:\.\d+)?)([ms]?)", text)
    if not given or not float(given[1]):
        raise argparse.ArgumentTypeError(f"got {text!r}, takes minutes or seconds above 0, such as 9m, 540s or 540")
    return float(given[1]) * (60 if given[2] == "m" else 1)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_suite", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=seconds, required=True, help="for all parts: 9m, 540s or 540")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: small sizes, without the longest parts")
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10: whole epochs of it as well")
    given = parser.parse_args(argv)
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        parser.error(f"--out: {out} is not empty, takes a new or an empty folder")
    return run(parts(out, given.device, given.tiny, given.data_dir), given.budget, out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
