"""The README and the pages of docs/ compared with the tree: numbers, commands, files, and the drop-in example."""

from __future__ import annotations

import json
import re
import runpy
import sys
import warnings

import pytest
import torch
from conftest import ROOT, verb

from fastafd.recipes import RECIPES, find_recipe

README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
METHODS = DOCS["methods.md"]
EVERYTHING = "\n".join([README, *DOCS.values()])


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.parametrize("name", ["results", "overview", "engines", "reproduced"])
def test_results_tables_are_the_committed_measurements(name):
    from benchmarks import table

    page = README if name == "overview" else EVERYTHING
    command = "" if name == "results" else f" {name}"
    rows = getattr(table, name)()
    assert f"<!-- {name}: python -m benchmarks.table{command} -->\n{rows}\n<!-- end of {name} -->" in page


SPEED = re.findall(r"<!-- end of (.*-.*) -->", DOCS["measurements.md"] + DOCS["speed.md"])


@pytest.mark.parametrize("name", SPEED)
def test_tables_of_speed_are_the_committed_measurements(name):
    from benchmarks import convolutions, epoch_tables, generated, kernel_builds, kernels, verify_rates

    writers = {  # command -> table, note
        "kernel_builds": (kernel_builds.builds_table, kernel_builds.builds_note),
        "kernels": (kernels.kernels_table, kernels.kernels_note),
        "epoch_time": (epoch_tables.epoch_table, epoch_tables.epoch_note),
        "convolutions": (convolutions.convolutions_table, convolutions.convolutions_note),
        "generated": (generated.roofline_table, generated.roofline_note),
        "verify_rates": (verify_rates.rates_table, verify_rates.rates_note),
    }
    command = next(command for command in writers if name.startswith(command.replace("_", "-")))
    table, note = writers[command]
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    rows = table(result if command == "epoch_time" else result["rows"])
    assert (
        f"<!-- {name}: python -m benchmarks.{command} -->\n{rows}\n\n{note(result)}\n<!-- end of {name} -->"
        in EVERYTHING
    )


@pytest.mark.parametrize("name", re.findall(r"<!-- end of (methods-.*) -->", METHODS))
def test_tables_of_methods_are_the_committed_runs(name):
    from fastafd.reporting.markdown import markdown
    from fastafd.reporting.runs import read_runs
    from fastafd.reporting.tables import results

    rows = markdown(results(read_runs([ROOT / "benchmarks" / "results" / name])))
    command = f"python -m fastafd.report results benchmarks/results/{name}"
    assert f"<!-- {name}: {command} -->\n{rows}\n<!-- end of {name} -->" in METHODS


def test_seconds_of_methods_are_the_committed_measurement():
    from benchmarks.epoch_tables import epoch_note, methods_table

    result = json.loads((ROOT / "benchmarks" / "results" / "epoch-time-methods-cpu.json").read_text())
    text = f"{methods_table(result)}\n\n{epoch_note(result)}"
    assert f" -->\n{text}\n<!-- end of epoch-time-methods-cpu -->" in METHODS


def test_no_table_is_lost():
    """Each of these had a test when it stood in the README."""
    tables = {"results", "overview", "engines", "reproduced", "epoch-time-cpu", "kernels-cpu", "generated-resnet18"}
    assert tables <= set(re.findall(r"<!-- end of (.*) -->", EVERYTHING)) and len(SPEED) >= 8


LINKS = [
    (name, target)
    for name, text in {"README.md": README, **DOCS}.items()
    for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text)
]


@pytest.mark.parametrize("page, target", sorted(set(LINKS)))
def test_links_lead_somewhere(page, target):
    assert ((ROOT if page == "README.md" else ROOT / "docs") / target).exists()


def test_the_readme_is_an_entrance():
    assert len(README.splitlines()) <= 120
    for name in DOCS:
        assert name in ("index.md", "api.md", "five-minutes.md") or f"docs/{name}" in README, name


def test_flags_exist():
    """Flags of fastafd and of benchmarks, wherever a page names one."""
    from fastafd import train
    from fastafd.cli import entries

    verbs = [train.parse([]), *(verb(name)[config]() for name, config in CONFIGS.items())]
    known = {"--" + name.replace("_", "-") for config in verbs for name, *_ in entries(config)}
    known |= {"--resume", "--config", "--help"}
    for script in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'"(--[a-z-]+)"', script.read_text()))
    known |= {"--" + name for recipe in RECIPES.values() for name in vars(recipe().method)}
    assert {flag.rstrip(".-") for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9.-]+", EVERYTHING)} <= known


SCRIPTS = [path.stem for path in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("word, code", [("--help", 0), ("--no-such-flag", 2)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_benchmark_explains_itself(script, word, code, monkeypatch, capsys):
    """`--help` prints the usage and measures or draws nothing; a wrong flag is a usage error, not a traceback."""
    monkeypatch.setattr(sys, "argv", [script, word])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as stop:
        warnings.simplefilter("ignore", RuntimeWarning)  # the module was imported before it runs as a script
        runpy.run_module(f"benchmarks.{script}", run_name="__main__")
    output = capsys.readouterr()
    assert stop.value.code == code and "usage: " in (output.out if code == 0 else output.err)


CONFIGS = {
    "evaluate": "EvaluateConfig",
    "report": "ReportConfig",
    "verify": "VerifyConfig",
    "pretrain": "PretrainConfig",
}


@pytest.mark.parametrize("page", ["README.md", *DOCS, "../CONTRIBUTING.md"])
def test_files_that_pages_name_exist(page):
    text = README if page == "README.md" else (ROOT / "docs" / page).read_text()
    for name in re.findall(r"`((?:fastafd|kernels|benchmarks|tests|docs)/[a-z_0-9/.]*)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", ["README.md", "your-model.md"])
def test_the_drop_in_example_runs(page):
    """The code as it stands on the page, on a small network, with the weight decays of the recipe."""
    from fastafd.models import build_model

    text = README if page == "README.md" else DOCS[page]
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "AFDStep" in code]
    torch.manual_seed(0)
    batch = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8), torch.arange(4)
    names = {"net": build_model("resnet8_half", 10).eval(), "loader": [batch, batch]}
    exec(code, names)
    assert names["metrics"]["loss"].isfinite() and type(names["robust"]) is type(names["net"])
    released = find_recipe("released")
    decays = [group["weight_decay"] for group in names["optimizer"].param_groups]
    assert decays == [released.sgd.weight_decay, released.d2_weight_decay]
    assert names["optimizer"].defaults["lr"] == released.sgd.lr
