"""A fake H100: inside a context, torch, Inductor and Triton behave as if the device existed.

    cuda_runtime.load()                    # before torch is imported
    with fake_gpu(), FakeTensorMode():     # models made here on "cuda" compile to the code of an H100
        ...

What is patched is private to PyTorch; seen working with 2.11.0 and 2.14.1. Two patches fail silently where they go
missing: without that of `amp_definitely_not_available` autocast switches itself off, without that of
`_select_conv_backend` Inductor takes every 16-bit convolution for one that needs NCHW. `benchmarks.launches.check`
looks for their effect.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch._dynamo.device_interface
import torch._inductor.runtime.triton_helpers
import torch._inductor.utils
from torch import nn
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

# The properties that CUDA reports for an "NVIDIA H100 80GB HBM3".
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
    uuid="0",
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
)


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Raise RuntimeError if torch is a CPU build or Triton is missing: neither generates code for a GPU."""
    if torch.version.cuda is None:
        raise RuntimeError("this torch is a CPU build: the generated code is that of a CUDA build")
    try:
        import triton  # noqa: F401
    except ImportError:
        raise RuntimeError("no triton: it is what the generated code is written in") from None
    with ExitStack() as stack:
        for patch in (*of_cuda(), *of_compilers(), *of_fake_tensors()):
            stack.enter_context(patch)
        yield


def of_cuda() -> Iterator[Any]:
    """Patches of `torch.cuda`: one H100 that never has work to wait for."""
    answers: dict[str, Callable[..., Any]] = {
        "device_count": lambda: 1,
        "is_available": lambda: False,  # otherwise Dynamo would save the state of the device's generator
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: H100,
        "get_device_capability": lambda device=None: (H100.major, H100.minor),
        "get_device_name": lambda device=None: H100.name,
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": lambda device=None: None,
        "set_device": lambda device: None,
        "current_stream": lambda device=None: Stream(),
        "Stream": Stream,
        "stream": lambda stream: nullcontext(),
        "device_of": lambda tensor: nullcontext(),
        "_DeviceGuard": lambda index: nullcontext(),
        "_lazy_init": lambda: None,
        "graph_pool_handle": lambda: (0, 0),
        "get_rng_state": lambda *_: torch.empty(16, dtype=torch.uint8, device="cpu"),
        "set_rng_state": lambda *_: None,
        "manual_seed": lambda *_: None,
        "manual_seed_all": lambda *_: None,
    }
    for name, answer in answers.items():
        yield mock.patch.object(torch.cuda, name, answer)
    yield mock.patch.object(torch.cuda.random, "_lazy_init", lambda: None)
    yield mock.patch.object(torch, "Generator", Generator)
    yield mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)
    # Autocast calls one of these two, depending on the version of PyTorch.
    yield mock.patch.object(torch.amp.autocast_mode, "amp_definitely_not_available", lambda: False, create=True)
    yield mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)


def of_compilers() -> Iterator[Any]:
    """Patches of the device interfaces of Dynamo, Inductor and Triton."""
    import triton

    yield mock.patch.object(triton.runtime.driver, "_active", Driver())
    yield mock.patch.object(torch._inductor.runtime.triton_helpers, "set_driver_to_gpu", lambda: None)
    interface = torch._dynamo.device_interface.CudaInterface
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_properties": lambda device=None: H100,
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: Stream(),
        "get_raw_stream": lambda index: 0,
        "is_bf16_supported": lambda including_emulation=True: True,
        "exchange_device": lambda device: 0,
        "maybe_exchange_device": lambda device: 0,
    }
    for name, answer in answers.items():
        yield mock.patch.object(interface, name, staticmethod(answer))
    yield mock.patch.object(interface.Worker, "get_device_properties", staticmethod(lambda device=None: H100))
    yield mock.patch.object(interface.Worker, "current_device", staticmethod(lambda: 0))
    # From the data sheet; Inductor uses them for its choices.
    tflops = lambda dtype: 67.0 if dtype is torch.float32 else 989.0  # noqa: E731
    yield mock.patch.object(torch._inductor.utils, "get_device_tflops", tflops)
    yield mock.patch.object(torch._inductor.utils, "get_gpu_dram_gbps", lambda: 3352.0)

    select, cudnn = torch._C._select_conv_backend, torch._C._ConvBackend.Cudnn  # type: ignore[attr-defined]

    def select_conv_backend(*operands: Any, **named: Any) -> Any:
        """A stand-in for a check of cuDNN that asks the device whether it supports bf16."""
        image = operands[0] if operands else named["input"]
        return cudnn if image.is_cuda else select(*operands, **named)

    yield mock.patch.object(torch._C, "_select_conv_backend", select_conv_backend)


def of_fake_tensors() -> Iterator[Any]:
    """Patches for making tensors on the device, in models and in generated code: fake tensors, constants on the CPU."""
    guards = torch._C._dynamo.guards

    def empty_strided(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device="cuda")

    def reinterpret(tensor: torch.Tensor, size: Any, stride: Any, offset: int = 0) -> torch.Tensor:
        return torch.as_strided(tensor, size, stride, tensor.storage_offset() + offset)

    yield mock.patch.object(guards, "_empty_strided_cuda", empty_strided)
    yield mock.patch.object(guards, "_reinterpret_tensor", reinterpret)
    yield mock.patch.object(guards, "copy_if_misaligned", lambda tensor: tensor, create=True)
    yield mock.patch.object(FakeTensor, "data_ptr", lambda tensor: 256, create=True)  # aligned like an allocation
    yield mock.patch.object(FakeTensorMode, "avoid_device_init", property(lambda mode: True))
    yield mock.patch("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None)
    yield mock.patch.object(nn.Module, "_apply", applied)
    deduce = UniformValueConstantFolder._deduce_value

    def on_the_cpu(folder: Any, node: Any) -> Any:
        with OnTheCPU():
            return deduce(folder, node)

    yield mock.patch.object(UniformValueConstantFolder, "_deduce_value", on_the_cpu)


def applied(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` that makes new parameters, because the data of a fake one cannot be replaced."""
    for child in module.children():
        child._apply(function)
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(function(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
    return module


class OnTheCPU(TorchDispatchMode):
    """Inductor reads the values of constants of one element, so these are made on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if named.get("device") is not None:
            named["device"] = torch.device("cpu")
        return func(*args, **named)


class Stream:
    """A stream without any work."""

    device = torch.device("cuda", 0)
    cuda_stream = stream_id = device_index = 0

    def __init__(self, *of: Any, **named: Any) -> None: ...

    def wait_stream(self, other: Stream) -> None: ...

    def synchronize(self) -> None: ...


class Generator:
    """A generator that is never drawn from."""

    def __init__(self, device: Any = None) -> None: ...

    def manual_seed(self, seed: int) -> Generator:
        return self

    def get_state(self) -> None: ...


class Driver:
    """A driver of Triton for a device that code is compiled for, without launches."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 90, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    @property
    def utils(self) -> Any:
        raise RuntimeError("there is no device")
