"""The CUDA code that is generated for the steps, without a GPU: whole graphs, one layout, few launches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

# What fastafd's fast engine launches in a step of resnet8_half, at the most: a change that needs more says why here.
LAUNCHES = {
    "natural": 111,
    "pgd_at": 453,
    "vaft": 453,
    "rift": 70,
    "afkd": 472,
    "arrest": 520,
    "released": 471,
    "trades": 564,
}
CHIPS = (80, 89, 90)
needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None or sys.platform != "linux" or shutil.which("cc") is None,
    reason="generated code is that of a CUDA build of torch, on Linux, with a C compiler",
)


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in a separate process, because the stand-in for the CUDA runtime must be loaded before torch."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = inherited | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    out = folder / "found.json"
    done = run("tests/on_fake_gpu.py", str(out), TORCHINDUCTOR_CACHE_DIR=str(folder / "inductor"))
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@needs_cuda_build
@pytest.mark.slow
def test_every_method_of_the_fast_engine_is_whole_graphs(recorded):
    assert {row["method"] for row in recorded["rows"]} == set(LAUNCHES)
    assert {row["method"]: row["graph_breaks"] for row in recorded["rows"]} == {method: [] for method in LAUNCHES}
    said = [line for line in recorded["said"] if "are frozen" not in line]  # RiFT trains one module
    assert said == []  # no part compiled in pieces or left uncompiled


@needs_cuda_build
@pytest.mark.slow
def test_images_are_channels_last_and_none_is_laid_out_anew(recorded):
    for row in recorded["rows"]:
        assert row["not_channels_last"] == [], row["method"]
        assert not [move for move in row["moved"] if "permuted" in move["what"]], row["method"]
        assert not [name for name in row["names"] if "_local_scalar_dense" in name or "permute" in name]


@needs_cuda_build
@pytest.mark.slow
def test_a_step_needs_no_more_launches_than_recorded(recorded):
    counts = {row["method"]: sum(row["parts"][-1]["launches"].values()) for row in recorded["rows"]}
    assert all(0 < counts[method] <= most for method, most in LAUNCHES.items()), counts


@needs_cuda_build
@pytest.mark.slow
def test_launchers_return_what_fake_kernels_promise(recorded):
    assert {call["operation"] for call in recorded["launchers"]} == set(recorded["operations"])
    assert all(call["kernels"] > 0 for call in recorded["launchers"])
    assert not [call for call in recorded["launchers"] if not call["same"]]


@needs_cuda_build
@pytest.mark.slow
def test_generated_kernels_build_for_every_chip_without_spills(recorded):
    assert {(b["kernel"], b["chip"]) for b in recorded["builds"]} == {
        (k, c) for k in recorded["kernels"] for c in CHIPS
    }
    assert all(0 < built["registers"] <= 255 for built in recorded["builds"])
    assert not [built for built in recorded["builds"] if built["spills"]]


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    out = tmp_path_factory.mktemp("emulated") / "found.json"
    done = run("tests/emulated_gpu.py", str(out))
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@needs_cuda_build
@pytest.mark.slow
def test_the_generated_code_computes_what_the_reference_does(computed):
    """A whole AFD step in float64: Inductor's CUDA kernels in Triton's interpreter, compared with plain PyTorch."""
    assert min(computed["moved"].values()) > 1e-3  # the step moved everything that is compared
    assert max(computed["float64"].values()) < 1e-9, computed["float64"]


@needs_cuda_build
@pytest.mark.slow
def test_combined_kernels_change_no_bit(computed):
    """In bf16, where weights and gradients are cast: fewer launches, and the same weights, statistics and counters."""
    alone, together = computed["launches"]
    assert together < alone - 30
    assert computed["combinations"][1] > computed["combinations"][0]
    assert max(computed["combined"].values()) == 0.0, computed["combined"]


def launch(kind: str, *of: tuple[tuple[int, ...], tuple[int, ...], torch.dtype], **more):
    from benchmarks.launches import Launch, Operand

    *reads, written = (Operand(shape, stride, dtype, index) for index, (shape, stride, dtype) in enumerate(of))
    return Launch("attack", kind, kind, reads, [written], **more)


def test_a_failed_stand_in_is_refused():
    """Without the patches, autocast switches itself off, and Inductor uses NCHW for convolutions."""
    from benchmarks.launches import check

    last, first = ((8, 4, 6, 6), (144, 1, 24, 4)), ((8, 4, 6, 6), (144, 36, 6, 1))
    good = launch("convolution", (*last, torch.bfloat16), (*last, torch.bfloat16))
    check([good], torch.bfloat16)
    wide = launch("dgrad", (*last, torch.float32), (*last, torch.float32))
    with pytest.raises(RuntimeError, match=r"a dgrad reads .*float32.*: autocast is off on this fake GPU"):
        check([good, wide], torch.bfloat16)
    planes = launch("convolution", (*last, torch.bfloat16), (*first, torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"writes \(8, 4, 6, 6\) with strides \(144, 36, 6, 1\), not channels_last"):
        check([good, planes], torch.bfloat16)
    with pytest.raises(RuntimeError, match="no convolution was recorded"):
        check([launch("Triton", (*last, torch.bfloat16), (*last, torch.bfloat16))], torch.bfloat16)


def test_the_cache_spares_what_was_touched_last():
    """Tensors of 400 bytes: one read, one written and read at once, one written."""
    from benchmarks.launches import Launch, Operand, with_cache

    first, second, third = (Operand((100,), (1,), torch.float32, memory) for memory in range(3))
    steps = [Launch("", "Triton", "", [first], [second]), Launch("", "Triton", "", [second], [third])]
    assert with_cache(steps, 0)[1] == 1600
    assert with_cache(steps, 1200)[1] == 400  # the first read
    assert with_cache(steps, 800)[1] == 400  # the first tensor, which is clean, makes room for the third
    assert with_cache(steps, 400)[1] == 800  # the second is written back
    assert with_cache(steps, 100)[1] == 1600
    assert with_cache(steps, 0, floor=2.0, gap=1.0)[0] == 6.0


def test_without_a_compiler_it_says_so(tmp_path):
    done = run("-m", "benchmarks.generated", PATH=str(tmp_path), CC="cc")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "error: no C compiler on Linux here (CC, cc, gcc or clang): it makes a stand-in for the CUDA runtime\n"
    )


@needs_cuda_build
def test_a_method_without_a_fast_engine_says_so():
    done = run("-m", "benchmarks.generated", "--method", "atas")
    assert done.returncode == 2 and done.stdout == ""
    reason = "method: atas has no code of the fast engine: it keeps a perturbation of every image"
    assert done.stderr == f"error: {reason}\n"
