"""The README against the tree: its figures, its commands, its files."""

from __future__ import annotations

import json
import re
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_results_table_is_the_committed_measurements(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    sys.modules.pop("benchmarks.table", None)
    from benchmarks.table import table

    assert f"<!-- results: python -m benchmarks.table -->\n{table()}\n<!-- end of results -->" in README


NOTES = (ROOT / "benchmarks" / "NOTES.md").read_text()


@pytest.mark.parametrize("name", re.findall(r"<!-- end of (.*) -->", NOTES))
def test_tables_of_the_notes_are_the_committed_measurements(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import kernel_builds, kernels

    of = kernels if name.startswith("kernels-") else kernel_builds
    found = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    command = f"<!-- {name}: python -m {of.__name__} -->"
    assert f"{command}\n{of.table(found['rows'])}\n\n{of.about(found)}\n<!-- end of {name} -->" in NOTES


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_flags_in_the_readme_exist():
    from fastafd import train
    from fastafd.cli import entries
    from fastafd.evaluate import EvaluateConfig

    known = {"--" + name.replace("_", "-") for name, *_ in entries(train.parse([]))}
    known |= {"--" + name.replace("_", "-") for name, *_ in entries(EvaluateConfig())} | {
        "--resume",
        "--config",
        "--help",
    }
    assert set(re.findall(r"--[a-z][a-z0-9.-]+", README)) <= known


def test_code_map_names_what_is_there():
    for name in re.findall(r"`((?:fastafd|kernels|benchmarks)/[a-z_/.]*)`", README):
        assert (ROOT / name).exists(), name
