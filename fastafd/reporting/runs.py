"""Reading run folders: JSON and arrays, no models."""

from __future__ import annotations

import json
import re
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
        """The name of the model in tables: the method, and the recipe if the method has several."""
        recipe, label = self.config["recipe"], self.result["label"]
        name = {"released": "AFD", "vaft_d": "vAFT+D", "vaft_a": "vAFT+A"}.get(recipe)
        if name is None:
            name = f"AFD ({recipe})" if label == "AFD" else label
        return name + (" (matched)" if self.config["matched"] else "")

    @property
    def place(self) -> tuple[int, str]:
        """Sort key: row of Table 5, then label."""
        order = [*TABLE5]
        method = self.result["label"]
        return order.index(method) if method in order else len(order), self.label

    @property
    def origin(self) -> str:
        """The name of the file that `pretrained` named; empty if the run trained its starting weights itself."""
        pretrained = self.config["pretrained"]
        return "" if pretrained is None else Path(pretrained).name

    @property
    def varied(self) -> str | None:
        """The weight that a sweep varies, from the folder's name (gamma-25-seed0); None for a run of no sweep."""
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
        """The settings that differ from the recipe's, by dotted name."""
        return self.result["changed"]

    @property
    def settings(self) -> dict[str, Any]:
        """All settings by dotted name. Runs from before 2026-11-26 have only nested ones, with other prefixes."""
        return self.result.get("settings") or _dotted(self.config)

    @cached_property
    def trained(self) -> dict[str, Any]:
        """The accuracies of the trained model: {"clean": {"accuracy": …, "interval": …, "n": …}, …}.

        AutoAttack's is the later one of `fastafd.evaluate` if that one had the same eps and at least as many images.
        """
        accuracies = self.result["models"][self.result["label"]]
        file = self.folder / "evaluation-autoattack.json"
        if file.exists():
            later = json.loads(file.read_text())
            n = accuracies.get("autoattack", {"n": 0})["n"]
            same_task = (later["dataset"], later["eps"]) == (self.dataset, accuracies["eps"])
            if same_task and later["autoattack"]["n"] >= n:
                return accuracies | {"autoattack": later["autoattack"]}
        return accuracies

    @property
    def confused(self) -> dict[str, Any] | None:
        """The accuracies of f2, the confused features; None for a method without disentanglement."""
        return self.result["models"].get(f"{self.result['label']}, f2")

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def by_epoch(self, name: str) -> dict[int, float]:
        """The mean of a logged metric in each epoch, from 1; epochs in which it was not logged are missing."""
        by_epoch: dict[int, list[float]] = {}
        for line in self.log:
            if name in line:
                by_epoch.setdefault(line["epoch"], []).append(line[name])
        return {epoch: sum(values) / len(values) for epoch, values in by_epoch.items()}

    @cached_property
    def samples(self) -> dict[str, np.ndarray] | None:
        """The arrays of samples.npz (`fastafd.samples`); None if the run has no such file."""
        file = self.folder / "samples.npz"
        if not file.exists():
            return None
        with np.load(file) as arrays:
            return {name: arrays[name] for name in arrays.files}


def in_order(runs: Sequence[Run]) -> list[Run]:
    """The runs sorted by data set and network, then as in Table 5, then by seed."""
    return sorted(runs, key=lambda run: (run.dataset, run.arch, run.place, run.seed))


def printable(text: str) -> str:
    """JSON in which each byte of a name that is not UTF-8 is the replacement character, since no font has it."""
    return re.sub(r"(?<!\\ud[89ab][0-9a-f]{2})\\udc[89a-f][0-9a-f]", r"\\ufffd", text)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The finished runs in these folders; each is a run folder or holds run folders. UsageError if there are none."""
    files: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"runs: got {path}, takes a run folder with a result.json, or a folder of run folders")
        for file in (path / "result.json", *sorted(path.glob("*/result.json"))):
            if file.exists():
                files.setdefault(file.resolve(), file)
    runs = [Run(file.parent, json.loads(printable(file.read_text()))) for file in files.values()]
    runs = [run for run in runs if "label" in run.result]  # a version of fastafd before reports wrote none
    if not runs:
        raise UsageError(f"runs: no finished run in {', '.join(map(str, paths))}; a finished run has a result.json")
    return runs


def _dotted(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested settings by dotted name."""
    settings: dict[str, Any] = {}
    for name, value in config.items():
        settings |= _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return settings
