"""Tests, certificate, times and profile on a GPU, in one command and within a time budget.

    python -m benchmarks.gpu_suite --budget 9 --out DIR
    python -m benchmarks.gpu_suite --budget 9 --out DIR --device cpu --tiny     # a rehearsal on any machine

The parts run one after another (`benchmarks.parts`). DIR then holds a JSON file of each part that writes one,
summary.json, and all that the parts said in logs.txt. Exit code 1 where a part that ran is not ok.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.parts import ROOT, Part, arguments, python, run
from fastafd.data import load_dataset


def parts(out: Path, device: str, tiny: bool, data_dir: Path | None = None) -> list[Part]:
    """The parts of the suite. The most important ones come first, because later ones may find no budget left."""
    pytest = ["--tb=line", "--continue-on-collection-errors"]
    for_gpus = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    tests = ["tests/test_formulas.py"] if tiny else ["-m", "gpu", *for_gpus]
    where = [] if device == "auto" else ["--device", device]
    small = [*where, "--arch", "resnet8_half"] if tiny else where
    fewer, rehearsal = (["--batch", "4", "--rounds", "2"], ["--tiny"]) if tiny else ([], [])
    few = ["--batch-size", "8"] if tiny else []
    slow = "takes minutes on a CPU" if tiny else ""
    names = ("verify", "arms", "epoch-resnet18", "profile", "epoch", "methods", "kernels", "convolutions")
    verify, arms, first, profile, epoch, methods, kernels, convolutions = (
        ["--out", out / f"{name}.json"] for name in names
    )
    times = ["--quick", *where, *rehearsal, *([] if data_dir is None else ["--data-dir", data_dir])]
    return [
        Part("tests", python("pytest", *pytest, *tests), 120),
        Part("numerics", python("pytest", *pytest, "tests/test_kernel_numerics.py"), 60, slow),
        Part("verify", python("fastafd.verify", *small, *few, *verify), 360),
        Part("arms", python("benchmarks.arms", *where, *rehearsal, *arms), 360),
        Part(
            "epoch-resnet18",
            python("benchmarks.epoch_time", *times, "--arch", "resnet18", "--tasks", "afd", *first),
            150,
        ),
        Part("profile", python("benchmarks.profile_step", *small, *profile), 60, slow),
        Part("kernels", python("benchmarks.kernels", *kernels), 60, slow),
        Part("epoch", python("benchmarks.epoch_time", *times, *epoch), 240, "the same as before" if tiny else ""),
        Part(
            "methods",
            python("benchmarks.epoch_time", "--quick", *where, "--arch", "resnet18", "--tasks", "--methods", *methods),
            400,
            slow,
        ),
        Part("convolutions", python("benchmarks.convolutions", *small, *fewer, *convolutions), 240),
    ]


def main(argv: list[str]) -> int:
    parser = arguments("benchmarks.gpu_suite", str(__doc__).splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10: whole epochs of it as well")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    if args.data_dir is not None:
        load_dataset("cifar10", args.data_dir)  # so that a wrong folder ends the run now, not after minutes
    out.mkdir(parents=True, exist_ok=True)
    return run(parts(out, args.device, args.tiny, args.data_dir), args.budget, out)


if __name__ == "__main__":
    from fastafd.cli import run_script

    run_script(lambda: main(sys.argv[1:]))
