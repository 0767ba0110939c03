"""The registers, spills and shared memory of every kernel, for GPUs that this machine does not have.

    python -m benchmarks.kernel_builds [--out FILE]

Runs the launchers on empty tensors of every type and of a grid of sizes, notes every launch, compiles all of them with
Triton ahead of time for four chips, and reads the report of ptxas. Prints a table of the worst variant of each kernel
and writes every build to FILE (default: benchmarks/measured/triton-VERSION/kernel-builds.json, which git ignores). The
exit code is 1 if a build spills or needs more shared memory than its chip has.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from datetime import date
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.clock import result_file
from fastafd.files import save_text

# Shared memory that a block may have, in bytes: CUDA C++ Programming Guide, "Technical specifications per compute
# capability".
CHIPS = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
WIDTHS = (512, 33)  # one divisible by 16, one not
CLASSES = (10, 100, 200, 1000)
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*u1",
}
TYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Launch:
    """One variant of a kernel, which Triton would compile on a GPU."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        names = [name for name, _ in self.signature]
        types = dict.fromkeys(kind for _, kind in self.signature if kind.startswith("*"))
        constants = " ".join(f"{names[index]}={value}" for index, value in self.constants)
        odd = [name for index, (name, kind) in enumerate(self.signature) if kind == "i32" and index not in self.aligned]
        return f"{self.name} {' '.join(types)} {constants} any: {' '.join(odd) or '-'}"

    @property
    def name(self) -> str:
        """Such as "afd_loss._rows"."""
        return f"{self.module.rpartition('.')[2]}.{self.kernel}"


@dataclass(frozen=True)
class Build:
    """What ptxas reports for a launch on a chip: registers a thread; spills and shared memory in bytes."""

    launch: str
    kernel: str
    chip: int
    registers: int
    spills: int
    shared: int
    tf32: bool


def launch_of(kernel: Any, operands: tuple[Any, ...], named: dict[str, int]) -> Launch:
    """The variant of the `triton.JITFunction` that Triton would compile for these operands.

    named: the kernel's constants and Triton's options. The launchers align every tensor to 16 bytes.
    """
    function, varying = kernel.fn, kernel.do_not_specialize
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    values = dict(zip(names, operands)) | {name: value for name, value in named.items() if name in names}
    signature, constants, aligned = [], [], []
    for index, name in enumerate(names):
        value = values[name]
        kind = "constexpr"
        if isinstance(value, Tensor):
            kind = POINTERS[value.dtype]
            aligned.append(index)
        elif isinstance(value, float):
            kind = "fp32"
        elif isinstance(value, int) and name not in named and (value != 1 or name in varying):
            kind = "i32"
            if value % 16 == 0 and name not in varying:
                aligned.append(index)
        if kind == "constexpr":
            constants.append((index, value))
        signature.append((name, kind))
    options = tuple(sorted((name, value) for name, value in named.items() if name not in names))
    return Launch(function.__module__, function.__name__, tuple(signature), tuple(constants), tuple(aligned), options)


@contextmanager
def noted() -> Iterator[set[Launch]]:
    """The launches that are made inside this block; none of them takes place."""
    from triton import KernelInterface

    variants: set[Launch] = set()

    def note(kernel: Any, grid: tuple[int, ...]) -> Any:
        return lambda *operands, **named: variants.add(launch_of(kernel, operands, named))

    with mock.patch.object(KernelInterface, "__getitem__", note):
        yield variants


def launches() -> list[Launch]:
    """Every variant that the launchers choose for the sizes named above."""
    afd_loss, products, attack_head, augment, kl_loss, linf_step = (
        import_module(f"fastafd.kernels.{name}")
        for name in ("afd_loss", "afd_products", "attack_head", "augment", "kl_loss", "linf_step")
    )

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype)

    with noted() as variants:
        for dtype, width, classes in product(TYPES, WIDTHS, CLASSES):
            y = empty(4, dtype=torch.int64)
            for parameters in dict.fromkeys((dtype, torch.float32)):
                g, d = empty(4, width, dtype=dtype), empty(width, width, dtype=parameters)
                w, b = empty(classes, width, dtype=parameters), empty(classes, dtype=parameters)
                *_, f, df, dz = afd_loss.afd_loss_fused(g, g, y, d, d, w, b, 0.05, 0.25, 25.0, 0.0)
                products.afd_gradients_fused(empty(1), g, d, w, f, df, dz, 0.0)
            w, b = empty(classes, width), empty(classes)
            image = empty(4, width, 4, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
            attack_head.attack_head_fused(image, y, w, b)
            attack_head.attack_head_fused(empty(4, width, dtype=dtype), y, w, b)
            z = empty(4, classes, dtype=dtype)
            rows = kl_loss.kl_rows_fused(z, z)
            kl_loss.kl_gradients_fused(rows, z, z)
        for pixels, slope, size in product(TYPES, TYPES, (32, 27)):
            x, grad = empty(1, 3, size, size, dtype=pixels), empty(1, 3, size, size, dtype=slope)
            linf_step.linf_step_fused(x, grad, x, 0.1, 0.1)
        x = empty(4, 32, 32, 3, dtype=torch.uint8)
        augment.augment_fused(x, empty(4, 2, dtype=torch.int64), empty(4, dtype=torch.bool), 4)
    return sorted(variants, key=str)


def build(launch: Launch, chip: int) -> Build:
    """Compile one variant for one chip (80: sm_80)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = import_module(launch.module).__dict__[launch.kernel]
    source = ASTSource(
        fn=kernel,
        signature=dict(launch.signature),
        constexprs={(index,): value for index, value in launch.constants},
        attrs={(index,): [["tt.divisibility", 16]] for index in launch.aligned},
    )
    log = io.StringIO()
    with redirect_stdout(log):
        compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=dict(launch.options))
    log_text = log.getvalue()
    spills = sum(int(number) for number in re.findall(r"(\d+) bytes spill", log_text))
    (registers,) = re.findall(r"Used (\d+) registers", log_text)
    tf32 = "tf32" in compiled.asm["ptx"]
    return Build(str(launch), launch.name, chip, int(registers), spills, compiled.metadata.shared, tf32)


def builds_table(rows: list[dict[str, Any]]) -> str:
    """The most registers and shared memory of any variant, and all spills, by kernel and chip, as Markdown."""
    builds = [Build(**row) for row in rows]
    kernels = sorted({variant.kernel for variant in builds})
    lines = [
        "| kernel | builds | " + " | ".join(f"sm_{chip}" for chip in CHIPS) + " |",
        "|---" * (2 + len(CHIPS)) + "|",
    ]
    for kernel in kernels:
        cells = []
        for chip in CHIPS:
            variants = [b for b in builds if (b.kernel, b.chip) == (kernel, chip)]
            most = (max(b.registers for b in variants), max(b.shared for b in variants) / 1024)
            spills = sum(b.spills for b in variants)
            cells.append("{} regs, {:.1f} KiB".format(*most) + (f", {spills} B spilt" if spills else ""))
        count = sum(b.kernel == kernel for b in builds)
        lines.append(f"| {kernel} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def builds_note(result: dict[str, Any]) -> str:
    """The line below the table: the number of builds, the version of Triton and the date."""
    return f"{len(result['rows'])} builds by Triton {result['triton']}, {result['date']}."


def complaints(builds: list[Build]) -> list[str]:
    """What would be wrong on a GPU: spilt registers, too much shared memory, tf32 instead of fp32."""
    lines = [f"sm_{b.chip} spills {b.spills} B: {b.launch}" for b in builds if b.spills]
    lines += [
        f"sm_{b.chip} needs {b.shared} B of shared memory: {b.launch}" for b in builds if b.shared > CHIPS[b.chip]
    ]
    return lines + [f"sm_{b.chip} computes in tf32: {b.launch}" for b in builds if b.tf32]


def main() -> int:
    import triton

    default = result_file("kernel-builds", f"triton-{triton.__version__}")
    parser = argparse.ArgumentParser(prog="benchmarks.kernel_builds", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=default, metavar="FILE")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_DISABLE_LINE_INFO": "1"}
        wanted = list(product(launches(), CHIPS))
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            builds = list(pool.map(build, *zip(*wanted), chunksize=4))
    result = {"triton": triton.__version__, "date": str(date.today()), "rows": [asdict(built) for built in builds]}
    lines = ",\n".join(json.dumps(row) for row in result["rows"])  # a line each, so that diffs are readable
    head = json.dumps({name: value for name, value in result.items() if name != "rows"})
    save_text(out, f'{head[:-1]}, "rows": [\n{lines}\n]}}\n')
    problems = complaints(builds)
    print("\n".join([builds_table(result["rows"]), "", builds_note(result), *problems]))
    print(f"{len(problems)} complaints; every build is in {out}")
    return bool(problems)


if __name__ == "__main__":
    from fastafd.cli import run_script

    run_script(main)
