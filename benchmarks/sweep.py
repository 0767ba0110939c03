"""Many runs of fastafd.train, each in a folder, resumable: every method, or AFD's weights one at a time.

    python -m benchmarks.sweep methods --scale digits --out runs/digits              # an hour on one CPU core
    python -m benchmarks.sweep methods --scale cifar10 --seeds 3 --out runs/cifar10  # the published settings: a GPU
    python -m benchmarks.sweep gamma --scale digits --out runs/digits -- --epochs 3  # flags of fastafd.train at the end

A folder that has its result is left alone, one that was cut short goes on; when all methods are trained, AutoAttack
attacks them. `python -m fastafd.report` makes tables and figures of them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastafd.recipes import find_recipe

METHODS = [
    "released",
    "vaft_d",
    "vaft_a",
    "vaft",
    "afkd",
    "arrest",
    "pgd_at",
    "rift",
    "trades",
    "free_at",
    "fgsm_ga",
    "atas",
]
MATCHED = ["vaft", "afkd", "arrest"]
# Around the paper's {0.05, 0.25, 25}; `released` counts beta twice and shows the classifier 2 alpha of L1.
WEIGHTS = {
    "alpha": [0.0, 0.01, 0.05, 0.1, 0.5],
    "beta": [0.0, 0.1, 0.25, 0.5, 1.0],
    "gamma": [0.0, 10.0, 25.0, 30.0, 35.0, 50.0],
}


@dataclass(frozen=True)
class Scale:
    """The flags that make runs smaller.

    For all runs, for those with PGD, for fine-tuning, for the natural pre-training before it, and for training from
    scratch.
    """

    about: str
    autoattack: int  # test images for AutoAttack, which runs after all trainings
    all: str = ""
    pgd: str = ""
    tuned: str = ""
    pretrain: str = ""
    scratch: str = ""
    of: dict[str, str] = field(default_factory=dict)


SCALES = {
    "cifar10": Scale("ResNet-18, CIFAR-10, published settings", 1000),
    "digits": Scale(
        "ResNet-8 of half width, digits, PGD of 7 steps in training, 7 epochs of fine-tuning, 15 from scratch",
        20,
        all="--dataset digits --arch resnet8_half --batch-size 64 --log-every 11",
        pgd="--attack.steps 7 --attack.step-size 2/255",
        tuned="--epochs 7",
        pretrain="--pretrain.epochs 8 --pretrain.batch-size 64",
        scratch="--epochs 15",
        of={
            "rift": "--held-out 200",
            "arrest": "--replay-epochs 4",
            "free_at": "--epochs 6",
            "atas": "--warm-up 3 --redraw-every 5",
        },
    ),
    "small": Scale(
        "ResNet-8, 10,000 CIFAR-10 images, PGD of 5 steps in training, 2 epochs of fine-tuning, 4 from scratch",
        50,
        all="--dataset cifar10 --arch resnet8 --batch-size 64 --log-every 39 --save-every 78 --eval-n 1000",
        pgd="--attack.steps 5 --attack.step-size 2/255",
        tuned="--epochs 2",
        pretrain="--pretrain.epochs 15 --pretrain.batch-size 64",
        scratch="--epochs 4",
        of={
            "rift": "--epochs 4 --held-out 1000 --climbs 3",
            "arrest": "--replay-epochs 1",
            "free_at": "--epochs 2",
            "fgsm_ga": "--epochs 8",
            "atas": "--epochs 8 --warm-up 2 --redraw-every 4",
        },
    ),
}


def flags_of(recipe: str, scale: Scale) -> list[str]:
    """The flags that give the recipe's run this scale."""
    config = find_recipe(recipe)
    words = [scale.all, "--autoattack-n 0", scale.scratch if config.method.begins == "scratch" else scale.tuned]
    if config.method.begins == "natural":
        words.append(scale.pretrain)
    if hasattr(config.attack, "steps"):
        words.append(scale.pgd)
    return [*" ".join([*words, scale.of.get(recipe, "")]).split()]


def runs_of(what: str, scale: Scale, seeds: int, out: Path) -> dict[str, list[str]]:
    """The flags of fastafd.train by the name of the run folder."""
    runs: dict[str, list[str]] = {}
    for seed in range(seeds):
        if what != "methods":
            for value in WEIGHTS[what]:
                own: list[object] = [value]
                if what == "alpha":
                    own += ["--classifier-alpha", 2 * value]
                elif what == "beta":
                    own = [2 * value]
                words = ["--recipe", "released", *flags_of("released", scale), f"--{what}", *map(str, own)]
                runs[f"{what}-{value:g}-seed{seed}"] = [*words, "--seed", str(seed)]
            continue
        for recipe, matched in [*((recipe, False) for recipe in METHODS), *((recipe, True) for recipe in MATCHED)]:
            words = ["--recipe", recipe, *flags_of(recipe, scale), "--seed", str(seed)]
            if recipe == "rift":
                words += ["--pretrained", str(out / f"pgd_at-seed{seed}")]
            runs[f"{recipe}{'-matched' * matched}-seed{seed}"] = words + ["--matched"] * matched
    return runs


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.sweep", description=str(__doc__).splitlines()[0])
    parser.add_argument("what", choices=["methods", *WEIGHTS])
    parser.add_argument("--scale", default="cifar10", choices=list(SCALES))
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, with seeds 0, 1, …")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a run folder each in here")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="folders to do without the others")
    if "--" in argv:
        argv, more = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    else:
        more = []
    args = parser.parse_args(argv)
    out, scale = args.out.expanduser().resolve(), SCALES[args.scale]
    chosen = runs_of(args.what, scale, args.seeds, out)
    chosen = {name: flags for name, flags in chosen.items() if not args.only or name in args.only}
    codes = []
    for name, flags in chosen.items():
        folder = out / name
        if not (folder / "result.json").exists():
            begun = ["--resume", folder] if (folder / "config.yaml").exists() else [*flags, *more, "--out", folder]
            codes.append(run("fastafd.train", begun, name))
    for name in chosen if args.what == "methods" else []:
        folder = out / name
        if (folder / "result.json").exists() and not (folder / "evaluation-autoattack.json").exists():
            attack = [folder, "--attack", "autoattack", "--n", scale.autoattack]
            codes.append(run("fastafd.evaluate", attack, f"{name}, AutoAttack"))
    return int(any(codes))


def run(module: str, arguments: list[Any], name: str) -> int:
    """Run a verb and print how it ended; returns its exit code. If a signal stopped it, this process ends too."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", module, *map(str, arguments)], stdout=subprocess.DEVNULL)
    print(f"{name}: exit code {done.returncode}, {time.monotonic() - began:.0f} s", flush=True)
    if done.returncode in (75, 130):
        sys.exit(done.returncode)
    return done.returncode


if __name__ == "__main__":
    from fastafd.cli import run_script

    run_script(lambda: main(sys.argv[1:]))
