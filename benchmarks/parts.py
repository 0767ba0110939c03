"""Run commands one after another, unattended, within a time budget; `gpu_suite` and `reproduce` use this.

Each part runs for as long as its cap and what is left of the budget allow; where one fails or runs out of time, the
next one starts. The folder holds, after every part, summary.json (what came of each) and logs.txt (the end of all that
they said). The same folder again goes on: parts that are ok are not run again.
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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import device_name
from fastafd.cli import BUG
from fastafd.device import resolve_device
from fastafd.files import save_text

ROOT = Path(__file__).resolve().parents[1]
LEAST = 5  # seconds of budget that must be left to start a part
KEPT = 200 * 1024  # bytes that are kept of the end of each log
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# Lines that do not say what happened: about result files, PyTorch's log, the line below a traceback, ornaments
ASIDE = re.compile(rf"all of it in |[IW]\d{{4}} \d\d:|{re.escape(BUG)}|\W*$")


class NotNow(Exception):
    """A part cannot start, and why: a result that it needs does not exist."""


@dataclass(frozen=True)
class Part:
    """A command, its time limit in seconds, and the reason if it is left out.

    The command may be a function that makes it when the part begins. `env` goes over the environment.
    """

    name: str
    command: list[str] | Callable[[], list[str]]
    cap: float
    left_out: str = ""
    env: dict[str, str] = field(default_factory=dict)


def python(module: str, *arguments: object) -> list[str]:
    """The command `python -m module …`."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def run(chosen: list[Part], budget: float, out: Path, after: Callable[[], None] = lambda: None) -> int:
    """Run the parts within `budget` seconds, leave their results in `out`, print a table; returns the exit code.

    `after` is called when a part has ended, whatever came of it. 1 where a part that ran is not ok.
    """
    ends = time.monotonic() + budget
    summary: dict[str, Any] = {
        "device": device_name(resolve_device("auto")),
        "versions": versions(),
        "date": str(date.today()),
        "budget_s": budget,
    }
    done = earlier(out)
    for part in chosen:
        before = done.get(part.name)
        if before is not None and before["result"] == "ok":
            continue
        left = ends - time.monotonic()
        why, command = part.left_out or ("no time left" if left < LEAST else ""), []
        if not why:
            try:
                command = part.command if isinstance(part.command, list) else part.command()
            except NotNow as reason:
                why = str(reason)
        if why:
            done[part.name] = before or {"part": part.name, "seconds": 0.0, "result": "left out", "line": why}
        else:
            print(f"{part.name}: {left:.0f} s left", flush=True)
            row = run_part(part.name, command, part.env, min(part.cap, left), out)
            row["seconds"] += before["seconds"] if before is not None else 0.0
            done[part.name] = row
            after()
        rows = [done[name] for name in (part.name for part in chosen) if name in done]
        save_text(out / "summary.json", json.dumps(summary | {"rows": rows}, indent=1) + "\n")
    rows = [done[part.name] for part in chosen]
    print(f"\n{parts_note(summary)}\n\n{parts_table(rows)}")
    return int(any(row["result"] not in ("ok", "left out") for row in rows))


def earlier(out: Path) -> dict[str, dict[str, Any]]:
    """The results of the parts that ran in this folder before, by name, without parts that were left out."""
    file = out / "summary.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    return {row["part"]: row for row in rows if row["result"] != "left out"}


def run_part(name: str, command: list[str], env: dict[str, str], limit: float, out: Path) -> dict[str, Any]:
    """Run a command for at most `limit` seconds, then end its process group. Parts share one compiler cache."""
    began, cache = time.monotonic(), str(Path(tempfile.gettempdir()) / "fastafd-gpu-suite")
    log = out / f"{name}.log"
    with log.open("wb") as said:
        usual = signal.signal(
            signal.SIGTERM, lambda number, _: sys.exit(128 + number)
        )  # so that the part ends with this process
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
            | os.environ
            | {"PYTHONUNBUFFERED": "1"}
            | env,
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
            signal.signal(signal.SIGTERM, usual)
    seconds = round(time.monotonic() - began, 1)
    line = last_line(log.read_text(errors="replace"))
    with (out / "logs.txt").open("ab") as joined:
        text = log.read_bytes()
        left = f", its last {KEPT} of {len(text)} bytes" if len(text) > KEPT else ""
        joined.write(f"==== {name}{left} ====\n".encode() + text[-KEPT:] + b"\n")
    log.unlink()
    return {"part": name, "seconds": seconds, "result": result, "line": line}


def last_line(said: str) -> str:
    """The last line with information, without colours."""
    lines = [" ".join(ESCAPES.sub("", line).split()) for line in said.splitlines()]
    telling = [line for line in lines if not ASIDE.match(line)]
    return telling[-1][:160] if telling else ""


def versions() -> dict[str, str]:
    """The versions of Python, PyTorch, CUDA and cuDNN, and of Triton if it is installed."""
    installed = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    with suppress(metadata.PackageNotFoundError):
        installed["triton"] = metadata.version("triton")
    return installed | {"cudnn": str(torch.backends.cudnn.version())}


def parts_table(rows: list[dict[str, Any]]) -> str:
    """A table: part, seconds, result, last line of its output."""
    width = max(len(row["part"]) for row in rows)
    lines = [f"{'part':{width}}  seconds  {'result':11}  last line"]
    lines += [f"{row['part']:{width}}  {row['seconds']:7.1f}  {row['result']:11}  {row['line']}" for row in rows]
    return "\n".join(lines)


def parts_note(summary: dict[str, Any]) -> str:
    """The line above the table: device, versions, date."""
    return (
        f"{summary['device']}; {', '.join(' '.join(item) for item in summary['versions'].items())}; {summary['date']}."
    )


def seconds(text: str) -> float:
    """The seconds of a budget such as 9 or 9m (minutes) or 540s."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([ms]?)", text)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"got {text!r}, takes minutes or seconds above 0, such as 9, 9m or 540s")
    return float(match[1]) * (1 if match[2] == "s" else 60)


def arguments(prog: str, about: str) -> argparse.ArgumentParser:
    """The flags that all these commands have."""
    parser = argparse.ArgumentParser(prog=prog, description=about)
    parser.add_argument("--budget", type=seconds, required=True, metavar="MINUTES", help="for all parts: 9, 9m or 540s")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where all goes; again to go on")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: small sizes, without the longest parts")
    return parser
