"""Facts about the generated code for tests/test_generated.py, in a separate process: python tests/on_fake_gpu.py FILE.

Every method's step is generated for a small network, every Triton kernel of it is compiled for three chips, and
every launcher of fastafd.kernels is called on fake tensors, beside the fake kernel.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from unittest import mock

from benchmarks import cuda_runtime

cuda_runtime.load()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import fake_gpu, generated, recorder  # noqa: E402
from fastafd.console import Console  # noqa: E402
from fastafd.kernels.operation import OPERATIONS  # noqa: E402

CHIPS = (80, 89, 90)
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def steps() -> tuple[list[dict], dict[str, str]]:
    """The generated code of every method, and all distinct Triton kernels by name."""
    rows, kernels = [], {}
    for config in generated.methods("", every=True):
        row, of = generated.recorded("resnet8_half", config, batch=32, side=32, classes=10)
        row["names"] = sorted({launch.name for launch in of.launches if launch.kind != "Triton"})
        rows.append(row)
        for label, source in of.sources.items():
            name = re.search(r"def (triton_\w+)\(", source)[1]
            kernels.setdefault(source.replace(name, "kernel"), (label, name, source))
    return rows, {label: (name, source) for label, name, source in kernels.values()}


def builds(kernels: dict[str, tuple[str, str]]) -> Iterator[dict]:
    """Every kernel with Inductor's configuration, compiled for every chip: registers a thread, bytes spilt."""
    import triton
    from torch._inductor.codecache import _load_triton_kernel_from_source
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for label, (name, source) in kernels.items():
        tuner = _load_triton_kernel_from_source(name, source)
        for config, chip in product(tuner.configs, CHIPS):
            meta = tuner._create_compile_meta(config)
            kernel = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
            log = io.StringIO()
            with redirect_stdout(log):
                options = tuner._create_compile_options(config, meta)
                triton.compile(kernel, target=GPUTarget("cuda", chip, 32), options=options)
            log_text = log.getvalue()
            spills = sum(map(int, re.findall(r"(\d+) bytes spill", log_text)))
            (registers,) = re.findall(r"Used (\d+) registers", log_text)
            yield {"kernel": label, "chip": chip, "registers": int(registers), "spills": spills}


def empty(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype, device="cuda")
    return tensor.to(memory_format=torch.channels_last) if last else tensor


def calls() -> Iterator[tuple[str, tuple]]:
    """Operations of fastafd.kernels with operands."""
    for batch, width, classes, dtype in product((128, 80, 1), (512, 640), (10, 100, 200), TYPES):
        y, w, g = empty(batch, dtype=torch.int64), empty(classes, width), empty(batch, width, dtype=dtype)
        d = empty(width, width)
        for b in (None, empty(classes)):
            for side, last in ((4, True), (8, True), (4, False), (1, True)):
                yield "attack_head", (empty(batch, width, side, side, dtype=dtype, last=last), y, w, b)
            yield "attack_head", (g, y, w, b)
            yield "afd_loss", (g, g, y, d, d, w, b, 0.05, 0.25, 25.0, 0.0)
        f, z = empty(2, batch, width, dtype=dtype), empty(batch, classes, dtype=dtype)
        yield "afd_gradients", (empty(), g, d, w, f, f, empty(2, batch, classes, dtype=dtype), 0.0)
        yield "kl_rows", (z, z)
        yield "kl_gradients", (empty(batch), z, z)
        yield "kl_gradients", (empty(1).expand(batch), z, z.t().contiguous().t())
    for batch in (128, 1):
        drawn = empty(batch, 2, dtype=torch.int64), empty(batch, dtype=torch.bool)
        yield "augment", (empty(batch, 32, 32, 3, dtype=torch.uint8), *drawn, 4)
        for x_last, grad_last, dtype in product((True, False), (True, False), TYPES):
            x, grad = empty(batch, 3, 32, 32, last=x_last), empty(batch, 3, 32, 32, dtype=dtype, last=grad_last)
            yield "linf_step", (x, grad, x, 0.03, 0.007)


def launchers() -> list[dict]:
    """For every call: the results of the launcher and of the fake kernel, and the number of launched kernels."""
    launches = []
    with recorder.Recorder():
        for name, operands in calls():
            op, counted = getattr(torch.ops.fastafd, name).default, []
            with recorder.kernels_noted(counted):
                launcher = recorder.facts(recorder.launcher(op)(*operands))
            same = launcher == recorder.facts(op(*operands))
            launch = {"operation": name, "operands": str(recorder.facts(operands)), "same": same}
            launches.append(launch | {"kernels": len(counted)})
    return launches


def main(out: Path) -> None:
    lines: list[str] = []
    ours = [name for name, of in OPERATIONS.items() if of.fused.__module__.startswith("fastafd.kernels.")]
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_DISABLE_LINE_INFO": "1"}
        with mock.patch.object(Console, "line", lambda console, text: lines.append(text)):
            rows, kernels = steps()
        with fake_gpu.fake_gpu():
            result = {"rows": rows, "launchers": launchers(), "builds": list(builds(kernels))}
    result |= {"kernels": sorted(kernels), "operations": sorted(ours), "said": lines}
    out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
