"""The seconds of an AFD step with each form of the attack's convolutions, beside the plain form: a GPU decides on them.

    python -m benchmarks.arms [--arch resnet18] [--batch 128] [--steps 20] [--rounds 5] [--out FILE]
    python -m benchmarks.arms --device cpu --tiny --out FILE      # a rehearsal: the forms run their references there

Of fastafd's fast step of recipe `released`, on random pixels; on a CPU in one thread. Each row is timed with the plain
form in turn, round after round; "x plain" is the median of the rounds' ratios, an epoch 50,000 images.
FILE is by default benchmarks/measured/DEVICE/arms.json, which git ignores.

    chosen      the form that every convolution gets from its own timings (fastafd.attacks.choice), as a run takes it
    fused, turned, bits, padded    that arm alone, wherever it applies (fastafd.attacks.arms)
    layout      plain, in a process with TORCHINDUCTOR_FORCE_LAYOUT_OPT=1: Inductor lays out every graph anew, as it
                does those that hold a convolution's backward
    templates   turned, in a process in which Inductor tries its convolution templates, whose epilogues take what
                follows: needs PyTorch 2.14, since those before it gave wrong results on eight warps

The last two have the plain form's seconds from before and after that process. "off" is how far the first step's loss is
from the plain form's: above 1 % a form computes something else. A form that fails has the reason in its row.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.clock import RESULTS, device_name, result_file, save
from benchmarks.epoch_tables import IMAGES
from benchmarks.epoch_time import Step, sampled
from benchmarks.forms import our_step, random_batches
from fastafd.attacks.arms import ARMS, Form
from fastafd.device import resolve_amp, resolve_device
from fastafd.models import build_model
from fastafd.training.engine import Fast
from fastafd.training.step import TrainStep

FORMS: dict[str, Form | None] = {"plain": (), "chosen": None} | {name: (name,) for name in ARMS}
# The environment of the separate process in which a form is timed, and the form
PROCESSES: dict[str, tuple[dict[str, str], str]] = {
    "layout": ({"TORCHINDUCTOR_FORCE_LAYOUT_OPT": "1"}, "plain"),
    "templates": (
        {"TORCHINDUCTOR_MAX_AUTOTUNE": "1", "TORCHINDUCTOR_MAX_AUTOTUNE_CONV_BACKENDS": "ATEN,TRITON"},
        "turned",
    ),
}
ORDER = (
    "chosen",
    "fused",
    "layout",
    "bits",
    "turned",
    "templates",
    "padded",
)  # the forms that may matter most come first
SAME = ("device", "torch", "arch", "batch", "amp")  # these must agree to continue with a FILE
OFF = 0.01


def step_with(net: nn.Module, amp: str, form: Form | None) -> TrainStep:
    """fastafd's step whose attack uses this form wherever it applies; None: the forms that its timings choose."""
    step = our_step(net, "afd", amp, "fast")
    assert isinstance(step.engine, Fast) and step.engine.choice is not None
    step.engine.choice.forced = form
    return step


def needs(name: str, device: torch.device) -> str:
    """What a form needs and this machine does not have; empty if nothing is missing."""
    if name == "templates" and device.type != "cuda":
        return "needs CUDA"
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    return f"needs PyTorch 2.14, this is {torch.__version__}" if name == "templates" and version < (2, 14) else ""


def measure(args: argparse.Namespace, device: torch.device, result: dict[str, Any], out: Path) -> None:
    """Add a row for each form to `result`, and write it to `out` at once."""
    amp = result["amp"]
    losses: dict[str, float] = {}
    torch.manual_seed(0)
    net = build_model(args.arch, 10).to(device)
    batches = random_batches(args.batch, args.steps, device)

    def built(name: str) -> TrainStep:
        step = step_with(net, amp, FORMS[name])
        losses[name] = float(step(*batches[0])["loss"])
        if name == "chosen":
            result["chosen"] = step.arms  # empty on a CPU, where nothing is timed
        return step

    plain = built("plain")

    def beside_plain(name: str, build: Callable[[], Step]) -> dict[str, Any]:
        _, samples = sampled({"plain": lambda: plain, name: build}, batches, args.rounds, device)
        seconds, of_plain = samples[name]["step_s"], samples["plain"]["step_s"]
        x_plain = statistics.median(a / b for a, b in zip(seconds, of_plain, strict=True))
        return {"step_s": seconds, "plain_step_s": of_plain, "x_plain": x_plain, "loss": losses[name]}

    done = {row["form"] for row in result["rows"]}
    for name in [name for name in ORDER if name not in done]:
        row: dict[str, Any] = {"form": name}
        try:
            if why := needs(name, device):
                row["failed"] = why
            elif name in FORMS:
                row |= beside_plain(name, lambda name=name: built(name))  # type: ignore[misc]
            else:
                _, before = sampled({"plain": lambda: plain}, batches, args.rounds, device)
                apart = in_a_process(args, name)
                _, after = sampled({"plain": lambda: plain}, batches, args.rounds, device)
                of_plain = before["plain"]["step_s"] + after["plain"]["step_s"]
                x_plain = statistics.median(apart["step_s"]) / statistics.median(of_plain)
                row |= apart | {"plain_step_s": of_plain, "x_plain": x_plain}
        except Exception as error:  # a compiler or a library may raise anything; the other forms go on
            row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        if "loss" in row:
            row["off"] = abs(row["loss"] / losses["plain"] - 1)
            row["epoch_s"] = statistics.median(row["step_s"]) * (IMAGES // args.batch)
            row["plain_epoch_s"] = statistics.median(row["plain_step_s"]) * (IMAGES // args.batch)
        result["rows"].append(row)
        save(result, out)
        gc.collect()
        print(line(row), flush=True)


def in_a_process(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Time a form in a separate process, because it needs another environment: seconds of each round, first loss."""
    environment, form = PROCESSES[name]
    command = [sys.executable, "-m", "benchmarks.arms", "--only", form, "--arch", args.arch, "--device", args.device]
    for flag in ("batch", "steps", "rounds"):
        command += [f"--{flag}", str(getattr(args, flag))]
    done = subprocess.run(command, env=os.environ | environment, cwd=RESULTS.parents[1], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process ended with {done.returncode}: {done.stderr[-300:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def only(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time one form alone, in this process."""
    torch.manual_seed(0)
    step = step_with(build_model(args.arch, 10).to(device), resolve_amp("auto", device), FORMS[args.only])
    batches = random_batches(args.batch, args.steps, device)
    loss = float(step(*batches[0])["loss"])
    _, samples = sampled({args.only: lambda: step}, batches, args.rounds, device)
    return {"step_s": samples[args.only]["step_s"], "loss": loss}


def line(row: dict[str, Any]) -> str:
    """The name of a form."""
    if "failed" in row:
        return f"{row['form']}: no, {row['failed']}"
    wrong = f", WRONG: its loss is off by {row['off']:.1%}" if not row["off"] <= OFF else ""
    return (
        f"{row['form']}: {1e3 * statistics.median(row['step_s']):.2f} ms a step, {row['epoch_s']:.2f} s an epoch,"
        f" {row['x_plain']:.3f} x plain ({row['plain_epoch_s']:.2f} s){wrong}"
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.arms", description=str(__doc__).splitlines()[0])
    parser.add_argument("--arch", default="resnet18", help="network")
    parser.add_argument("--batch", type=int, default=128, help="images a step")
    parser.add_argument("--steps", type=int, default=20, help="steps a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: sizes that mean nothing")
    parser.add_argument("--only", choices=list(FORMS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    if args.tiny:
        args.arch, args.batch, args.steps, args.rounds = "resnet8_half", 4, 1, 2
    torch.backends.cudnn.benchmark = True
    if device.type == "cpu":
        torch.set_num_threads(1)
    if args.only:
        print(json.dumps(only(args, device)))
        return 0
    out = args.out or result_file("arms", device)
    result: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__, "date": str(date.today())}
    result |= {"arch": args.arch, "batch": args.batch, "amp": resolve_amp("auto", device)}
    result |= {"references": device.type == "cpu", "rows": []}
    earlier = json.loads(out.read_text()) if out.exists() else {}
    if all(earlier.get(key) == result[key] for key in SAME):  # the earlier run was cut short
        result["rows"] = [row for row in earlier["rows"] if "failed" not in row]
    note = "; the forms run as their references: these figures say nothing of a GPU" if device.type == "cpu" else ""
    print(f"{args.arch}, batch {args.batch}, {result['device']}, PyTorch {torch.__version__}{note}", flush=True)
    measure(args, device, result, out)
    print(f"\nall of it in {out}")
    return 0


if __name__ == "__main__":
    from fastafd.cli import run_script

    run_script(lambda: main(sys.argv[1:]))
