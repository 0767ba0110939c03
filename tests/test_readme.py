"""The README, the notes and the methods' page against the tree: figures, commands, files."""

from __future__ import annotations

import json
import re

import pytest
from conftest import ROOT, verb

README, NOTES, METHODS = ((ROOT / page).read_text() for page in ("README.md", "benchmarks/NOTES.md", "docs/methods.md"))


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def test_results_tables_are_the_committed_measurements():
    from benchmarks.table import engines, reproduced, results

    for name, rows in (("results", results), ("engines", engines), ("reproduced", reproduced)):
        command = "" if name == "results" else f" {name}"
        assert f"<!-- {name}: python -m benchmarks.table{command} -->\n{rows()}\n<!-- end of {name} -->" in README


@pytest.mark.parametrize(
    "page, name",
    [(page, name) for page in (NOTES, README) for name in re.findall(r"<!-- end of (.*-.*) -->", page)],
    ids=lambda value: value if len(value) < 40 else "page",
)
def test_tables_of_speed_are_the_committed_measurements(page, name):
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
    assert f"<!-- {name}: python -m benchmarks.{command} -->\n{rows}\n\n{note(result)}\n<!-- end of {name} -->" in page


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


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_flags_in_the_readme_exist():
    from benchmarks.parts import arguments
    from fastafd import train
    from fastafd.cli import entries

    known = {"--" + name.replace("_", "-") for name, *_ in entries(train.parse([]))}
    known |= {"--" + name.replace("_", "-") for name, *_ in entries(verb("evaluate")["EvaluateConfig"]())} | {
        "--resume",
        "--config",
        "--help",
    }
    known |= {flag for action in arguments("benchmarks.reproduce", "")._actions for flag in action.option_strings}
    for script in ("sweep", "epoch_time"):
        known |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / "benchmarks" / f"{script}.py").read_text()))
    assert set(re.findall(r"--[a-z][a-z0-9.-]+", README)) <= known


def test_code_map_names_what_is_there():
    for name in re.findall(r"`((?:fastafd|kernels|benchmarks)/[a-z_/.]*)`", README):
        assert (ROOT / name).exists(), name
