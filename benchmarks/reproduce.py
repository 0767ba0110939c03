"""The paper's CIFAR-10 figures for a ResNet-18, and the speed of the runs, in one command, unattended and resumable.

    python -m benchmarks.reproduce --budget 27 --data-dir CIFAR10 --out DIR      # minutes, on one GPU
    python -m benchmarks.reproduce --budget 27 --data-dir CIFAR10 --out DIR      # the same command again continues
    python -m benchmarks.reproduce --budget 20 --data-dir TREE --out DIR --device cpu --tiny     # a rehearsal

What matters most comes first:

    gpu_suite     tests, kernels' numerics, certificate, the forms of the attack's convolutions, epoch times of a
                  ResNet-18 through FFCV and from memory
    runs          20 epochs from the ResNet-18 that pyautoattack ships: AFD by recipe `released` (with empty compiler
                  caches, if nothing cut it short) and by `paper`, `vaft` matched; clean and PGD-20 on all test images,
                  the feature gap by epoch
    autoattack    on 1,000 class-balanced test images: the AFD with the better PGD-20 accuracy, and vaft
    gpu_suite     profile of a step, kernels, epoch times of all networks
    own           natural pre-training by the paper's appendix, and AFD from it; a step of every method (Table 5)
    tried         `released` with one thing another way, to find the cause of a miss; convolutions alone

DIR then holds a JSON file of each run (configuration, versions, device, accuracies, seconds, the log of its epochs),
those of gpu_suite, summary.json and logs.txt; the run folders, with all weights, are in DIR/runs. Copied to
benchmarks/results/DEVICE/, the JSON files are what `python -m benchmarks.table reproduced` shows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import gpu_suite, table
from benchmarks.parts import ROOT, NotNow, Part, arguments, earlier, python, run
from fastafd.checkpoint import load_model_about
from fastafd.data import load_dataset
from fastafd.files import as_json, save_text
from fastafd.reporting.runs import Run

TRAINED: dict[str, list[Any]] = {  # run folder: flags of fastafd.train
    "afd-released": ["--recipe", "released"],
    "afd-paper": ["--recipe", "paper"],
    "vaft-matched": ["--recipe", "vaft", "--matched"],
}
TRIED: dict[str, list[Any]] = {  # runs that differ from those in one setting
    "afd-released-seed1": ["--seed", 1],
    "afd-released-seed2": ["--seed", 2],
    "afd-released-step-size": ["--attack.step-size", "2/255"],
    "afd-released-no-average": ["--ema-decay", 0],
    "afd-released-no-random-start": ["--attack.random-start", "false"],
    "afd-released-batch-statistics": [
        "--attack-bn",
        "train",
        "--engine",
        "reference",
    ],  # the fast engine does not have it
}
AFD = ("afd-released", "afd-paper")
LOGGED = 39  # steps between two lines of metrics.jsonl: ten lines in an epoch of 390 steps
TINY = "--epochs 1 --batch-size 8 --attack.steps 1 --eval-n 4 --log-every 1".split()


def parts(out: Path, device: str, tiny: bool, data_dir: Path) -> list[Part]:
    """All parts, in order."""
    suite = {part.name: part for part in gpu_suite.parts(out, device, tiny, data_dir)}
    runs = out / "runs"
    where = [] if device == "auto" else ["--device", device]
    data = ["--dataset", "cifar10", "--data-dir", data_dir]
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(out / "compiled"), "TRITON_CACHE_DIR": str(out / "compiled" / "triton")}

    def trained(name: str, flags: list[Any], cap: float, start: Any = "example") -> Part:
        def command() -> list[str]:
            if (runs / name / "config.yaml").exists():
                return python("fastafd.train", "--resume", runs / name)
            if start != "example" and not (start / "model.safetensors").exists():
                raise NotNow(f"there is no {start.name} model")
            size = TINY if tiny else ["--log-every", LOGGED]
            own = [*data, "--arch", "resnet18", "--pretrained", start, *where, "--autoattack-n", 0, *size]
            return python("fastafd.train", *own, *flags, "--out", runs / name)

        return Part(name, command, cap, env=caches)

    def attacked(name: str, among: tuple[str, ...]) -> Part:
        def command() -> list[str]:
            finished = [name for name in among if (runs / name / "result.json").exists()]
            ended = earlier(out)
            waiting = [name for name in among if name not in finished and ended.get(name, {}).get("result") != "failed"]
            if waiting or not finished:
                raise NotNow(f"there is no result of {' or '.join(waiting or among)}")
            best = max(finished, key=lambda name: run_in(runs / name).trained["pgd20"]["accuracy"])
            n = 2 if tiny else 1000
            return python("fastafd.evaluate", runs / best, *data, *where, "--attack", "autoattack", "--n", n)

        return Part(name, command, 600)  # if it is cut short, it starts again

    natural = ["--out", runs / "natural", *data, "--arch", "resnet18", *where, "--log-every", LOGGED]
    if tiny:
        natural += ["--epochs", 1, "--batch-size", 8]
    n = ["--n", 4] if tiny else []
    afd, own = TRAINED["afd-released"], runs / "natural"
    return [
        *(suite[name] for name in ("tests", "numerics", "verify", "arms", "epoch-resnet18")),
        *(trained(name, flags, 400) for name, flags in TRAINED.items()),
        attacked("autoattack-afd", AFD),
        attacked("autoattack-vaft", ("vaft-matched",)),
        *(suite[name] for name in ("profile", "kernels", "epoch")),
        Part("natural", python("fastafd.pretrain", *natural), 600, env=caches),
        Part("natural-pgd20", lambda: evaluation(own, [*data, *where, *n]), 60),
        trained("afd-own", afd, 400, own),
        suite["methods"],
        *(trained(name, [*afd, *flags], 900) for name, flags in TRIED.items()),
        suite["convolutions"],
    ]


def evaluation(folder: Path, flags: list[Any]) -> list[str]:
    if not (folder / "model.safetensors").exists():
        raise NotNow(f"there is no {folder.name} model")
    return python("fastafd.evaluate", folder, *flags, "--attack", "pgd20")


def run_in(folder: Path) -> Run:
    return Run(folder, json.loads((folder / "result.json").read_text()))


def collect(out: Path) -> None:
    """Write a JSON file into `out` for each evaluated run: its result and its log."""
    for folder in sorted((out / "runs").glob("*")):
        natural = folder / "evaluation-pgd20.json"
        if (folder / "result.json").exists():
            trained = run_in(folder)
            result = trained.result
            result["models"][result["label"]] = trained.trained  # with AutoAttack
        elif natural.exists():
            result = json.loads(natural.read_text())
            _, about = load_model_about(folder)
            result |= {"seconds": {"wall": about["pretraining_seconds"]}, "config": json.loads(about["shape"])}
        else:
            continue
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        log = "[\n" + ",\n".join(lines) + "\n]"
        text = as_json({"run": folder.name, **result, "log": "LINES"}).replace('"LINES"', log)
        for path, word in ((out, "DIR"), (ROOT, "."), (Path.home(), "~")):  # the file may be committed
            text = text.replace(str(path), word)
        save_text(out / f"{folder.name}.json", text + "\n")


def main(argv: list[str]) -> int:
    parser = arguments("benchmarks.reproduce", str(__doc__).splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="CIFAR-10, as fastafd.train takes it")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    data_dir = args.data_dir.expanduser().resolve()
    load_dataset("cifar10", data_dir)  # so that a wrong folder ends the run now, not after minutes
    out.mkdir(parents=True, exist_ok=True)
    chosen = parts(out, args.device, args.tiny, data_dir)
    code = run(chosen, args.budget, out, after=lambda: collect(out))
    print(f"\n{table.reproduced([out])}")
    return code


if __name__ == "__main__":
    from fastafd.cli import run_script

    run_script(lambda: main(sys.argv[1:]))
