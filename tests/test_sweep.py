"""Many runs in one command: their flags, their folders, resuming."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from fastafd import train
from fastafd.recipes import RECIPES, find_recipe


@pytest.fixture
def sweep(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import sweep

    return sweep


@pytest.mark.parametrize("scale", ["cifar10", "digits", "small"])
def test_flags_are_ones_that_training_takes(sweep, scale, tmp_path):
    configs = {}
    for name, flags in sweep.runs_of("methods", sweep.SCALES[scale], 2, tmp_path).items():
        configs[name] = train.parse(flags)
        assert configs[name].autoattack_n == 0 and configs[name].task.seed == int(name[-1])
    methods = {config.method.label for config in configs.values()}
    assert methods == {RECIPES[name]().method.label for name in RECIPES} and len(configs) == 2 * 15
    assert configs["vaft-matched-seed0"].matched and not configs["vaft-seed0"].matched
    assert configs["rift-seed1"].pretrained == str(tmp_path / "pgd_at-seed1")
    names = list(configs)
    assert names.index("pgd_at-seed0") < names.index("rift-seed0")
    if scale == "cifar10":
        for name, config in configs.items():
            recipe = find_recipe(name.split("-")[0])
            assert config.sgd == (recipe.sgd if "matched" not in name else find_recipe("released").sgd)


def test_weights_go_around_the_papers_one_at_a_time(sweep, tmp_path):
    released = find_recipe("released").method
    for weight, values in sweep.WEIGHTS.items():
        runs = sweep.runs_of(weight, sweep.SCALES["digits"], 1, tmp_path)
        assert list(runs) == [f"{weight}-{value:g}-seed0" for value in values]
        methods = [train.parse(flags).method for flags in runs.values()]
        assert released in methods and len(set(methods)) == len(values)
        others = {"alpha": ("beta", "gamma"), "beta": ("alpha", "gamma"), "gamma": ("alpha", "beta")}[weight]
        for method, value in zip(methods, values, strict=True):
            assert getattr(method, weight) == pytest.approx(2 * value if weight == "beta" else value)
            assert all(getattr(method, other) == getattr(released, other) for other in others)
            if weight == "alpha":
                assert method.classifier_alpha == pytest.approx(2 * value)


def test_what_is_done_is_left_alone_and_what_was_begun_goes_on(sweep, monkeypatch, tmp_path, capsys):
    calls = []

    def run(command, **_):
        module, *words = command[2:]
        calls.append((module, words))
        if module == "fastafd.train":
            folder = Path(words[words.index("--resume" if "--resume" in words else "--out") + 1])
            if folder.name == "trades-seed0":
                return SimpleNamespace(returncode=1)
            folder.mkdir(exist_ok=True)
            (folder / "result.json").write_text("{}")
        else:
            (Path(words[0]) / "evaluation-autoattack.json").write_text("{}")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    for name in ("released-seed0", "vaft-seed0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "released-seed0" / "result.json").write_text(json.dumps({}))
    only = ["--only", "released-seed0", "vaft-seed0", "trades-seed0", "atas-seed0"]
    flags = ["methods", "--scale", "digits", "--out", str(tmp_path), *only, "--", "--epochs", "1"]
    assert sweep.main(flags) == 1
    trained = [words for module, words in calls if module == "fastafd.train"]
    assert trained[0] == ["--resume", str(tmp_path / "vaft-seed0")]
    assert [words[-4:-2] for words in trained[1:]] == [["--epochs", "1"]] * 2
    attacked = [Path(words[0]).name for module, words in calls if module == "fastafd.evaluate"]
    assert attacked == ["released-seed0", "vaft-seed0", "atas-seed0"]
    assert "trades-seed0: exit code 1" in capsys.readouterr().out
    calls.clear()
    sweep.main(flags)
    assert [Path(words[-1]).name for _, words in calls] == ["trades-seed0"]


def test_a_signal_ends_the_sweep(sweep, monkeypatch, tmp_path):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=75))
    with pytest.raises(SystemExit, match="75"):
        sweep.main(["gamma", "--scale", "digits", "--out", str(tmp_path)])


def test_module_runs():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sweep", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--seeds" in done.stdout


@pytest.mark.parametrize("scale", ["cifar10", "digits", "small"])
def test_no_run_has_a_setting_without_effect(scale, sweep, tmp_path):
    for name, words in sweep.runs_of("methods", sweep.SCALES[scale], 1, tmp_path).items():
        config = train.parse(words)
        train.check_for_method(config)
        assert config.recipe in name
