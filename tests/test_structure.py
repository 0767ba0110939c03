"""The shape of the tree: who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

from benchmarks.pictures import ROOMS

# A file or folder may import from itself and from the rows above, nothing else.
LAYERS = ROOMS  # benchmarks/pictures.py, which draws the map of docs/ from the same rows
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


VERBS = LAYERS[-1]


def sources():
    """(dotted name below fastafd, path) of every module."""
    for folder, prefix in ((ROOT / "fastafd", ""), (ROOT / "kernels", "kernels.")):
        for path in sorted(folder.rglob("*.py")):
            yield prefix + ".".join(path.relative_to(folder).with_suffix("").parts), path


def place(name):
    """The file or folder at the top level of fastafd that a dotted name belongs to."""
    return name.split(".")[0]


def imported(path):
    """Dotted names below fastafd that a file imports when it runs, at its top or inside functions."""
    tree = ast.parse(path.read_text())
    for_checkers = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    typing_only = {id(inner) for node in for_checkers for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and place(node.module) == "fastafd":
            below = node.module.removeprefix("fastafd").lstrip(".")
            yield from [below] if below else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from [alias.name.removeprefix("fastafd.") for alias in node.names if place(alias.name) == "fastafd"]


def reached_from(start):
    """Every file and folder that `start` imports, directly or through others."""
    direct = {}
    for name, path in sources():
        direct.setdefault(place(name), set()).update(map(place, imported(path)))
    reached, left = set(), [start]
    while left:
        for target in direct[left.pop()] - reached:
            reached.add(target)
            left.append(target)
    return reached - {start}


def test_layers():
    seen = set()
    for name, path in sources():
        source = place(name)
        if source in ("__init__", "__main__"):
            continue
        seen.add(source)
        for target in map(place, imported(path)):
            assert target == source or LEVEL[target] < LEVEL[source], f"{path.relative_to(ROOT)} imports {target}"
    assert seen == set(LEVEL)


def test_walls():
    """Evaluation does not know training, a report reads files alone, methods are pure, and no module imports a verb."""
    assert not {"training", "recipes", "methods", "config"} & reached_from("evaluation")
    assert reached_from("reporting") <= {"settings", "files"}
    assert reached_from("methods") <= {"kernels", "models", "settings"}
    assert reached_from("kernels") == set()
    for _, path in sources():
        assert not set(VERBS) & set(map(place, imported(path))), path


def test_reporting_needs_no_torch():
    """`import fastafd` brings torch; the reports themselves never call it."""
    for name, path in sources():
        if place(name) == "reporting":
            modules = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import)]
            assert "torch" not in {place(alias.name) for node in modules for alias in node.names}, path
            assert "from torch" not in path.read_text(), path


def test_the_packages_are_those_of_the_wheel():
    """A folder that pyproject.toml does not list would be missing from the wheel, and from it alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        "fastafd." + ".".join(p.parent.relative_to(ROOT / "fastafd").parts)
        for p in ROOT.glob("fastafd/*/**/__init__.py")
    }
    kernels = {"fastafd." + ".".join(p.parent.relative_to(ROOT).parts) for p in ROOT.glob("kernels/**/__init__.py")}
    assert set(project["packages"]) == {"fastafd", *folders, *kernels}


def test_kernels_import_torch_and_triton_alone():
    allowed = {"torch", "triton", "fastafd"} | sys.stdlib_module_names
    for name, path in sources():
        if not name.startswith("kernels."):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in allowed, path


@pytest.mark.parametrize("statement", ["import fastafd", "from fastafd.kernels import afd_loss"])
def test_importing_is_light(statement):
    """No CUDA context, no triton, no data or plotting library."""
    heavy = "{'triton', 'ffcv', 'torchvision', 'sklearn', 'matplotlib', 'pyautoattack', 'tensorboard', 'kernels'}"
    check = f"assert not torch.cuda.is_initialized(); print(sorted({heavy} & set(sys.modules)))"
    code = f"{statement}; import sys, torch; {check}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names():
    import fastafd

    assert {"AFDStep", "PGD", "disentangle", "evaluate", "load_model"} <= set(fastafd.__all__)
    assert all(getattr(fastafd, name).__doc__ for name in fastafd.__all__)


def test_the_verb_evaluate_stands_beside_the_function():
    """`python -m` warns of a module that the package has imported already; no module imports the verb."""
    done = subprocess.run([sys.executable, "-m", "fastafd.evaluate", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "--attack" in done.stdout
    code = "import fastafd, fastafd.train, fastafd.verify, fastafd.report; print(fastafd.evaluate.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "fastafd.evaluation.measurements"


@pytest.mark.parametrize("words, code", [([], 2), (["--help"], 0), (["trian"], 2)])
def test_the_command_lists_its_verbs(words, code):
    done = subprocess.run([sys.executable, "-m", "fastafd", *words], capture_output=True, text=True)
    assert done.returncode == code
    assert "train" in done.stdout + done.stderr and "Traceback" not in done.stderr
