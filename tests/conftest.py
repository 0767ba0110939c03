"""Shared fixtures: a cache of the tests' own, and small trees of real images."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CIFAR10 = ROOT.parent / "shared" / "data"


def verb(name: str) -> dict[str, Any]:
    """What `fastafd/NAME.py` defines. `import fastafd.evaluate` would replace the function `fastafd.evaluate`."""
    return runpy.run_module(f"fastafd.{name}", alter_sys=True)


def line_of(main, argv, capsys, code: int = 2) -> str:
    """The last line of the verb's output, which must be one line."""
    from fastafd import cli

    with pytest.raises(SystemExit) as stop:
        cli.run(main, [str(word) for word in argv])
    err = capsys.readouterr().err
    assert stop.value.code == code, err
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """FASTAFD_CACHE in a temporary folder, for this process and for those it starts."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTAFD_CACHE", str(folder))
        # On a GPU every small network would have its convolutions timed; tests of the choice say for how long.
        patch.setattr("fastafd.attacks.choice.BUDGET_S", 0.0)
        yield folder


@pytest.fixture(scope="session")
def digit_tree(tmp_path_factory) -> Path:
    """scikit-learn's digits in their native 8x8 pixels as an image tree: 24 training and 6 test images a class."""
    from PIL import Image
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    for digit in range(10):
        images = digits.images[digits.target == digit][:30]
        for index, image in enumerate(images):
            folder = root / ("train" if index < 24 else "test") / f"digit{digit}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.uint8(np.round(image * 255 / 16))
            Image.fromarray(pixels).convert("RGB").save(folder / f"{index:02d}.png")
    return root


@pytest.fixture(scope="session")
def cifar10_tree(tmp_path_factory) -> Path:
    """Twenty real CIFAR-10 images a class and split, where the repository's neighbour folder has them."""
    if not (CIFAR10 / "unpack.py").exists():
        pytest.skip(f"no real CIFAR-10 at {CIFAR10.relative_to(ROOT.parent)} beside the checkout")
    root = tmp_path_factory.mktemp("cifar10")
    command = [sys.executable, str(CIFAR10 / "unpack.py"), "cifar10", str(root), "--per-class", "20"]
    subprocess.run(command, check=True, capture_output=True)
    return root


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The same arithmetic in every test, and in what a module's tests share, whatever else the machine does."""
    torch.set_num_threads(1)
