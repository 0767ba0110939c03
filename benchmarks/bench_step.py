"""One AFD step in every form, under pytest-benchmark: to compare two commits on one machine.

    python -m pytest benchmarks/bench_step.py --benchmark-autosave
    python -m pytest benchmarks/bench_step.py --benchmark-compare --benchmark-compare-fail=median:10%

ResNet-18 at batch 128 on CUDA, a ResNet-8 of half width at batch 16 on a CPU. benchmarks.epoch_time has the tables.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.clock import wait
from benchmarks.forms import random_batches, step_forms
from fastafd.device import resolve_amp, resolve_device
from fastafd.models import build_model
from fastafd.training.graphs import WARM_UPS

DEVICE = resolve_device("auto")
ARCH, BATCH, ROUNDS = ("resnet18", 128, 20) if DEVICE.type == "cuda" else ("resnet8_half", 16, 5)
FORMS = ("naive", "paper-style", "strong", "compiled", "fast")


@pytest.mark.parametrize("form", FORMS)
def test_step(form: str, benchmark: Any) -> None:
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # for every form, because cuDNN keeps the first choice for a shape
    net = build_model(ARCH, 10).to(DEVICE)
    step = step_forms(net, "afd", resolve_amp("auto", DEVICE), [])[form]()
    (batch,) = random_batches(BATCH, 1, DEVICE)

    def run() -> None:
        step(*batch)
        wait(DEVICE)

    benchmark.pedantic(run, rounds=ROUNDS, iterations=1, warmup_rounds=WARM_UPS + 2)
