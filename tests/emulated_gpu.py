"""The generated CUDA code of a step, computed on a CPU: python tests/emulated_gpu.py FILE.

Beside every fake tensor there is a real one. Each launch of a step is made on the real ones too: Inductor's kernels in
Triton's interpreter, library calls by PyTorch on the CPU, operations of fastafd by their references. FILE gets how far
what a step leaves (weights, statistics, counters, momentum, average) is from what it should be: in bf16 with kernels
combined from the same without, in float64 from the reference engine's.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

from benchmarks import cuda_runtime

cuda_runtime.load()

import torch  # noqa: E402
import torch._inductor.runtime.triton_helpers  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402

from benchmarks import fake_gpu, generated, recorder  # noqa: E402
from fastafd.attacks import Snapshot  # noqa: E402
from fastafd.console import Console  # noqa: E402
from fastafd.data import Augment  # noqa: E402
from fastafd.models import build_model, split  # noqa: E402
from fastafd.recipes import released  # noqa: E402
from fastafd.training import engine  # noqa: E402
from fastafd.training.build import build_step  # noqa: E402
from fastafd.training.optim import fuse  # noqa: E402
from fastafd.training.step import TrainStep  # noqa: E402
from fastafd.training.timing import PhaseTimer  # noqa: E402

CLASSES, BATCH, SIDE = 10, 4, 8
CONFIG = replace(released(), attack=replace(released().attack, steps=2))
INPUTS = ("images", "labels", "offsets", "flips", "noise", "epoch")
GENERATOR, APPLY = torch.Generator, nn.Module._apply


class Emulator(recorder.Recorder):
    """A recorder that executes the launches, on real memory beside the fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[int, Tensor] = {}  # bytes of every storage, by its address
        self.kernels: dict[str, Any] = {}
        self.combined = 0  # launches of several kernels in one

    def real(self, tensor: Tensor) -> Tensor:
        """The real tensor of a fake one; NaN in memory that was never written."""
        storage = tensor.untyped_storage()
        held = self.memory.get(storage._cdata)
        if held is None or held.numel() != storage.nbytes():
            held = self.memory[storage._cdata] = torch.full((storage.nbytes(),), 255, dtype=torch.uint8)
        whole = torch.empty(0, dtype=tensor.dtype).set_(held.untyped_storage())
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def note(self, func: Any, args: Any, named: Any, out: Any) -> None:
        super().note(func, args, named, out)
        with on_the_cpu():
            real_args, real_named = tree_map_only(Tensor, self.real, (args, named))
            if "device" in real_named:
                real_named = real_named | {"device": torch.device("cpu")}
            computed = func(*real_args, **real_named)
            pairs = zip(torch.utils._pytree.tree_leaves(out), torch.utils._pytree.tree_leaves(computed), strict=False)
            for fake, value in pairs:
                if isinstance(fake, Tensor) and "_fused_sgd_" not in str(func):
                    self.real(fake).copy_(value)

    def triton(self, compiler: Any, name: str, source: str, device_str: str = "cuda") -> Any:
        noted = super().triton(compiler, name, source, device_str)
        names = list(eval(re.search(r"'signature': (\{.*?\})", source)[1]))

        def run(*values: Any, stream: Any = None) -> None:
            noted.run(*values)
            if self.on:
                with on_the_cpu():
                    self.interpret(name, source, dict(zip(names, tree_map_only(Tensor, self.real, values))))

        return type("Emulated", (), {"run": staticmethod(run)})

    def interpret(self, name: str, source: str, values: dict[str, Any]) -> None:
        from torch._inductor.codecache import PyCodeCache
        from torch._inductor.runtime.triton_heuristics import GridExpr

        if source not in self.kernels:
            self.kernels[source] = getattr(PyCodeCache.load(source), name)
        tuner = self.kernels[source]
        self.combined += "combo_grid_meta" in tuner.inductor_meta
        config = tuner.configs[0]
        constants = dict(config.kwargs)
        grid = GridExpr.from_meta(tuner.inductor_meta, config)
        scope: dict[str, Any] = {**values, **constants}
        for line in grid.prefix:
            exec(line, scope)
        sizes = tuple(eval(str(size), scope) for size in (grid.x_grid, grid.y_grid, grid.z_grid))
        known = {key: value for key, value in constants.items() if key in tuner.fn.arg_names}
        tuner.fn[sizes](**values, **known)


def fill(name: str, tensor: Tensor) -> None:
    """Fixed values for every name, equal in every process: small, positive for statistics, integers from 1 to 4."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if tensor.dtype == torch.uint8:
        tensor.copy_(torch.randint(0, 256, tensor.shape, generator=generator, dtype=torch.uint8))
    elif tensor.dtype == torch.bool:
        tensor.copy_(torch.arange(tensor.numel()) % 2 == 0)
    elif not tensor.is_floating_point():
        tensor.copy_(torch.randint(1, 5, tensor.shape, generator=generator))
    elif "running_var" in name or name.startswith(("rate", "weight")):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.1 + 0.05)
    else:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)


def emulated(amp: str, dtype: torch.dtype, options: dict[str, Any]) -> tuple[dict[str, Tensor], Emulator]:
    """The results of an emulated step of recipe `released` with two attack steps."""
    torch._dynamo.reset()
    emulator = Emulator()
    net_of = partial(network, dtype=dtype)
    combined = mock.patch.object(engine, "COMBINED", options)
    with combined, fake_gpu.fake_gpu(), emulator.recording(), mock.patch.object(generated, "network", net_of):
        step, inputs = generated.step_on_nothing("resnet8_half", CONFIG, BATCH, SIDE, CLASSES, emulator, amp)
        step._recorded(*inputs)
        state = state_of(step)
        others = dict(zip(INPUTS, inputs)) | {f"rate {index}": rate for index, rate in enumerate(step._rates)}
        others["weight"] = step._weight
        teacher = step.engine._teacher.original.__self__.state_dict()
        with on_the_cpu():
            for name, tensor in (state | others).items():
                if tensor is not None:
                    fill(name, emulator.real(tensor.detach()))
            for name, value in taught(dtype, narrow=amp == "bf16").state_dict().items():
                emulator.real(teacher[name]).copy_(value)
        emulator.on = True
        step._recorded(*inputs)
        emulator.on = False
        with on_the_cpu():
            return {name: emulator.real(tensor.detach()).clone() for name, tensor in state.items()}, emulator


def reference(dtype: torch.dtype) -> dict[str, Tensor]:
    """The results of the same step of the reference engine."""
    config = replace(CONFIG, task=replace(CONFIG.task, amp="fp32", engine="reference"))
    net = network("", CLASSES, dtype)
    step = build_step(config, net, range(1), Augment(4, True, 0), Console())
    step.engine.teacher.load_state_dict(filled(split(network("", CLASSES, dtype)).backbone).state_dict())
    fuse(step.optimizer)  # for momentum from the first step on
    state = state_of(step)
    shapes = {"images": (BATCH, SIDE, SIDE, 3), "labels": (BATCH,), "offsets": (BATCH, 2), "flips": (BATCH,)}
    kinds = {"images": torch.uint8, "labels": torch.int64, "offsets": torch.int64, "flips": torch.bool}
    inputs = {name: torch.empty(shape, dtype=kinds[name]) for name, shape in shapes.items()}
    noise = torch.empty(BATCH, 3, SIDE, SIDE, dtype=dtype).to(memory_format=torch.channels_last)
    inputs |= {"noise": noise, "weight": torch.empty(())}
    rates = {f"rate {index}": torch.empty(()) for index, _ in enumerate(step.optimizer.param_groups)}
    with torch.no_grad():
        for name, tensor in (state | inputs | rates).items():
            fill(name, tensor)
    for group, rate in zip(step.optimizer.param_groups, rates.values(), strict=True):
        group["lr"] = rate
    step._run((*(inputs[name] for name in INPUTS[:5]), None), inputs["weight"], PhaseTimer(torch.device("cpu")))
    return state


def state_of(step: TrainStep) -> dict[str, Tensor]:
    state = {f"model.{key}": value for key, value in step.model.state_dict().items()}
    state |= {f"average.{key}": value for key, value in step.ema.module.state_dict().items()}
    momentum = (held["momentum_buffer"] for held in step.optimizer.state.values())
    return state | {f"momentum.{index}": value for index, value in enumerate(momentum)}


def network(arch: str, classes: int, dtype: torch.dtype) -> nn.Module:
    return build_model("resnet8_half", classes).to(dtype)


def filled(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            fill(f"teacher.{name}", tensor)
    return module


def taught(dtype: torch.dtype, narrow: bool) -> Snapshot:
    """The teacher's snapshot with real weights, which an emulated step does not have."""
    backbone = filled(split(network("", CLASSES, dtype)).backbone.eval())
    snapshot = Snapshot(backbone, torch.bfloat16 if narrow else dtype)
    snapshot.refresh()
    return snapshot


@contextmanager
def on_the_cpu() -> Iterator[None]:
    as_usual = mock.patch.multiple(torch, Generator=GENERATOR), mock.patch.multiple(nn.Module, _apply=APPLY)
    with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad(), as_usual[0], as_usual[1]:
        yield


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference of every tensor, relative to its largest value."""
    assert ours.keys() == theirs.keys()
    values = {}
    for name, value in ours.items():
        largest = theirs[name].double().abs().max().clamp_min(1e-30)
        values[name] = float((value.double() - theirs[name].double()).abs().max() / largest)
    return values


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        alone, one_by_one = emulated("bf16", torch.float32, {})
        together, combined = emulated("bf16", torch.float32, engine.COMBINED)
        exact, _ = emulated("fp32", torch.float64, engine.COMBINED)
    result: dict[str, Any] = {"combined": apart(together, alone), "float64": apart(exact, reference(torch.float64))}
    result["launches"] = [len(emulator.launches) for emulator in (one_by_one, combined)]
    result["combinations"] = [emulator.combined for emulator in (one_by_one, combined)]
    result["moved"] = apart(together, {name: filled_like(name, value) for name, value in together.items()})
    out.write_text(json.dumps(result, indent=1))


def filled_like(name: str, value: Tensor) -> Tensor:
    before = torch.empty_like(value)
    fill(name, before)
    return before


def rsqrt(x: Any) -> Any:
    """`libdevice.rsqrt`, which the interpreter does not have."""
    import triton.language as tl

    return 1.0 / tl.sqrt(x)


def tensors_patched(tensor: Any, *of: Any) -> None:
    """A patch of `tl.tensor` in the interpreter: NumPy 2.4 does not accept the `__index__` of Triton 3.6."""
    PATCH(tensor, *of)
    tensor.__index__ = lambda value: int(value.handle.data.squeeze())


if __name__ == "__main__":
    interpreter = import_module("triton.runtime.interpreter")
    PATCH, interpreter._patch_lang_tensor = interpreter._patch_lang_tensor, tensors_patched
    torch._inductor.runtime.triton_helpers.libdevice.rsqrt = rsqrt
    main(Path(sys.argv[1]))
