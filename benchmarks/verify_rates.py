"""How often `fastafd.verify` raises a false alarm, and which planted faults it finds.

    python -m benchmarks.verify_rates --runs 50 [--arch resnet8_half wrn10_1] [--amp fp32 bf16 fp16] [--out FILE]
    python -m benchmarks.verify_rates --faults [--amp fp32 bf16]

Runs without a fault differ in the seed of weights, batches and attack's starts; networks and types of arithmetic take
turns. Each fault of `benchmarks.faults` is planted once in each type; it counts as found where the certificate fails in
the group where it stands. FILE is by default benchmarks/measured/DEVICE/verify-rates.json, or verify-rates-faults.json;
git ignores both.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.clock import device_name, result_file
from benchmarks.faults import FAULTS
from fastafd import verify
from fastafd.device import resolve_device
from fastafd.files import as_json, save_text
from fastafd.settings import RunError


def certificate(*flags: object) -> dict[str, Any]:
    """What `python -m fastafd.verify` writes with these flags, verified or not."""
    torch._dynamo.reset()  # each certificate has steps of its own, and PyTorch compiles a function so often and no more
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "certificate.json"
        try:
            verify.main([*map(str, flags), "--out", str(out)])
        except RunError:
            if not out.exists():
                raise
        return json.loads(out.read_text())


@contextmanager
def uncompiled() -> Iterator[None]:
    """The fast engine's parts as they are written, for faults that do not depend on the compiler: in seconds."""
    with mock.patch.object(torch, "compile", lambda function, **_: function):
        yield


def far(certificate: dict[str, Any]) -> list[str]:
    """The groups of a certificate in which a quantity is too far."""
    return list(dict.fromkeys(row["group"] for row in certificate["rows"] if not row["ok"]))


def nearest(certificate: dict[str, Any]) -> dict[str, Any]:
    """The largest share of its limit that a quantity takes: in float64, and in the run's arithmetic with its group."""
    shares: dict[bool, tuple[float, str]] = {True: (0.0, ""), False: (0.0, "")}
    for row in certificate["rows"]:
        float64 = row["group"].startswith("float64")
        if row["limit"]:
            shares[float64] = max(shares[float64], (round(row["fast"] / row["limit"], 6), row["group"]))
    return {"float64": shares[True][0], "share": shares[False][0], "group": shares[False][1]}


def false_alarms(
    runs: int, arches: list[str], amps: list[str], device: str, seed: int, size: list[str]
) -> Iterator[dict[str, Any]]:
    kinds = [(arch, amp) for arch in arches for amp in amps]
    for index in range(runs):
        (arch, amp), turn = kinds[index % len(kinds)], seed + index // len(kinds)
        result = certificate("--arch", arch, "--amp", amp, "--device", device, "--seed", turn, *size)
        kind = {"arch": arch, "amp": amp, "seed": turn, "seconds": result["seconds"]}
        yield kind | {"false_alarm": not result["verified"], "far": far(result)} | nearest(result)


def planted(arches: list[str], amps: list[str], device: str, seed: int) -> Iterator[dict[str, Any]]:
    for arch in arches:
        for amp in amps:
            for name, fault in FAULTS.items():
                with uncompiled(), fault.plant():
                    size = ("--batch-size", 8, "--comparisons", 5, "--seed", seed, "--device", device)
                    result = certificate("--arch", arch, "--amp", amp, "--recipe", fault.recipe, *size)
                groups = far(result)
                seen = any(group.startswith(fault.group) for group in groups)
                yield {"fault": name, "arch": arch, "amp": amp, "found": seen, "far": groups}


def expected(row: dict[str, Any]) -> bool:
    """True if the certificate should detect the row's fault in the row's arithmetic."""
    fault = FAULTS[row["fault"]]
    return bool(fault.group) and row["amp"] not in fault.hides_in


def rates_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: by network and arithmetic the false alarms and how near to a limit; or by fault where it is found."""
    if "fault" in rows[0]:
        amps = list(dict.fromkeys(row["amp"] for row in rows))
        lines = ["| planted | " + " | ".join(amps) + " |", "|---" * (1 + len(amps)) + "|"]
        for name, fault in FAULTS.items():
            cells = ["found" if row["found"] else "not found" for row in rows if row["fault"] == name]
            if fault.group:
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)
    lines = [
        "| network | arithmetic | runs | false alarms | largest share of a limit, float64 | the run's arithmetic |"
    ]
    lines.append("|---" * 6 + "|")
    for arch, amp in dict.fromkeys((row["arch"], row["amp"]) for row in rows):
        runs = [row for row in rows if (row["arch"], row["amp"]) == (arch, amp)]
        worst, alarms = max(runs, key=lambda row: row["share"]), sum(row["false_alarm"] for row in runs)
        of_float64 = max(row["float64"] for row in runs)
        lines.append(
            f"| {arch} | {amp} | {len(runs)} | {alarms} | {of_float64:.4f} | {worst['share']:.2f} ({worst['group']}) |"
        )
    return "\n".join(lines)


def rates_note(machine: dict[str, Any]) -> str:
    """On what, and when."""
    return f"{machine['device']}, one thread, PyTorch {machine['torch']}, {machine['date']}."


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.verify_rates", description=str(__doc__).splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--runs", type=int, help="certificates without a fault")
    what.add_argument("--faults", action="store_true", help="every fault once")
    parser.add_argument("--arch", nargs="+", default=["resnet8_half"], help="networks")
    parser.add_argument("--amp", nargs="+", default=["fp32", "bf16", "fp16"], help="types of arithmetic")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--batch-size", help="images a step, where not verify's own")
    parser.add_argument("--comparisons", help="comparisons of a run, where not verify's own")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    began, rows = time.monotonic(), []
    device = resolve_device(args.device)
    out = args.out or result_file(f"verify-rates{'-faults' if args.faults else ''}", device)
    torch.set_num_threads(1)
    size = ["--batch-size", args.batch_size] if args.batch_size else []
    size += ["--comparisons", args.comparisons] if args.comparisons else []
    machine = {"device": device_name(device), "torch": torch.__version__, "date": str(date.today())}
    made = (
        planted(args.arch, args.amp, str(device), args.seed)
        if args.faults
        else false_alarms(args.runs, args.arch, args.amp, str(device), args.seed, size)
    )
    for row in made:
        rows.append(row)
        save_text(out, as_json({**machine, "seconds": round(time.monotonic() - began), "rows": rows}) + "\n")
    if args.faults:
        wrong = [row for row in rows if row["found"] != expected(row)]
        hidden = [row for row in rows if FAULTS[row["fault"]].group and not row["found"]]
        faults = sum(bool(FAULTS[row["fault"]].group) for row in rows)
        print(f"{faults - len(hidden)} of {faults} planted faults found, {len(wrong)} judgements not as expected")
    else:
        wrong = [row for row in rows if row["false_alarm"]]
        print(f"{len(wrong)} false alarms in {len(rows)} runs")
    for row in wrong:
        print(row)
    print(f"\n{rates_table(rows)}\n\n{rates_note(machine)}\n\nall of it in {out}")
    return int(bool(wrong))


if __name__ == "__main__":
    from fastafd.cli import run_script

    run_script(lambda: main(sys.argv[1:]))
