"""A stand-in for the CUDA runtime on a machine without a GPU: a small C library, compiled when it is needed.

PyTorch's autograd engine asks the runtime for a device before it differentiates CUDA tensors, fake ones too. The
answers below are all that it asks; the dynamic linker takes the first library that has a name, so this one has to be
loaded before torch.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = """
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
_Bool _ZN3c104cuda17hasPrimaryContextEa(signed char device) { return 0; }  /* c10::cuda::hasPrimaryContext */
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 0; return 0; }
int cuInit(unsigned flags) { return 0; }
"""


def load() -> None:
    """Compile and load the stand-in. RuntimeError, one line, if that fails."""
    if "torch" in sys.modules:
        raise RuntimeError("the stand-in for the CUDA runtime has to be loaded before torch is imported")
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if sys.platform != "linux" or compiler is None:
        raise RuntimeError(
            "no C compiler on Linux here (CC, cc, gcc or clang): it makes a stand-in for the CUDA runtime"
        )
    if importlib.metadata.version("torch").endswith("+cpu"):
        raise RuntimeError("this torch is a CPU build: the generated code is that of a CUDA build")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "runtime.c"), Path(folder, "libcuda.so.1")
        source.write_text(SOURCE)
        command = [
            compiler,
            "-shared",
            "-fPIC",
            "-O1",
            "-w",
            "-Wl,-soname,libcuda.so.1",
            "-o",
            str(library),
            str(source),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"{compiler} cannot make a library: {(done.stderr.strip() or 'no reason').splitlines()[-1]}"
            )
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
