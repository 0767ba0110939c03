"""The seconds of an epoch of AFD and of natural training, in the forms of other authors and of fastafd.

    python -m benchmarks.epoch_time --data-dir CIFAR10_TREE         # on a GPU: samples of steps, then whole epochs
    python -m benchmarks.epoch_time --quick                         # samples alone, of random pixels: a few minutes
    python -m benchmarks.epoch_time --device cpu --arch resnet18 --tasks afd --batch 32 --steps 1 --quick
    python -m benchmarks.epoch_time --quick --arch resnet18 --tasks --methods       # the paper's Table 5 alone

One process, all forms alive at once and timed in turn, round after round; the median of the rounds and their extremes.
"x paper-style" is the median of the rounds' own ratios. "of the peak" is the share of the rate of the fastest product
or convolution that `benchmarks.limits` finds.

    naive        paper-style, but the attack in train mode by loss.backward(): weight gradients formed and dropped
    paper-style  eager fp32 NCHW, PyTorch's default TF32 setting, the input's gradient by autograd.grad
    strong       eager bf16 channels_last (fp32 on a CPU)
    compiled     strong under torch.compile
    fast         fastafd's fast engine; on CUDA one graph a step
    fast, without X   plain PyTorch instead of kernel X, compiled

An epoch is 390 batches of 128 of CIFAR-10's 50,000 images, the last short one dropped. A sample's epoch is its median
step times 390; "whole epoch" rows run all of it, loader included. FLOPs are counted (FlopCounterMode), not assumed.

`--methods` measures every method of the paper's Table 5 in the same way, each on the engine that a run on a GPU takes;
seconds in all are epochs of the recipe times seconds of one, and those of the model that the method begins with.

The results go to benchmarks/measured/DEVICE/epoch-time.json, which git ignores, or to the FILE of --out.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import device_name, median_seconds, result_file, save, seconds_of, wait
from benchmarks.epoch_tables import IMAGES, epoch_note, epoch_table, methods_table
from benchmarks.forms import INSTEAD, METHODS, Step, counted_flops, method_step, our_step, random_batches, step_forms
from benchmarks.limits import limits
from fastafd.data import Loader, load_dataset, make_loader
from fastafd.device import resolve_amp, resolve_device
from fastafd.methods import Batch, FreeAT
from fastafd.models import build_model
from fastafd.recipes import AFD_ATTACK
from fastafd.settings import cache_dir
from fastafd.training.engine import Fast
from fastafd.training.graphs import WARM_UPS
from fastafd.training.step import TrainStep

HERE = Path(__file__).parent


def sampled(
    builders: dict[str, Callable[[], Step]], batches: list[tuple[Tensor, Tensor]], rounds: int, device: torch.device
) -> tuple[dict[str, Step], dict[str, dict[str, Any]]]:
    """The steps, and for each its first call, its peak memory and the seconds of a step in every round."""
    steps: dict[str, Step] = {}
    samples: dict[str, dict[str, Any]] = {}
    warm = WARM_UPS + 2 if device.type == "cuda" else 1
    for name, build in builders.items():
        gc.collect()
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        step = steps[name] = build()
        first = seconds_of(lambda step=step: step(*batches[0]), device)  # type: ignore[misc]
        if device.type == "cuda":  # do not count the memory of compiling and of cuDNN's trials
            torch.cuda.reset_peak_memory_stats(device)
        for index in range(warm):
            step(*batches[index % len(batches)])
        wait(device)
        peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
        samples[name] = {"first_call_s": first, "peak_bytes": peak, "step_s": []}
        print(f"{name}: first call {first:.1f} s", file=sys.stderr, flush=True)

    def all_batches(step: Step) -> None:
        for batch in batches:
            step(*batch)

    for _ in range(rounds):
        for name, step in steps.items():
            spent = seconds_of(lambda step=step: all_batches(step), device)  # type: ignore[misc]
            samples[name]["step_s"].append(spent / len(batches))
    return steps, samples


def phases(step: TrainStep, batch: tuple[Tensor, Tensor], device: torch.device) -> dict[str, float]:
    """The seconds of each part of a step alone; on CUDA a part of the fast engine is timed as a graph."""
    engine, inputs = step.engine, step._inputs(*batch)
    images, y, offsets, flips, noise, _ = inputs
    x = step._pixels(images, offsets, flips)
    weight = step._weight if step.graphs is not None else 0.001
    parts: dict[str, Callable[[], Any]] = {"augment": lambda: step._pixels(images, offsets, flips)}
    features, x_adv = None, x
    if step.attack is not None:

        def teach() -> Tensor:
            features = engine.teacher_features(x)
            engine.join()
            return features

        features, x_adv = teach(), engine.perturb(x, noise, y)
        parts |= {"teacher": teach, "attack": lambda: engine.perturb(x, noise, y)}
    if isinstance(engine, Fast) and engine.snapshot is not None:
        parts["folding, of the attack"] = engine.refresh
    parts["update"] = lambda: step._update(Batch(x, x_adv, y, features))
    if step.ema is not None:
        parts["ema"] = lambda: engine.average(weight)
    rounds = 10 if device.type == "cuda" else 3

    def by_hand(part: Callable[[], Any]) -> float:
        part()
        return statistics.median(seconds_of(part, device) for _ in range(rounds))

    seconds = {"drawing": by_hand(lambda: step._inputs(*batch))}
    with engine.launching():
        for name, part in parts.items():
            seconds[name] = median_seconds(part, [()], rounds, device) if step.fast else by_hand(part)
    return seconds


# -- what is measured ---------------------------------------------------------------------------------------------


def rows_of(arch: str, task: str, samples: dict[str, dict[str, Any]], batch: int, peak: float) -> list[dict[str, Any]]:
    flops, per_epoch = counted_flops(arch, task), IMAGES // batch
    rows = []
    of_paper = samples["paper-style"]["step_s"]
    for form, measured in samples.items():
        step = statistics.median(measured["step_s"])
        row = {"arch": arch, "task": task, "form": form, "epoch_s": step * per_epoch}
        row |= {"fastest_s": min(measured["step_s"]) * per_epoch, "slowest_s": max(measured["step_s"]) * per_epoch}
        row |= {"images_s": batch / step, "tflops": batch * flops / step / 1e12}
        row |= {"of_peak": batch * flops / step / peak, "first_call_s": measured["first_call_s"]}
        # Take ratios round by round: if the machine is slow for a while, both sides of a ratio are slow.
        row["times_paper_style"] = statistics.median(a / b for a, b in zip(of_paper, measured["step_s"], strict=True))
        row["peak_gib"] = None if measured["peak_bytes"] is None else measured["peak_bytes"] / 2**30
        rows.append(row | {"step_s": measured["step_s"]})
    return rows


def method_rows(
    arch: str, samples: dict[str, dict[str, Any]], engines: dict[str, str], batch: int
) -> list[dict[str, Any]]:
    """A row for each method, "Standard" first.

    A step of Free-AT is one pass; its epoch has `replays` passes a batch.
    """
    before = {"scratch": 0.0}  # seconds of training the model that a method starts from
    rows = []
    for label, measured in samples.items():
        config, steps = METHODS[label], IMAGES // batch
        if isinstance(config.method, FreeAT):
            steps *= config.method.replays
        epoch, fastest, slowest = (steps * of(measured["step_s"]) for of in (statistics.median, min, max))
        total = config.sgd.epochs * epoch + before[config.method.begins]
        if label == "Standard":
            before["natural"] = total
        if label == "PGD-AT":
            before["robust"] = total
        row: dict[str, Any] = {"arch": arch, "method": label, "recipe": config.recipe, "engine": engines[label]}
        row |= {"epochs": config.sgd.epochs, "epoch_s": epoch, "fastest_s": fastest, "slowest_s": slowest}
        rows.append(row | {"total_s": total, "step_s": measured["step_s"]})
    return rows


def whole_epochs(step: Step, loaders: list[Loader], device: torch.device, epochs: int) -> list[dict[str, Any]]:
    """The seconds of whole epochs, loading included, and of the loader alone."""
    rows = []
    for loader in loaders:

        def run(epoch: int, loader: Loader = loader) -> None:
            for batch in loader.epoch(epoch):
                step(*batch)

        def deliver(epoch: int, loader: Loader = loader) -> None:
            for _ in loader.epoch(epoch):
                pass

        alone = seconds_of(lambda: deliver(0), device)
        spent = [seconds_of(lambda epoch=epoch: run(epoch), device) for epoch in range(epochs)]  # type: ignore[misc]
        images = len(loader) * loader.batch_size
        rows.append({"loader": loader.kind, "epoch_s": statistics.median(spent), "all_s": spent, "steps": len(loader)})
        rows[-1] |= {"images_s": images / statistics.median(spent), "loader_alone_images_s": images / alone}
    return rows


def compile_seconds(arch: str, device: torch.device, batch: int) -> dict[str, float]:
    """The seconds until the first AFD step ends, with an empty and then with a full compiler cache."""
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder + "/triton"}
        for name in ("cold", "warm"):
            command = [sys.executable, "-m", "benchmarks.epoch_time", "--first-step", "--arch", arch]
            command += ["--batch", str(batch), "--device", str(device)]
            done = subprocess.run(command, env=os.environ | caches, cwd=HERE.parent, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the first step of {arch} failed: {done.stderr[-2000:]}")
            seconds[name] = float(done.stdout.splitlines()[-1])
    return seconds


def measure(args: argparse.Namespace, device: torch.device, out: Path) -> dict[str, Any]:
    """Measure everything; each piece is written to `out` at once, so that an interrupted run keeps its results."""
    amp = resolve_amp("auto", device)
    torch.backends.cudnn.benchmark = True  # for every form, because cuDNN keeps the first choice for a shape
    dtype = torch.bfloat16 if amp == "bf16" else torch.float32
    best = limits(device, dtype, rounds=1 if args.tiny else 5)
    result: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__, "date": str(date.today())}
    result |= {"threads": torch.get_num_threads(), "amp": amp, "batch": args.batch}
    result |= {"peak_tflops": best.flops / 1e12, "peak_by": best.by}
    result |= {"rounds": args.rounds, "steps": args.steps, "pgd_steps": AFD_ATTACK.steps}
    result |= {"rows": [], "phases": [], "whole": [], "compile": []} | ({"methods": []} if args.methods else {})
    for arch in args.arch:
        for task in args.tasks:
            print(f"-- {arch}, {task}", file=sys.stderr, flush=True)
            measure_task(args, arch, task, device, out, result)
            forget(device)
        if args.methods:
            print(f"-- {arch}, methods", file=sys.stderr, flush=True)
            measure_methods(args, arch, device, result)
            save(result, out)
            forget(device)
        if not args.quick:
            result["compile"].append({"arch": arch} | compile_seconds(arch, device, args.batch))
            save(result, out)
    return result


def measure_task(
    args: argparse.Namespace, arch: str, task: str, device: torch.device, out: Path, result: dict[str, Any]
) -> None:
    """Add the rows of one network and task to `result`."""
    torch.manual_seed(0)
    net, amp = build_model(arch, 10).to(device), result["amp"]
    batches = random_batches(args.batch, args.steps, device)
    steps, samples = sampled(step_forms(net, task, amp, args.without), batches, args.rounds, device)
    result["rows"] += rows_of(arch, task, samples, args.batch, result["peak_tflops"] * 1e12)
    save(result, out)
    fast, reference = steps["fast"], our_step(net, task, amp, "reference")
    assert isinstance(fast, TrainStep)
    about = {"arch": arch, "task": task}
    if args.data_dir is not None:
        dataset = load_dataset("cifar10", args.data_dir)
        shape: dict[str, Any] = {"batch_size": args.batch, "seed": 0, "device": device, "cache": cache_dir()}
        loaders = [
            make_loader(kind, dataset.train, name="cifar10", report=print, **shape) for kind in ("ffcv", "resident")
        ]
        result["whole"] += [about | row for row in whole_epochs(fast, loaders, device, args.epochs)]
        save(result, out)
    for engine, step in (("reference", reference), ("fast", fast)):
        result["phases"].append(about | {"engine": engine, "seconds": phases(step, batches[0], device)})
        save(result, out)


def measure_methods(args: argparse.Namespace, arch: str, device: torch.device, result: dict[str, Any]) -> None:
    """Add the rows of one network and all methods to `result`."""
    torch.manual_seed(0)
    net, amp = build_model(arch, 10).to(device), result["amp"]
    # ATAS keeps a perturbation of every image, 1 GB; on a CPU keep only those of the sample
    n = IMAGES if device.type == "cuda" else args.steps * args.batch
    loader = Loader(n, args.batch, seed=0, drop_last=True, device=device)
    builders: dict[str, Callable[[], Step]] = {
        label: lambda config=config: method_step(net, config, loader, amp)  # type: ignore[misc]
        for label, config in METHODS.items()
    }
    steps, samples = sampled(builders, random_batches(args.batch, args.steps, device), args.rounds, device)
    engines = {
        label: "fast" if isinstance(step, TrainStep) and step.fast else "reference" for label, step in steps.items()
    }
    result["methods"] += method_rows(arch, samples, engines, args.batch)


def forget(device: torch.device) -> None:
    """Free the memory and the compiled code of earlier steps."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.epoch_time", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--arch", nargs="+", default=["resnet18", "wrn34_10"], help="networks")
    parser.add_argument(
        "--tasks", nargs="*", default=["afd", "natural"], choices=["afd", "natural"], help="both, one or none"
    )
    parser.add_argument("--methods", action="store_true", help="after the tasks every method of the paper's Table 5")
    parser.add_argument("--batch", type=int, default=128, help="images a step")
    parser.add_argument("--steps", type=int, default=10, help="steps a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2, help="whole epochs of each loader")
    parser.add_argument(
        "--without", nargs="*", default=[], choices=list(INSTEAD), help="kernels to do without, in turn"
    )
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10: whole epochs of it")
    parser.add_argument("--quick", action="store_true", help="samples of steps alone, and no compile times")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: sizes that mean nothing")
    parser.add_argument("--first-step", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    device = resolve_device(args.device)
    if args.tiny:
        args.arch, args.batch, args.steps, args.rounds, args.quick = ["resnet8_half"], 8, 1, 2, True
    if args.first_step:
        began = time.perf_counter()
        net = build_model(args.arch[0], 10).to(device)
        our_step(net, "afd", resolve_amp("auto", device), "fast")(*random_batches(args.batch, 1, device)[0])
        wait(device)
        print(time.perf_counter() - began)
        return 0
    out = args.out or result_file("epoch-time", device)
    if args.data_dir is not None:
        load_dataset("cifar10", args.data_dir)  # so that a wrong folder ends the run now, not after minutes
    result = measure(args, device, out)
    tables = ([epoch_table(result)] if args.tasks else []) + ([methods_table(result)] if args.methods else [])
    print("\n\n".join([*tables, epoch_note(result), f"all of it in {out}"]))
    return 0


if __name__ == "__main__":
    from fastafd.cli import run_script

    run_script(main)
