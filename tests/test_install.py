"""The wheel: built from the tree, installed into an empty environment, used with the tree out of reach."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tomllib
import venv

import pytest
from conftest import ROOT

PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Python of an environment with the wheel alone; what fastafd needs is borrowed from this one."""
    folder = tmp_path_factory.mktemp("install")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run(build, check=True, capture_output=True, cwd=folder)
    (wheel,) = folder.glob("fastafd-*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True, capture_output=True)
    (site / "borrowed.pth").write_text(
        sysconfig.get_path("purelib")
    )  # its .pth files, the editable install, do not run
    return python


def run(installed, *words):
    return subprocess.run([installed, *words], capture_output=True, text=True, cwd=installed.parent)


@pytest.mark.slow
def test_every_package_of_the_wheel_is_imported_from_it(installed):
    code = "import importlib, sys; print(*(importlib.import_module(n).__file__ for n in sys.argv[1:]), sep='\\n')"
    done = run(installed, "-c", code, *PACKAGES)
    assert done.returncode == 0, done.stderr
    home = str(installed.parents[1])
    assert all(line.startswith(home) for line in done.stdout.split()) and len(done.stdout.split()) == len(PACKAGES)


@pytest.mark.slow
def test_the_installed_package_works(installed, tmp_path):
    code = (
        "from importlib.resources import files; print(len(files('fastafd.reporting').joinpath('page.css').read_text()))"
    )
    assert int(run(installed, "-c", code).stdout) > 1000
    done = run(installed, "-m", "fastafd", "report", "results", str(ROOT / "benchmarks" / "results" / "methods-digits"))
    assert done.returncode == 0 and "| AFD |" in done.stdout, done.stderr
    command = "train --recipe digits --arch resnet8_half --epochs 0 --pretrain.epochs 0 --autoattack-n 0 --eval-n 5"
    done = run(installed, "-m", "fastafd", *command.split(), "--device", "cpu", "--out", str(tmp_path / "run"))
    assert done.returncode == 0 and (tmp_path / "run" / "model.safetensors").exists(), done.stderr
