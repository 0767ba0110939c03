"""Run folders as a report reads them: JSON and arrays, without loading a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastafd.reporting.paper import TABLE5
from fastafd.settings import UsageError


@dataclass(frozen=True)
class Run:
    """A finished run: `result` is its result.json."""

    folder: Path
    result: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        return self.result["config"]

    @property
    def label(self) -> str:
        """What tables call the model: the method, and which recipe of it where there are several."""
        recipe, label = self.config["recipe"], self.result["label"]
        named = {"released": "AFD", "vaft_d": "vAFT+D", "vaft_a": "vAFT+A"}.get(recipe)
        if named is None:
            named = f"AFD ({recipe})" if label == "AFD" else label
        return named + (" (matched)" if self.config["matched"] else "")

    @property
    def place(self) -> tuple[int, str]:
        """What sorts labels as the paper's Table 5 does, and those of one method by name."""
        order = [*TABLE5]
        method = self.result["label"]
        return order.index(method) if method in order else len(order), self.label

    @property
    def origin(self) -> str:
        """The given weights that it began with, or nothing where they are its own."""
        given = self.config["pretrained"]
        return "" if given is None else Path(given).name

    @property
    def varied(self) -> str | None:
        """The weight that a run of a sweep varies, by its folder's name (benchmarks/sweep.py): gamma-25-seed0."""
        first = self.folder.name.split("-")[0]
        return first if first in ("alpha", "beta", "gamma") and first in self.config["method"] else None

    @property
    def arch(self) -> str:
        return self.config["task"]["arch"]

    @property
    def dataset(self) -> str:
        return self.result["dataset"]["name"]

    @property
    def seed(self) -> int:
        return self.config["task"]["seed"]

    @property
    def changed(self) -> dict[str, Any]:
        """Settings that are not the recipe's own, by dotted name."""
        return self.result["changed"]

    @cached_property
    def trained(self) -> dict[str, Any]:
        """The figures of the model that the run trained: {"clean": {"accuracy": …, "interval": …, "n": …}, …}."""
        found = self.result["models"][self.result["label"]]
        file = self.folder / "evaluation-autoattack.json"  # by fastafd.evaluate, later
        if file.exists():
            later = json.loads(file.read_text())
            most = found.get("autoattack", {"n": 0})["n"]
            if later["dataset"] == self.dataset and later["autoattack"]["n"] >= most:
                return found | {"autoattack": later["autoattack"]}
        return found

    @property
    def confused(self) -> dict[str, Any] | None:
        """The figures of its f2, where it is disentangled."""
        return self.result["models"].get(f"{self.result['label']}, f2")

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def by_epoch(self, name: str) -> dict[int, float]:
        """The mean of a logged figure in every epoch (from 1) that has it."""
        found: dict[int, list[float]] = {}
        for line in self.log:
            if name in line:
                found.setdefault(line["epoch"], []).append(line[name])
        return {epoch: sum(values) / len(values) for epoch, values in found.items()}

    @cached_property
    def samples(self) -> dict[str, np.ndarray] | None:
        """The arrays of samples.npz (`fastafd.samples`), or None where an older run has none."""
        file = self.folder / "samples.npz"
        if not file.exists():
            return None
        with np.load(file) as arrays:
            return {name: arrays[name] for name in arrays.files}


def in_order(runs: Sequence[Run]) -> list[Run]:
    """By data set and network, then as in the paper's Table 5, then by seed."""
    return sorted(runs, key=lambda run: (run.dataset, run.arch, run.place, run.seed))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The finished runs in these folders, each a run folder or one that holds such. UsageError where there is none."""
    files: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"runs: got {path}, takes a run folder with a result.json, or a folder of such")
        for file in (path / "result.json", *sorted(path.glob("*/result.json"))):
            if file.exists():
                files.setdefault(file.resolve(), file)
    found = [Run(file.parent, json.loads(file.read_text())) for file in files.values()]
    found = [run for run in found if "label" in run.result]  # else it is of a fastafd before reports
    if not found:
        raise UsageError(f"runs: no finished run in {', '.join(map(str, paths))}; one has a result.json")
    return found
