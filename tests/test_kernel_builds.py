"""Every variant of every kernel, compiled ahead of time for four chips: no spills, no tf32, shared memory that fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

CHIPS = {80, 89, 90, 100}
KERNELS = {
    "afd_loss._rows",
    "afd_loss._rows_of_logits",
    "afd_products._gradients",
    "afd_products._project",
    "attack_head._head",
    "augment._crop_flip",
    "kl_loss._gradients",
    "kl_loss._rows",
    "linf_step._step",
}


@pytest.mark.slow
def test_every_kernel_builds_for_every_chip_without_spills(tmp_path):
    """In a process of its own: the compiler and the interpreter exclude each other."""
    out = tmp_path / "builds.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernel_builds", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    builds = json.loads(out.read_text())["rows"]
    assert {(build["kernel"], build["chip"]) for build in builds} == {(k, chip) for k in KERNELS for chip in CHIPS}
    assert not any(build["spills"] or build["tf32"] for build in builds)
    assert all(0 < build["registers"] <= 255 for build in builds)
