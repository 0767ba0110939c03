"""Figures: the drawn values equal the CSV, and a run without the needed data is named."""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import xml.etree.ElementTree

import numpy as np
import pytest
from sklearn.metrics import silhouette_score

from fastafd.reporting import figures
from fastafd.reporting.runs import read_runs
from fastafd.settings import UsageError


def make_run(folder, label="AFD", recipe="released", seed=0, samples=True, gap=1.0, accuracy=0.9, classes=None, **more):
    """A finished run folder with 30 test images, written by this function."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    classes = classes or ["cat", "dog", "eel"]
    figure = {"n": 100, "correct": round(100 * accuracy), "accuracy": accuracy}
    figure |= {"interval": [accuracy - 0.06, accuracy + 0.04], "seconds": 1.0}
    measured = {"eps": "8/255", "clean": figure, "pgd20": figure | {"accuracy": accuracy - 0.3, "interval": [0.5, 0.7]}}
    method = {"alpha": 0.05, "beta": 0.5, "gamma": 25.0} | more.get("method", {}) if label == "AFD" else {}
    result = {
        "models": {"natural": measured, label: measured} | ({"AFD, f2": measured} if label == "AFD" else {}),
        "seconds": {
            "pretraining": more.get("pretraining", 2.0),
            "finetuning": {"wall": 10.0, "data": 1.0, "inputs": 0.5, "attack": 6.0, "ema": 0.25},
            "evaluation": 3.0,
        },
        "label": label,
        "dataset": {"name": more.get("dataset", "digits"), "train": 90, "test": 30, "classes": classes},
        "parameters": {"model": 1000, "training": 1200},
        "changed": more.get("changed", {}),
        "settings": {"recipe": recipe, "seed": seed, "attack.eps": "8/255", "attack.steps": 7, "epochs": 2}
        | {"batch_size": 64, "lr_schedule": [[0.0, 1.0]], "pretrained": None}
        | more.get("settings", {}),
        "config": {
            "recipe": recipe,
            "matched": more.get("matched", False),
            "task": {"arch": "resnet8_half", "seed": seed},
            "method": method,
            "attack": {"eps": 8 / 255, "steps": 7},
            "sgd": {"epochs": 2, "batch_size": 64, "lr_schedule": [[0.0, 1.0]]},
            "pretrained": None,
        },
        "device": "CPU, 1 threads",
        "versions": {"torch": "2.14.1+cu130"},
        "date": "2026-11-22 07:15 UTC",
        "python": "3.11.7",
        "amp": "fp32",
    }
    (folder / "result.json").write_text(json.dumps(result))
    lines = []
    for step in range(1, 5):
        line = {"step": 10 * step, "epoch": (step + 1) // 2, "loss": 2.0 / step, "adversarial_accuracy": 0.2 * step}
        if gap is not None:
            line |= {f"gap_{norm}": gap * step * by for by, norm in enumerate(("l1", "l2", "linf"), 1)}
        lines.append(json.dumps(line | {"clean_accuracy": 0.25 * step}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if samples:
        labels = np.arange(30) % len(classes)
        far = 4.0 * np.eye(len(classes), 8)[labels]
        np.savez_compressed(
            folder / "samples.npz",
            images=rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8),
            perturbation=rng.uniform(-8 / 255, 8 / 255, (3, 8, 8, 3)).astype(np.float16),
            label=np.arange(3) % len(classes),
            clean=np.arange(3) % len(classes),
            attacked=np.ones(3, dtype=np.int64),
            before=rng.normal(size=(30, 8)).astype(np.float16),
            f1=(far + 0.1 * rng.normal(size=(30, 8))).astype(np.float16),
            feature_label=labels,
        )
    return read_runs([folder])[0]


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figure that was saved last, as `drawn[-1]`."""
    pytest.importorskip("matplotlib")
    seen, save = [], figures._save
    monkeypatch.setattr(figures, "_save", lambda figure, *rest: seen.append(figure) or save(figure, *rest))
    return seen


def numbers(png):
    """The rows of the CSV; the PNG beside it must be a picture, and the SVG must contain text as text."""
    assert png.read_bytes().startswith(b"\x89PNG")
    root = xml.etree.ElementTree.parse(png.with_suffix(".svg")).getroot()
    assert any(element.tag.endswith("}text") for element in root.iter())
    with png.with_suffix(".csv").open() as file:
        return list(csv.DictReader(file))


def test_feature_gap_is_drawn_as_written(tmp_path, drawn):
    runs = [make_run(tmp_path / f"released-seed{seed}", seed=seed, gap=1.0 + seed) for seed in range(3)]
    runs += [make_run(tmp_path / "vaft-seed0", "vAFT", "vaft", gap=5.0)]
    runs += [make_run(tmp_path / "vaft-matched-seed0", "vAFT", "vaft", gap=4.0, matched=True)]
    runs += [make_run(tmp_path / "trades-seed0", "TRADES", "trades", gap=None)]
    runs += [make_run(tmp_path / "gamma-0-seed0", gap=99.0, method={"gamma": 0.0}, changed={"gamma": 0.0})]
    rows = numbers(figures.feature_gap(runs, tmp_path))
    assert {row["method"] for row in rows} == {"AFD", "vAFT", "vAFT (matched)"}  # no gap in TRADES, gamma-0 of a sweep
    for ax, norm in zip(drawn[-1].axes, ("l1", "l2", "linf"), strict=True):
        for line in ax.lines:
            points = [row for row in rows if (row["method"], row["norm"]) == (line.get_label(), norm)]
            assert line.get_xdata().tolist() == [int(row["epoch"]) for row in points] == [1, 2]
            assert line.get_ydata().tolist() == [float(row["mean"]) for row in points]
    first = rows[0]
    assert (first["method"], first["norm"], first["epoch"], first["seeds"]) == ("AFD", "l1", "1", "3")
    assert float(first["mean"]) == 3.0  # steps 1 and 2 of the epoch: 1.5 times 1, 2 and 3
    assert float(first["deviation"]) == statistics.stdev([1.5, 3.0, 4.5])
    assert len(drawn[-1].axes[0].collections) == 1  # only the method with several seeds has a band


def test_runs_of_other_settings_are_not_seeds(tmp_path, drawn):
    runs = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", gap=2.0, changed={"gamma": 10.0}, method={"gamma": 10.0}),
    ]
    rows = numbers(figures.feature_gap(runs, tmp_path))
    assert {row["method"] for row in rows} == {"AFD", "AFD, gamma 10.0"} and {row["seeds"] for row in rows} == {"1"}


def test_tsne_is_drawn_as_written(tmp_path, drawn):
    swept = make_run(tmp_path / "alpha-0-seed0", method={"alpha": 0.0}, classes=["ant", "bee", "cow"])
    run = make_run(tmp_path / "released-seed0", classes=["_cat", "$dog$", "<eel>"])
    rows = numbers(figures.tsne([swept, run], tmp_path))
    assert len(rows) == 60 and {row["class"] for row in rows} == {"_cat", "$dog$", "<eel>"}
    for ax, panel in zip(drawn[-1].axes, ("before disentanglement", "after it, $f_1$"), strict=True):
        points = np.concatenate([collection.get_offsets() for collection in ax.collections]).tolist()
        assert sorted(points) == sorted([float(row["x"]), float(row["y"])] for row in rows if row["panel"] == panel)
    scores = [float(ax.get_title().split()[-1]) for ax in drawn[-1].axes]
    for silhouette, name in zip(scores, ("before", "f1"), strict=True):
        features = run.samples[name].astype(np.float32)
        assert abs(silhouette - silhouette_score(features, run.samples["feature_label"])) <= 0.005
    assert [text.get_text() for text in drawn[-1].legends[0].get_texts()] == ["_cat", r"\$dog\$", "<eel>"]


def test_tsne_of_methods_and_of_many_classes(tmp_path, drawn):
    runs = [make_run(tmp_path / f"released-seed{seed}", seed=seed) for seed in range(2)]
    runs += [make_run(tmp_path / "vaft-seed0", "vAFT", "vaft"), make_run(tmp_path / "old", "TRADES", samples=False)]
    rows = numbers(figures.tsne_methods(runs, tmp_path))
    assert {row["panel"] for row in rows} == {"AFD", "vAFT"} and len(rows) == 60
    many = make_run(tmp_path / "many", classes=[f"class {index}" for index in range(12)])
    assert len({row["class"] for row in numbers(figures.tsne([many], tmp_path))}) == figures.SHOWN_CLASSES
    assert "first 10 of 12 classes" in drawn[-1].legends[0].get_title().get_text()


def test_sweep_is_drawn_as_written(tmp_path, drawn):
    runs = [make_run(tmp_path / "released-seed0", accuracy=0.5)]
    for beta, accuracy in ((0.0, 0.8), (0.25, 0.9)):  # the config of `released` has twice the paper's beta
        runs.append(make_run(tmp_path / f"beta-{beta:g}-seed0", accuracy=accuracy, method={"beta": 2 * beta}))
    for seed in range(2):
        runs.append(make_run(tmp_path / f"gamma-10-seed{seed}", seed=seed, accuracy=0.7 + 0.1 * seed))
        runs[-1].config["method"]["gamma"] = 10.0
    rows = numbers(figures.sweep(runs, tmp_path))
    clean = [row for row in rows if row["attack"] == "clean"]
    assert [(row["weight"], float(row["value"])) for row in clean] == [("beta", 0.0), ("beta", 0.25), ("gamma", 10.0)]
    of_seed, of_seeds = clean[1], clean[2]
    assert [float(of_seed[name]) for name in ("accuracy", "low", "high")] == pytest.approx([90, 84, 94])
    deviation = statistics.stdev([70, 80])
    assert [float(of_seeds[name]) for name in ("low", "high")] == pytest.approx([75 - deviation, 75 + deviation])
    panels = [("beta", "clean"), ("gamma", "clean"), ("beta", "pgd20"), ("gamma", "pgd20")]
    for ax, panel in zip(drawn[-1].axes, panels, strict=True):
        points = [row for row in rows if (row["weight"], row["attack"]) == panel]
        line, _, (bars,) = ax.containers[0]
        assert line.get_ydata().tolist() == [float(row["accuracy"]) for row in points]
        ends = [[segment[0][1], segment[1][1]] for segment in bars.get_segments()]
        assert np.allclose(ends, [[float(row["low"]), float(row["high"])] for row in points])
    assert [label.get_text() for label in drawn[-1].axes[2].get_xticklabels()] == ["0", "0.25"]


def test_the_same_numbers_are_the_same_file(tmp_path, drawn):
    runs = [make_run(tmp_path / "released-seed0")]
    first = figures.feature_gap(runs, tmp_path / "a").with_suffix(".svg").read_bytes()
    assert figures.feature_gap(runs, tmp_path / "b").with_suffix(".svg").read_bytes() == first


@pytest.mark.parametrize("draw", [figures.feature_gap, figures.tsne, figures.tsne_methods, figures.sweep])
def test_a_run_that_lacks_it_is_named(tmp_path, draw):
    run = make_run(tmp_path / "trades-seed0", "TRADES", "trades", gap=None, samples=False)
    with pytest.raises(UsageError, match="trades-seed0"):
        draw([run], tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_more_that_runs_may_lack(tmp_path):
    with pytest.raises(UsageError, match="old has no samples"):
        figures.tsne([make_run(tmp_path / "old", samples=False)], tmp_path)
    with pytest.raises(UsageError, match="few keeps features of 30 images"):
        figures.tsne([make_run(tmp_path / "few", classes=["one"])], tmp_path)
    mixed = [make_run(tmp_path / name / "gamma-0-seed0", dataset=name) for name in ("cifar10", "digits")]
    with pytest.raises(UsageError, match="resnet8_half on cifar10, resnet8_half on digits"):
        figures.sweep(mixed, tmp_path)


def test_without_matplotlib(tmp_path, monkeypatch):
    run = make_run(tmp_path / "released-seed0")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"^plot: matplotlib is not installed; pip install 'fastafd\[plot\]'$"):
        figures.feature_gap([run], tmp_path)


def test_importing_costs_nothing():
    code = "import fastafd.reporting.page, sys; print(sorted({'matplotlib', 'sklearn', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
