"""The roofline of the CUDA code of a step of the fast engine, computed without a GPU.

    python -m benchmarks.generated [--arch resnet18] [--batch 128] [--side 32] [--classes 10] [--method afd] [--json]
    python -m benchmarks.generated --all                  # every method of the fast engine
    python -m benchmarks.generated --arch torchvision:resnet50 --side 224 --classes 1000
    python -m benchmarks.generated --arms plain fused     # with forms of the attack's convolutions wherever they apply

Runs the whole step, in bf16, on fake CUDA tensors: Dynamo, AOTAutograd and Inductor generate the code of an H100, and
every launch is recorded instead of run, with what it reads and writes. Prints the launches, FLOPs, bytes and roofline
of each part of the step; the same total with a cache, and with a floor and a gap for each launch; Inductor's most
expensive kernels; tensors that are not channels_last; what is copied, cast or permuted.

A launch takes the longer of its FLOPs at 798 TFLOP/s (a bf16 product of 8192) and its bytes at 3.0 TB/s (a copy): cuDNN
is assumed to be perfect, and every tensor comes from memory and goes there. That is the roofline of the generated code
and no time: nothing has run. It says nothing of cuDNN's choices, numerics, streams, peak memory or a recording.

FILE of --out is JSON, as is what --json prints; without --out no file is written. Needs a CUDA build of torch, Triton
and a C compiler, else one line says what is missing and the exit code is 1; so it is where convolutions are not in bf16
or not channels_last, for then the stand-in for the GPU has failed.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import cuda_runtime

IMAGES, SHOWN = 50_000, 10  # images of an epoch, kernels shown
# The other assumptions: bytes of cache, least seconds of a launch, seconds between two launches.
MODELS = {
    "as it is": (0.0, 0.0, 0.0),
    "with an L2 of 25 MB": (25e6, 0.0, 0.0),
    "with an L2 of 40 MB": (40e6, 0.0, 0.0),
    "with 2 us a launch at the least and 1 us between": (0.0, 2e-6, 1e-6),
    "with both, 40 MB": (40e6, 2e-6, 1e-6),
}


def step_on_nothing(
    arch: str, config: Any, batch: int, side: int, classes: int, recorder: Any, amp: str = "bf16", arm: str = ""
) -> tuple[Any, tuple[Any, ...]]:
    """The step of a recipe, whose parts `recorder` distinguishes, and inputs for `step._recorded`.

    Call it in `fake_gpu`.
    """
    import torch
    from torch import Tensor

    from benchmarks.forms import method_step
    from fastafd.training.engine import Fast

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    with torch.device("cuda"):
        net = network(arch, classes)
    step = method_step(net, config, range(IMAGES // batch), amp)  # type: ignore[arg-type] # its length alone is read
    noise = epoch = None
    if step.attack is not None:
        dtype = next(step.model.parameters()).dtype
        noise = empty(batch, 3, side, side, dtype=dtype).to(memory_format=torch.channels_last)
    if step.method.replays_noise:
        epoch = empty(dtype=torch.int64)
    images, labels = empty(batch, side, side, 3, dtype=torch.uint8), empty(batch, dtype=torch.int64)
    drawn = empty(batch, 2, dtype=torch.int64), empty(batch, dtype=torch.bool)
    step._set_scalars(1.0)
    step._phases = lambda name: recorder.of({"update": "backward"}.get(name, name))  # type: ignore[assignment]
    step._loss = recorder.tagged("update", step._loss)  # type: ignore[method-assign]
    step.optimizer.step = recorder.tagged("optimizer", step.optimizer.step)  # type: ignore[method-assign]
    if isinstance(step.engine, Fast) and step.engine.snapshot is not None:
        step.engine.refresh = recorder.tagged("snapshot", step.engine.refresh)
        assert step.engine.choice is not None
        step.engine.choice.forced = (
            tuple(arm.split("+")) if arm not in ("", "plain") else ()
        )  # there is no device to time on
    return step, (images, labels, *drawn, noise, epoch)


def network(arch: str, classes: int) -> Any:
    """The classifier of that name; "torchvision:NAME" is one of torchvision."""
    import torch

    from fastafd.models import build_model

    source, _, name = arch.rpartition(":")
    if source != "torchvision":
        return build_model(arch, classes)
    import torchvision

    return torchvision.models.get_model(name, num_classes=classes).to(memory_format=torch.channels_last)


def recorded(arch: str, config: Any, batch: int, side: int, classes: int, arm: str = "") -> tuple[dict[str, Any], Any]:
    """What is generated for the step of a recipe, as JSON has it, and the recorder.

    RuntimeError where the stand-in for the GPU has failed: `benchmarks.launches.check`.
    """
    import torch

    from benchmarks.fake_gpu import fake_gpu
    from benchmarks.launches import check
    from benchmarks.recorder import Recorder

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    recorder = Recorder()
    with fake_gpu(), recorder.recording():
        step, inputs = step_on_nothing(arch, config, batch, side, classes, recorder, arm=arm)
        for recorder.on in (False, True):  # the first call compiles, the second is recorded
            with recorder.of("figures"):
                step._recorded(*inputs)
        recorder.on = False
    check(recorder.launches, torch.bfloat16)
    breaks = torch._dynamo.utils.counters["graph_break"]
    label = f"{config.recipe}, {arm}" if arm else config.recipe
    return {"method": label, "graph_breaks": list(breaks), **summary(recorder, IMAGES // batch)}, recorder


def summary(recorder: Any, steps: int) -> dict[str, Any]:
    """The totals of a recorded step; steps: in an epoch."""
    from benchmarks.launches import CONVOLUTIONS, by_kind, with_cache

    launches, sources = recorder.launches, recorder.sources
    of_part, of_kernel, of_layout, of_move = (defaultdict[Any, list[Any]](list) for _ in range(4))
    for launch in launches:
        of_part[launch.part].append(launch)
        if launch.kind == "Triton":
            shapes = [described(o) for o in sorted({*launch.reads, *launch.writes}, key=lambda o: -o.bytes)[:4]]
            of_kernel[launch.part, launch.name, ", ".join(shapes)].append(launch)
        for operand in {*launch.reads, *launch.writes}:
            if not operand.channels_last:
                of_layout[launch.part, launch.name, f"{described(operand)} by {operand.stride}"].append(launch)
        if move := launch.moves(sources):
            of_move[launch.part, move, launch.kind].append(launch)
    parts = []
    for part, own in {**of_part, "step": launches}.items():
        convolution = sum(launch.seconds for launch in own if launch.kind in CONVOLUTIONS)
        total = sum(launch.seconds for launch in own)
        figures = {"gflop": sum(launch.flops for launch in own) / 1e9, "gb": sum(launch.bytes for launch in own) / 1e9}
        figures |= {"convolution_ms": convolution * 1e3, "other_ms": (total - convolution) * 1e3}
        parts.append({"part": part, "launches": dict(by_kind(own)), **rounded(figures)})
    models = []
    for label, (capacity, floor, gap) in MODELS.items():
        seconds, moved = with_cache(launches, capacity, floor, gap)
        models.append({"model": label, **rounded({"step_ms": seconds * 1e3, "gb": moved / 1e9}), "steps": steps})

    def listed(groups: Any, names: tuple[str, ...]) -> list[dict[str, Any]]:
        rows = []
        for key, own in groups.items():
            figures = {"ms": sum(o.seconds for o in own) * 1e3, "mb": sum(o.bytes for o in own) / 1e6}
            rows.append(dict(zip(names, key)) | {"launches": sum(o.count for o in own)} | rounded(figures))
        return sorted(rows, key=lambda row: -row["ms"])

    return {
        "parts": parts,
        "models": models,
        "kernels": listed(of_kernel, ("part", "kernel", "largest"))[:SHOWN],
        "not_channels_last": listed(of_layout, ("part", "kernel", "tensor")),
        "moved": listed(of_move, ("part", "what", "kind")),
    }


def described(operand: Any) -> str:
    return f"{str(operand.dtype).removeprefix('torch.')}{list(operand.shape)}".replace(" ", "")


def rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in figures.items()}


def roofline_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the parts of each method's step, then its totals under each assumption."""
    from benchmarks.launches import KINDS
    from fastafd.reporting.markdown import markdown_table

    head = ["method", "part", "launches", *KINDS, "GFLOP", "GB", "convolutions ms", "the rest ms", "roofline ms"]
    parts: list[list[str]] = []
    for row in rows:
        for part in row["parts"]:
            counts = part["launches"]
            cells = [row["method"], part["part"], str(sum(counts.values()))]
            cells += [str(counts.get(kind, 0)) for kind in KINDS]
            cells += [f"{part['gflop']:.1f}", f"{part['gb']:.2f}"]
            cells += [f"{part['convolution_ms']:.3f}", f"{part['other_ms']:.3f}"]
            parts.append([*cells, f"{part['convolution_ms'] + part['other_ms']:.3f}"])
    totals = []
    for row in rows:
        for model in row["models"]:
            cells = [row["method"], model["model"], f"{model['gb']:.2f}", f"{model['step_ms']:.2f}"]
            totals.append([*cells, f"{model['step_ms'] * model['steps'] / 1e3:.2f}"])
    head_of_totals = ["method", "roofline of the generated code", "GB a step", "ms a step", "s an epoch"]
    return f"{markdown_table(head, parts)}\n\n{markdown_table(head_of_totals, totals)}"


def details(row: dict[str, Any]) -> str:
    """The kernels, layouts and copies on which a step of one method spends its bytes, line by line."""
    lines = [f"\n{row['method']}: graph breaks: {', '.join(row['graph_breaks']) or 'none'}"]
    lines.append(f"The {SHOWN} most expensive kernels of Inductor's (launches, MB, ms a step, largest tensors):")
    lines += [
        f"  {k['part']:10} {k['launches']:4} {k['mb']:9.1f} {k['ms']:7.3f}  {k['kernel']}  {k['largest']}"
        for k in row["kernels"]
    ]
    lines.append(
        "Tensors of four dimensions that are not channels_last:" + ("" if row["not_channels_last"] else " none")
    )
    lines += [f"  {t['part']:10} {t['launches']:4} {t['kernel']}  {t['tensor']}" for t in row["not_channels_last"]]
    lines.append("Copied, cast or permuted by a launch of its own:" + ("" if row["moved"] else " nothing"))
    lines += [
        f"  {m['part']:10} {m['launches']:4} {m['mb']:9.1f} {m['ms']:7.3f}  {m['what']} ({m['kind']})"
        for m in row["moved"]
    ]
    return "\n".join(lines)


def roofline_note(result: dict[str, Any]) -> str:
    """The text below the tables: the step, the compilers, the date, and the assumptions."""
    size = f"{result['side']}x{result['side']} pixels, {result['classes']} classes"
    return (
        f"{result['arch']}, batch {result['batch']}, {size}, bf16, an epoch of {IMAGES // result['batch']} steps;"
        f" generated for an H100 by PyTorch {result['torch']} and Triton {result['triton']}, {result['date']}."
        " Assumed: cuDNN perfect, 798 TFLOP/s, 3.0 TB/s (an L2: 5.5 TB/s)."
        " A roofline of the generated code, not a time: nothing has run."
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.generated", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet18", help="a network of fastafd.models, or torchvision:NAME")
    parser.add_argument("--batch", type=int, default=128, help="images a step")
    parser.add_argument("--side", type=int, default=32, help="pixels of an image's side")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--method", default="afd", help="afd, natural, or the recipe of another method")
    parser.add_argument("--all", action="store_true", help="every method of the fast engine")
    parser.add_argument(
        "--arms",
        nargs="+",
        default=[""],
        metavar="FORM",
        help="of the attack's convolutions: plain, fused, bits+turned",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON")
    args = parser.parse_args()
    try:
        cuda_runtime.load()  # before the first import of torch
        missing = ""
    except (RuntimeError, ImportError) as error:
        missing = str(error)
    from fastafd.cli import run_script

    run_script(lambda: show(args, missing))


def show(args: argparse.Namespace, missing: str) -> int:
    """Record the steps, print and write what was found. RunError if something is missing or the stand-in has failed."""
    from fastafd.settings import RunError

    if missing:
        raise RunError(missing)
    try:
        import triton

        chosen = methods(args.method, args.all)
        rows = [
            recorded(args.arch, config, args.batch, args.side, args.classes, arm)[0]
            for config in chosen
            for arm in args.arms
        ]
    except (RuntimeError, ImportError) as error:
        raise RunError(str(error).strip().splitlines()[0]) from error
    import torch

    from benchmarks.clock import save

    result: dict[str, Any] = {"arch": args.arch, "batch": args.batch, "side": args.side, "classes": args.classes}
    result |= {"torch": torch.__version__, "triton": triton.__version__, "date": str(date.today()), "rows": rows}
    if args.out:
        save(result, args.out)
    tables = "\n".join([roofline_table(rows), "", roofline_note(result), *map(details, rows)])
    print(json.dumps(result, indent=1) if args.json else tables)
    return 0


def methods(name: str, every: bool) -> list[Any]:
    """The recipe of that name, or every recipe that the fast engine runs. UsageError if there is none."""
    from benchmarks.forms import METHODS
    from fastafd.settings import UsageError, unknown

    fast = {config.recipe: config for config in METHODS.values() if not config.method.only_reference}
    if every:
        return list(fast.values())
    names = fast | {"afd": METHODS["AFD"]}
    for config in METHODS.values():
        if config.recipe == name and name not in names:
            raise UsageError(f"method: {name} has no code of the fast engine: {config.method.only_reference}")
    if name not in names:
        raise unknown("method", name, names)
    return [names[name]]


if __name__ == "__main__":
    main()
