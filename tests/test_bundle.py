"""The offline bundle: built for this Python, installed into an empty folder, used with nothing else beside it than
what the machine is promised to have."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def missing_packages() -> list[str]:
    """The system packages that setup.sh needs to build FFCV and that are missing."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    missing = [name for name in ("g++", "pkg-config") if not shutil.which(name)]
    missing += [] if header.exists() else [str(header)]
    if "pkg-config" not in missing:
        libraries = ("opencv4", "libturbojpeg")
        missing += [name for name in libraries if subprocess.run(["pkg-config", "--exists", name]).returncode]
    return missing


@pytest.fixture(scope="module")
def bundle():
    """The module bundle.py, which lies in the root folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        import bundle
    return bundle


@pytest.fixture(scope="module")
def machine(bundle, tmp_path_factory):
    """The wheels; the folder they are installed in; `run(code, *argv)`, Python with that and the promised packages."""
    if missing := missing_packages():
        pytest.skip(f"FFCV cannot be built here without {', '.join(missing)}; make -B setup says how to add them")
    folder = tmp_path_factory.mktemp("bundle")
    bundle.write_bundle(PYTHON, folder / "wheels")
    wheels = sorted((folder / "wheels").iterdir())
    target = folder / "target"
    install = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", target, *wheels]
    subprocess.run(install, check=True, capture_output=True)

    promised = folder / "promised"
    promised.mkdir()
    for name in bundle.closure(bundle.PRESENT, PYTHON):
        package = metadata.distribution(name)
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (promised / top).exists():
                (promised / top).symlink_to(package.locate_file(top))

    def run(code: str, *argv: object) -> subprocess.CompletedProcess[str]:
        # Without the environment's packages (-S) and variables (-I); addsitedir also reads .pth files, as a start does.
        places = f"import site; site.addsitedir({str(target)!r}); site.addsitedir({str(promised)!r})\n"
        command = [sys.executable, "-I", "-S", "-c", places + code, *map(str, argv)]
        return subprocess.run(command, capture_output=True, text=True, cwd=folder)

    return SimpleNamespace(wheels=wheels, target=target, run=run)


@pytest.mark.slow
def test_what_is_in_it(machine):
    names = {wheel.name.split("-")[0] for wheel in machine.wheels}
    assert {"fastafd", "ffcv", "pyautoattack", "jsonargparse", "rich", "safetensors", "pyyaml"} <= names
    assert not names & {"torch", "numpy", "numba", "triton", "opencv_python", "scikit_learn", "scipy"}
    assert sum(wheel.stat().st_size for wheel in machine.wheels) < 30e6
    (ffcv,) = (wheel.name for wheel in machine.wheels if wheel.name.startswith("ffcv-"))
    assert re.fullmatch(r"ffcv-.*\+bundle-cp311-abi3-manylinux_2_\d+_x86_64\.whl", ffcv)
    assert (machine.target / "fastafd" / "kernels" / "__init__.py").exists()
    assert list(machine.target.glob("ffcv-*.dist-info/licenses/LICENSE"))


BETON = """
import io, json, sys
from pathlib import Path
import numpy as np
import ffcv, jsonargparse, pyautoattack, fastafd, fastafd.kernels
from PIL import Image
from fastafd.data import load_dataset, make_loader
from fastafd.data.loaders import epoch_order
from fastafd.training.natural import example_weights
from fastafd.settings import UsageError
from ffcv.libffcv import imdecode, resize_crop

tree, cache = map(Path, sys.argv[1:])
split = load_dataset("imagefolder", tree).train
shape = dict(batch_size=16, seed=3, device="cpu", cache=cache, drop_last=False)
loader = make_loader("ffcv", split, name="digits", report=print, **shape)
assert loader.kind == "ffcv" and list(cache.glob("digits-*.beton"))
batches = list(loader.epoch(0))
files = sorted(tree.glob("train/*/*.png"))
order = epoch_order(len(files), 3, 0)
source = np.stack([np.asarray(Image.open(files[i])) for i in order])
assert (np.concatenate([x for x, _ in batches]) == source).all()
assert [f"digit{y}" for _, labels in batches for y in labels] == [files[i].parent.name for i in order]

# what fastafd does not call: OpenCV's resizing and turbojpeg's decoder
large = np.kron(source[0], np.ones((4, 4, 1), np.uint8))
small = np.zeros_like(source[0])
resize_crop(large, 0, len(large), 0, len(large), small)
assert (small == source[0]).all()
jpeg = io.BytesIO()
Image.fromarray(large).save(jpeg, "JPEG", quality=95)
decoded = np.zeros_like(large)
assert imdecode(np.frombuffer(jpeg.getvalue(), np.uint8), decoded, *large.shape[:2], *large.shape[:2]) == 0
assert abs(decoded.astype(int) - np.asarray(Image.open(jpeg))).max() <= 20  # FFCV takes the fast, inexact DCT

try:
    example_weights()
except UsageError as error:
    assert "the one installed has none" in str(error)
else:
    raise AssertionError("pyautoattack came with its example")
modules = (ffcv, fastafd, fastafd.kernels, jsonargparse, pyautoattack)
mapped = {line.split()[-1] for line in open("/proc/self/maps")}
print(json.dumps({"modules": [module.__file__ for module in modules], "mapped": sorted(mapped)}))
"""


@pytest.mark.slow
def test_a_beton_file_is_written_and_read(machine, digit_tree, tmp_path):
    done = machine.run(BETON, digit_tree, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert all(Path(file).is_relative_to(machine.target) for file in report["modules"])
    inside = [Path(file).name for file in report["mapped"] if Path(file).is_relative_to(machine.target / "ffcv.libs")]
    assert {name.split("-")[0] for name in inside} >= {"libopencv_core", "libopencv_imgproc", "libturbojpeg"}
    ours = re.compile(r"/(usr/)?lib.*/lib(opencv|turbojpeg|GL|X11|lapack|blas|gfortran|quadmath)")
    assert not [file for file in report["mapped"] if ours.match(file)]


@pytest.mark.slow
@pytest.mark.parametrize("words, code", [(["--help"], 0), (["--recipe", "digits"], 2)])
def test_the_verb_runs(machine, words, code):
    done = machine.run("import runpy; runpy.run_module('fastafd.train', run_name='__main__')", *words)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    if code:  # the bundle leaves scikit-learn out
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: dataset: digits comes with scikit-learn")
    else:
        assert "--pretrained" in done.stdout


@pytest.mark.parametrize("variables, wanted", [([], ""), (["PYTHON=3.13"], "3.13")])
def test_make_takes_the_machines_python_and_sets_up_with_its_own(variables, wanted):
    outer = ("PYTHON", "MAKEFLAGS", "MAKEOVERRIDES")  # of the make that runs the tests
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    command = ["make", "-nB", "bundle", *variables]
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert 'PYTHON="python3" bash setup.sh' in shown.stdout
    assert f"bundle.py {wanted}\n" in shown.stdout


@pytest.mark.parametrize("version", ["python3.12", "3.10", "3", "3.12.1", "/bin/rm"])
def test_a_version_that_is_none(version):
    done = subprocess.run([sys.executable, ROOT / "bundle.py", version], capture_output=True, text=True)
    assert done.returncode and version in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("text", ["import numpy\n", "import cv2\nimport cv2\n"])
def test_a_source_of_another_kind_is_not_patched(bundle, text, tmp_path):
    (tmp_path / "source.py").write_text(text)
    with pytest.raises(SystemExit, match=r"source\.py has 'import cv2'"):
        bundle.patch(tmp_path / "source.py", "import cv2\n", "")
    assert (tmp_path / "source.py").read_text() == text
