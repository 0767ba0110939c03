"""The settings of a run are what it says: its eps everywhere, its threads, its stages, how long it will take."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import line_of, verb
from PIL import Image

import fastafd
from fastafd import train
from fastafd.attacks import PGD, weakness
from fastafd.console import Console
from fastafd.evaluation import pgd20
from fastafd.models import build_model
from fastafd.models.cost import multiplications, set_threads
from fastafd.recipes import RECIPES
from fastafd.settings import UsageError, in_255ths, pixels
from fastafd.training.forecast import duration

FLAGS = "--dataset imagefolder --arch resnet8_half --batch-size 20 --loader resident --attack.steps 2".split()
FLAGS += "--epochs 1 --pretrain.epochs 1 --pretrain.batch-size 20 --eval-n 20 --autoattack-n 4".split()
evaluate_main = verb("evaluate")["main"]


@pytest.fixture(scope="module")
def run_at_4(digit_tree, tmp_path_factory):
    """A run at eps 4/255, and what it wrote: standard error and standard output."""
    out = tmp_path_factory.mktemp("runs") / "four"
    flags = [*FLAGS, "--data-dir", digit_tree, "--out", out, "--attack.eps", "4/255", "--attack.step-size", "3/255"]
    command = [sys.executable, "-m", "fastafd.train", *map(str, flags)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return out, done.stderr, done.stdout


# -- eps ----------------------------------------------------------------------------------------------------------


def test_a_run_is_evaluated_at_its_own_eps(run_at_4):
    out, _, table = run_at_4
    result = json.loads((out / "result.json").read_text())
    assert {model["eps"] for model in result["models"].values()} == {"4/255"}
    assert "eps 4/255" in table and "8/255" not in table
    samples = np.load(out / "samples.npz")
    assert 0 < np.abs(samples["perturbation"]).max() <= 4 / 255 + 1e-4


@pytest.mark.parametrize("what", ["folder", "file", "natural"])
def test_evaluate_takes_the_eps_of_the_training(run_at_4, what, capsys):
    """The natural model of a run was trained without an attack: it is attacked at 8/255, unless its run says more."""
    out, _, _ = run_at_4
    model = {"folder": out, "file": out / "model.safetensors", "natural": out / "natural.safetensors"}[what]
    data = json.loads((out / "result.json").read_text())["settings"]["data_dir"]
    words = [str(model), "--data-dir", data, "--attack", "pgd20", "--n", "20", "--json"]
    evaluate_main(words)
    result = json.loads(capsys.readouterr().out)
    assert result["eps"] == ("8/255" if what == "natural" else "4/255")
    if what == "folder":
        assert "eps 4/255" not in json.dumps(result["pgd20"])
        trained = json.loads((out / "result.json").read_text())["models"]["AFD"]
        assert result["pgd20"]["correct"] == trained["pgd20"]["correct"]


def test_autoattack_and_pgd_stay_within_any_eps(monkeypatch):
    from fastafd.evaluation import measurements

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 4))
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    split = fastafd.data.ArraySplit(images, np.arange(6) % 4)
    radii = []
    original = measurements.run_autoattack

    def noted(model, x, y, eps, *rest):
        result = original(model, x, y, eps, *rest)
        radii.append(float((result.x_adv - x).abs().max()))
        return result

    monkeypatch.setattr(measurements, "run_autoattack", noted)
    result = fastafd.evaluate(net, split, ("clean", "pgd20", "autoattack"), eps=0.5 / 255)
    assert result["eps"] == "0.5/255" and radii[0] <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("eps", [0.5, 2, 8, 16, 40])
def test_the_steps_of_pgd20_are_in_proportion_to_eps(eps):
    attack = pgd20(eps / 255)
    assert attack.step_size / attack.eps == pytest.approx(0.003 / (8 / 255)) and weakness(attack) is None


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_steps_of_every_recipe_reach_beyond_the_ball(recipe):
    attack = RECIPES[recipe]().attack
    assert not isinstance(attack, PGD) or attack.steps * attack.step_size >= 1.5 * attack.eps


def test_a_weak_attack_is_named(capsys):
    net = build_model("resnet8_half", 4)
    model = fastafd.disentangle(net)
    sgd = fastafd.make_sgd(model, 0.1, 0.9, 0.0)
    for eps, weak in ((8 / 255, False), (40 / 255, True)):
        fastafd.AFDStep(model, net, sgd, eps=eps, steps=4, step_size=2 / 255)
        assert ("a weak attack: 4 steps of 2/255 reach 8/255, less than eps 40/255" in capsys.readouterr().err) == weak


@pytest.mark.parametrize("text, value", [("0.5/255", 0.5), ("8/255", 8), (" 2.5 / 255 ", 2.5), ("1/510", 0.5)])
def test_fractions_of_any_number_are_lengths(text, value):
    assert pixels(text, "eps") == pytest.approx(value / 255) and in_255ths(pixels(text, "eps")) == f"{value:g}/255"


@pytest.mark.parametrize("text", ["8/255/2", "/255", "8/", "8/0", "a/255", "0x8/255", "nan", "inf/255", "-1/255"])
def test_other_text_is_no_length(text):
    with pytest.raises(UsageError, match=r"^eps: got"):
        pixels(text, "eps")


# -- settings without effect --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--recipe released --pretrained example --pretrain.epochs 3", ["pretrain.epochs", "--pretrained"]),
        ("--recipe pgd_at --pretrain.lr 0.5 --dataset digits", ["pretrain.lr", "recipe pgd_at"]),
        ("--recipe digits --data-dir nowhere", ["data_dir", "nowhere", "scikit-learn"]),
        ("--recipe digits --image-size 20", ["image_size", "20", "8, 16, 32"]),
        ("--recipe digits --pretrain.batch-size 5000", ["pretrain.batch_size", "5000", "1438"]),
        ("--recipe digits --threads 0", ["threads", "whole number >= 1|1 to 1024"]),
    ],
)
def test_a_setting_without_effect_is_refused_by_name(flags, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = line_of(train.main, flags.split(), capsys)
    assert all(any(choice in line for choice in word.split("|")) for word in words), line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "recipe, flags, says",
    [
        ("fgsm_ga", ["--step-factor", "0.01"], "the longest step reaches 0.08/255, less than eps 8/255"),
        ("fgsm_ga", [], None),
        ("atas", ["--attack.eps", "16/255"], "the longest step reaches 14/255, less than eps 16/255"),
        ("atas", [], None),
        ("rift", ["--attack.steps", "1"], "the longest step reaches 2/255, less than eps 8/255"),
        ("rift", [], None),
        ("free_at", [], None),
        ("free_at", ["--attack.eps", "0"], "with eps 0 the attacked images are the clean ones"),
        ("released", ["--attack.eps", "0"], "with eps 0 the attacked images are the clean ones"),
        ("trades", ["--attack.step-size", "0"], "10 steps of 0/255 reach 0/255, less than eps 8/255"),
    ],
)
def test_a_weak_attack_of_any_method_is_named(recipe, flags, says, capsys):
    from fastafd.training.build import build_step

    words = ["--recipe", recipe, *flags, "--arch", "resnet8_half", "--engine", "reference", "--device", "cpu"]
    config = train.parse(words)

    class Few:
        n, batch_size, seed = 8, 4, 0

        def __len__(self):
            return 2

    build_step(config, build_model("resnet8_half", 10), Few(), None, Console())
    err = capsys.readouterr().err
    assert says in err if says else "attack" not in err


@pytest.mark.parametrize("name", ["train", "pretrain", "evaluate", "report"])
def test_torchrun_is_refused_in_one_line(name, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    main = train.main if name == "train" else verb(name)["main"]
    assert "torchrun has started 2 processes" in line_of(main, [], capsys)


# -- threads ------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_multiplications_are_counted():
    """By hand: a convolution of 3 to 4 channels on 6x6 pixels, then 16 to 5 on 16 features."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, stride=3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(16, 5)
    )
    assert multiplications(net, 6) == 4 * 4 * 27 + 16 * 5
    assert multiplications(build_model("resnet18", 10), 32) == pytest.approx(555.4e6, rel=1e-3)
    assert net.training and net[1].num_batches_tracked == 0


def test_the_threads_are_a_fixed_rule_of_network_batch_and_cores(threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    small, large = build_model("resnet8_half", 10), build_model("resnet18", 10)
    for cores in (1, 2, 8):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert set_threads(small, 8, 64) == 1  # a small network on any machine
        assert set_threads(large, 32, 128) == cores
        assert set_threads(small, 8, 64, threads=2) == 2 == torch.get_num_threads()  # kept from a run
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(3)
    assert set_threads(large, 32, 128) == 3


def test_a_run_keeps_its_threads(run_at_4, threads):
    import yaml

    out, err, _ = run_at_4
    assert yaml.safe_load((out / "config.yaml").read_text())["threads"] == 1
    assert "on CPU, 1 threads" in err
    config, _ = train.configure(["--resume", str(out)])
    assert config.task.threads == 1


# -- stages and the forecast --------------------------------------------------------------------------------------


def test_every_stage_is_named_with_its_number(run_at_4):
    _, err, _ = run_at_4
    stages = re.findall(r"^(\d) of (\d): (natural pre-training|fine-tuning|evaluation of [^:]+|samples)", err, re.M)
    assert [(int(a), int(b)) for a, b, _ in stages] == [(k, 6) for k in range(1, 7)]
    forecast = err.index("all of it will take about")
    assert forecast < err.index("1 of 6: natural pre-training")


def test_a_run_from_scratch_has_fewer_stages(digit_tree, tmp_path, capsys):
    flags = FLAGS[: FLAGS.index("--pretrain.epochs")]
    flags += "--eval-n 8 --autoattack-n 0 --recipe pgd_at".split()
    train.main([*flags, "--data-dir", str(digit_tree), "--out", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert "1 of 3: training by PGD-AT" in err and "3 of 3: samples" in err


def test_durations_are_in_the_largest_fitting_unit():
    assert [duration(s) for s in (3, 99, 600, 7200)] == ["3 s", "99 s", "10 min", "2.0 h"]


def test_large_images_with_a_stem_for_small_ones_are_named(tmp_path, capsys):
    for side, named in ((96, True), (32, False)):
        root = tmp_path / str(side)
        for part, label, index in [(p, c, i) for p in ("train", "test") for c in "ab" for i in range(4)]:
            (root / part / label).mkdir(parents=True, exist_ok=True)
            pixels_of = np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels_of).save(root / part / label / f"{index}.png")
        flags = "--dataset imagefolder --recipe pgd_at --arch resnet8_half --epochs 0 --loader resident".split()
        flags += ["--batch-size", "4", "--data-dir", str(root), "--out", str(tmp_path / f"out{side}")]
        train.main([*flags, "--eval-n", "4", "--autoattack-n", "0"])
        said = "9 times the arithmetic of 32 x 32 pixels" in capsys.readouterr().err
        assert said == named
