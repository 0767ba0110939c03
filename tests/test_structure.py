"""The shape of the tree: who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

# A module may import those of its own layer and of the layers before it.
LAYERS = [
    ["settings", "kernels", "console", "capture"],
    ["files", "device", "kernel_checks", "timing"],
    ["reporting"],
    ["models", "attacks", "data"],
    ["methods", "ema", "optim", "checkpoint"],
    ["graphs"],
    ["config", "engine"],
    ["recipes"],
    ["step"],
    ["afd_step", "fast_at", "certificate"],
    ["loop"],
    ["cli"],
    ["report"],
    ["evaluation"],
    ["evaluate"],
    ["pretrain", "rift", "samples"],
    ["fine_tuning"],
    ["train", "verify"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def sources():
    for folder, prefix in ((ROOT / "fastafd", ""), (ROOT / "kernels", "kernels.")):
        for path in sorted(folder.rglob("*.py")):
            yield prefix + ".".join(path.relative_to(folder).with_suffix("").parts), path


def runtime_imports(path):
    """Modules of fastafd that the file imports when it is imported (not for types alone)."""
    tree = ast.parse(path.read_text())
    typing_only = {id(n) for node in ast.walk(tree) if isinstance(node, ast.If) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fastafd":
            rest = node.module.split(".")[1:]
            yield from [rest[0]] if rest else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fastafd.")]


def test_layers():
    seen = set()
    for name, path in sources():
        own = name.split(".")[0]
        if own in ("__init__", "__main__"):
            continue
        seen.add(own)
        for target in runtime_imports(path):
            assert LEVEL[target] <= LEVEL[own], f"{path.relative_to(ROOT)} imports {target}"
            if LEVEL[target] == LEVEL[own]:
                assert target == own, f"{path.relative_to(ROOT)} imports {target} of its own layer"
    assert seen == set(LEVEL)


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
