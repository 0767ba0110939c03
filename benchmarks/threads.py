"""From how many multiplications of a batch on a second thread of the CPU pays, on a machine without other work.

    python -m benchmarks.threads
    python -m benchmarks.threads --load 2       # beside so many busy processes

A call is three PGD steps and one update, eager. One and two threads take turns in every round; a row has the medians,
and their ratio. `fastafd.models.cost.WORTH_A_THREAD` follows this table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.clock import device_name, result_file, save, seconds_of
from fastafd.attacks import PGD
from fastafd.cli import run_script
from fastafd.models import build_model
from fastafd.models.cost import multiplications
from fastafd.reporting.markdown import markdown_table

CASES = [  # network, side of an image in pixels, images of a batch
    ("resnet8_half", 8, 64),
    ("resnet8_half", 16, 64),
    ("resnet8_half", 32, 64),
    ("resnet8", 32, 64),
    ("resnet8", 32, 128),
    ("wrn10_2", 32, 64),
    ("wrn10_2", 32, 128),
    ("resnet18", 32, 16),
    ("resnet18", 32, 64),
]
ROUNDS = 9
CPU = torch.device("cpu")


def measured(arch: str, side: int, batch: int) -> dict[str, Any]:
    """The median seconds of a call on one thread and on two."""
    torch.manual_seed(0)
    net = build_model(arch, 10)
    x = torch.rand(batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (batch,))
    sgd = torch.optim.SGD(net.parameters(), 0.01)
    attack = PGD(steps=3)

    def call() -> None:
        x_adv = attack.perturb(net.eval(), x, y)
        sgd.zero_grad()
        F.cross_entropy(net.train()(x_adv), y).backward()
        sgd.step()

    seconds: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(ROUNDS + 1):
        for threads, spent in seconds.items():
            torch.set_num_threads(threads)
            call()  # the threads wake up
            spent += [seconds_of(call, CPU)] * (turn > 0)
    one, two = (statistics.median(spent) for spent in seconds.values())
    row: dict[str, Any] = {"arch": arch, "side": side, "batch": batch}
    row |= {"multiplications": multiplications(net, side) * batch, "one_s": one, "two_s": two}
    return row


def spin() -> None:
    """Keep a core busy."""
    while True:
        pass


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row for each network and batch."""
    lines = [
        [
            f"{row['arch']}, {row['side']} x {row['side']}, batch {row['batch']}",
            f"{row['multiplications'] / 1e9:.2f}",
            f"{1e3 * row['one_s']:.1f}",
            f"{1e3 * row['two_s']:.1f}",
            f"{row['one_s'] / row['two_s']:.2f}",
        ]
        for row in rows
    ]
    return markdown_table(["batch", "10^9 multiplications", "one thread, ms", "two, ms", "gain"], lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.threads", description=str(__doc__).splitlines()[0])
    parser.add_argument("--load", type=int, default=0, help="busy processes beside the measurement")
    parser.add_argument("--quick", action="store_true", help="the two smallest batches alone")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON; default: measured/cpu/threads.json")
    args = parser.parse_args(argv)
    busy = [multiprocessing.Process(target=spin, daemon=True) for _ in range(args.load)]
    for process in busy:
        process.start()
    try:
        rows = [measured(*case) for case in CASES[: 2 if args.quick else None]]
    finally:
        for process in busy:
            process.terminate()
    result = {"device": device_name(CPU), "torch": torch.__version__, "rounds": ROUNDS, "load": args.load, "rows": rows}
    out = args.out or result_file("threads", CPU)
    save(result | {"date": datetime.now(UTC).strftime("%Y-%m-%d")}, out)
    print(table(rows))
    print(f"{device_name(CPU)}, PyTorch {torch.__version__}, medians of {ROUNDS} rounds; all of it in {out}")
    return 0


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
