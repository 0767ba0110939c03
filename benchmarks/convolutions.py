"""The times of every distinct convolution of a network on 32x32 images, and the roofline measured in the same run.

    python -m benchmarks.convolutions [--arch resnet18 wrn34_10] [--batch 128] [--rounds 30] [--out FILE]
    python -m benchmarks.convolutions --templates    # also Triton's templates, which autotune first

bf16 channels_last on CUDA, fp32 channels_last in one thread on a CPU. On CUDA a round is one replay of a graph of 16
calls, each with inputs and an output of its own; the median of the rounds is args. The forms:

    forward, dgrad, wgrad   F.conv2d; the input's gradient alone; the weight's alone
    dgrad as forward        F.conv2d of the output's gradient, with weights flipped and transposed beforehand; of stride
                            2 one for each place of a pixel (fastafd.attacks.arms)
    bias, ReLU              forward, bias and ReLU in separate calls of torch
    compiled, cuDNN fused, Triton template    the same by torch.compile, by cuDNN in one, by inductor's own convolution
    forward of 8, dgrad of 8                  the stem, its input and weight padded from 3 to 8 channels

The roofline is max(FLOPs / peak, bytes / bandwidth): the peak that of the fastest product or convolution that
`benchmarks.limits` finds, the bandwidth that of a large copy, the bytes the least that must move, each input once and
each output once. Where convolutions are faster than it, as a cache makes possible, no share of the limit is shown. A
form that raises, or whose result is wrong, has "no" in the table and the reason in the JSON. FILE is by default
benchmarks/measured/DEVICE/convolutions.json, which git ignores.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.clock import device_name, median_seconds, result_file, save
from benchmarks.limits import limits, share
from fastafd.attacks.arms import turned_gradient, turned_weights
from fastafd.device import resolve_device
from fastafd.models import build_model

# Each form, and the form whose result it must reproduce.
SAME = {
    "dgrad as forward": "dgrad",
    "compiled": "bias, ReLU",
    "cuDNN fused": "bias, ReLU",
    "Triton template": "bias, ReLU",
    "forward of 8": "forward",
    "dgrad of 8": "dgrad",
}
OFF = 0.02  # the largest relative distance of a result, in the norm: several rounding errors of bf16
RATES = ("forward", "dgrad")  # the forms whose TFLOP/s and sums the table shows
OTHERS = ("dgrad as forward", "wgrad", "bias, ReLU", *list(SAME)[1:])


@dataclass(frozen=True)
class Shape:
    """A square convolution without bias; its padding is half its kernel."""

    c_in: int
    side: int
    c_out: int
    kernel: int
    stride: int

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_side(self) -> int:
        return (self.side - 1) // self.stride + 1

    def flops(self, batch: int) -> int:
        return 2 * batch * self.out_side**2 * self.c_out * self.c_in * self.kernel**2

    def numbers(self, batch: int) -> int:
        """The number of values in its input, weight and output together."""
        images = batch * (self.c_in * self.side**2 + self.c_out * self.out_side**2)
        return images + self.c_out * self.c_in * self.kernel**2


def shapes(arch: str) -> Counter[Shape]:
    """The distinct convolutions of a network, in the order of its forward pass, and how often each occurs."""
    counts: Counter[Shape] = Counter()

    def note(module: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        _, c_in, side, _ = inputs[0].shape
        shape = Shape(c_in, side, module.out_channels, module.kernel_size[0], module.stride[0])
        assert module.groups == 1 and (shape.padding, shape.out_side) == (module.padding[0], output.shape[2])
        counts[shape] += 1

    with torch.device("meta"):
        net = build_model(arch, 10).eval()
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        net(torch.empty(1, 3, 32, 32))
    return counts


def draw(shape: Shape, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """One input set: image, weight, bias, the output's gradient, and tensors prepared from them."""

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype)

    x = normal(batch, shape.c_in, shape.side, shape.side)
    w = normal(shape.c_out, shape.c_in, shape.kernel, shape.kernel) / (shape.c_in * shape.kernel**2) ** 0.5
    g = normal(batch, shape.c_out, shape.out_side, shape.out_side)
    drawn = {"x": x, "w": w, "g": g} | turned(shape, w)
    if shape.c_in == 3:
        drawn |= {f"{name}8": F.pad(drawn[name], (0, 0, 0, 0, 0, 5)) for name in "xw"}
    drawn = {name: value.contiguous(memory_format=torch.channels_last) for name, value in drawn.items()}
    return drawn | {"b": normal(shape.c_out)}


def turned(shape: Shape, w: Tensor) -> dict[str, Tensor]:
    """The weights of the forward convolutions that give the input's gradient, by name."""
    return {f"turned{i}": v for i, v in enumerate(turned_weights(w, [shape.stride] * 2, [shape.padding] * 2))}


def shape_forms(shape: Shape, cuda: bool, templates: bool) -> dict[str, tuple[Callable[..., Tensor], str]]:
    """Every form of a convolution: its function, and the names that `draw` gives to its operands."""
    stride, padding = [shape.stride] * 2, [shape.padding] * 2

    def forward(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, stride, padding)

    def backward(g: Tensor, x: Tensor, w: Tensor, wanted: int) -> Tensor:
        mask = [index == wanted for index in range(3)]
        return torch.ops.aten.convolution_backward(g, x, w, None, stride, padding, [1, 1], False, [0, 0], 1, mask)[
            wanted
        ]

    def dgrad(g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return backward(g, x, w, 0)

    def biased(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(x, w, b, stride, padding).relu()

    forms: dict[str, tuple[Callable[..., Tensor], str]] = {"forward": (forward, "x w"), "dgrad": (dgrad, "g x w")}
    names = turned(shape, torch.empty(shape.c_out, shape.c_in, shape.kernel, shape.kernel, device="meta"))
    square = [shape.kernel] * 2, stride, padding, [shape.side] * 2
    forms["dgrad as forward"] = lambda g, *w: turned_gradient(g, w, *square), " ".join(["g", *names])
    forms["wgrad"] = lambda g, x, w: backward(g, x, w, 1), "g x w"
    forms["bias, ReLU"] = biased, "x w b"
    forms["compiled"] = torch.compile(biased, dynamic=False), "x w b"
    if cuda:
        fused = torch.ops.aten.cudnn_convolution_relu
        forms["cuDNN fused"] = lambda x, w, b: fused(x, w, b, stride, padding, [1, 1], 1), "x w b"
    if cuda and templates:
        # Inductor turns a 1x1 convolution of stride 1 into a product, so the backends of products are set too.
        backends = {"max_autotune_conv_backends": "TRITON", "max_autotune_gemm_backends": "TRITON"}
        template = torch.compile(biased, dynamic=False, options={"max_autotune": True, **backends})
        forms["Triton template"] = template, "x w b"
    if shape.c_in == 3:
        forms["forward of 8"] = forward, "x8 w8"
        forms["dgrad of 8"] = lambda g, x, w: dgrad(g, x, w)[:, :3], "g x8 w8"
    return forms


def distance(got: Tensor, expected: Tensor) -> float:
    """The relative distance from the expected result, in the norm."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def times(
    forms: dict[str, tuple[Callable[..., Tensor], str]], sets: list[dict[str, Tensor]], rounds: int
) -> tuple[dict[str, float], dict[str, str]]:
    """The microseconds of every form that works, and the reasons why the others do not."""
    us: dict[str, float] = {}
    failed: dict[str, str] = {}
    results: dict[str, Tensor] = {}
    for form, (function, names) in forms.items():
        torch._dynamo.reset()
        inputs = [[drawn[name] for name in names.split()] for drawn in sets]
        try:
            results[form] = function(*inputs[0])
            off = distance(results[form], results[SAME.get(form, form)])
            if not off < OFF:
                raise ArithmeticError(f"off by {off:.1%} of the norm of {SAME.get(form, form)}")
            us[form] = round(median_seconds(function, inputs, rounds, inputs[0][0].device) * 1e6, 2)
        except Exception as error:
            if form not in SAME:
                raise
            failed[form] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return us, failed


def convolutions_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for every convolution, then the share of the roofline that the library reaches."""
    return "\n\n".join(of_arch([row for row in rows if row["arch"] == arch]) for arch in arches(rows))


def arches(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["arch"] for row in rows))


def of_arch(rows: list[dict[str, Any]]) -> str:
    others = [form for form in OTHERS if any(form in row["us"] | row["failed"] for row in rows)]
    head = [rows[0]["arch"], "count", "GFLOP", "MB", "roofline us"]
    head += [name for form in RATES for name in (f"{form} us", "TFLOP/s")] + [f"{form} us" for form in others]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = ["{kernel}x{kernel}/{stride} {c_in} to {c_out} of {side}x{side}".format(**row), str(row["count"])]
        cells += [f"{row['gflop']:.3g}", f"{row['mb']:.1f}", f"{row['roofline_us']:.1f}"]
        cells += [cell for form in RATES for cell in (f"{row['us'][form]:.1f}", f"{row['tflops'][form]:.3g}")]
        for form in others:
            cells.append(f"{row['us'][form]:.1f}" if form in row["us"] else "no" if form in row["failed"] else "")
        lines.append("| " + " | ".join(cells) + " |")
    limit = sum(row["count"] * row["roofline_us"] for row in rows)
    sums = {form: sum(row["count"] * row["us"][form] for row in rows) for form in RATES}
    reached = ", ".join(f"{form} {spent:.0f} us{of_limit(limit / spent)}" for form, spent in sums.items())
    count = sum(row["count"] for row in rows)
    return "\n".join(
        [*lines, "", f"All {count} convolutions of {rows[0]['arch']}: roofline {limit:.0f} us, {reached}."]
    )


def of_limit(part: float) -> str:
    """A share of the roofline in brackets, if the roofline was not exceeded."""
    return f" ({share(part)} of the limit)" if share(part) else ""


def convolutions_note(result: dict[str, Any]) -> str:
    """The line above the table: device, versions, date, type, and the measured limits; in old files a product's."""
    machine = f"{result['device']}, PyTorch {result['torch']}, {result['date']}; {result['dtype']}"
    reached = f"{result.get('peak_by', 'a product')} reaches {result['peak_tflops']:.3g} TFLOP/s"
    return f"{machine}, batch {result['batch']}; {reached}, a copy {result['copy_gb_s']:.4g} GB/s."


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.convolutions", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["resnet18", "wrn34_10"], help="networks")
    parser.add_argument("--batch", type=int, default=128, help="images a call")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--templates", action="store_true", help="also Triton's templates (CUDA), which autotune")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args(argv)

    device = resolve_device(args.device)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    out = args.out or result_file("convolutions", device)
    networks = {arch: shapes(arch) for arch in args.arch}

    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    peak, by, bandwidth = limits(device, dtype, args.rounds)
    of = device_name(device) + ("" if cuda else ", one thread")
    result: dict[str, Any] = {"device": of, "torch": torch.__version__, "date": str(date.today())}
    result |= {"batch": args.batch, "dtype": str(dtype).removeprefix("torch.")}
    result |= {"peak_tflops": round(peak / 1e12, 4), "peak_by": by, "copy_gb_s": round(bandwidth / 1e9, 1), "rows": []}
    print(convolutions_note(result), flush=True)
    for arch, counts in networks.items():
        for shape, count in counts.items():
            sets = [draw(shape, args.batch, device, dtype) for _ in range(16 if cuda else 2)]
            us, failed = times(shape_forms(shape, cuda, args.templates), sets, args.rounds)
            flops, moved = shape.flops(args.batch), shape.numbers(args.batch) * dtype.itemsize
            row: dict[str, Any] = {"arch": arch} | asdict(shape) | {"count": count}
            row |= {"gflop": flops / 1e9, "mb": moved / 1e6}
            row |= {"roofline_us": round(max(flops / peak, moved / bandwidth) * 1e6, 2)}
            row |= {"tflops": {form: round(flops / us[form] / 1e6, 4) for form in RATES}, "us": us, "failed": failed}
            result["rows"].append(row)
            save(result, out)  # an interrupted run keeps its results
        print(f"\n{convolutions_table([row for row in result['rows'] if row['arch'] == arch])}", flush=True)
    print(f"\nall of it in {out}")
    return 0


if __name__ == "__main__":
    from fastafd.cli import run_script

    run_script(lambda: main(sys.argv[1:]))
