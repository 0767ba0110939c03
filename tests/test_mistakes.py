"""Bad input ends with exit code 2 (or 1) and one line: the field, what it got and what it takes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import line_of, verb
from safetensors.torch import save_file

import fastafd
from fastafd import cli, pretrain, train
from fastafd.models import build_model
from fastafd.recipes import find_recipe
from fastafd.settings import UsageError

evaluate_main = verb("evaluate")["main"]


FLAGS = [  # flags, words of the error message
    ("--arch resnet-18", ["arch", "resnet-18", "did you mean resnet18?"]),
    ("--arch wrn33_10", ["arch", "6n + 4"]),
    ("--dataset cifar11", ["dataset", "cifar11", "did you mean cifar10?"]),
    ("--recipe relesed", ["recipe", "relesed", "did you mean released?"]),
    ("--attack.eps 8", ["attack.eps", "'8'", "8/255"]),
    ("--attack.eps=-0.1", ["attack.eps", "8/255"]),
    ("--attack.step-size 2/0", ["attack.step_size", "2/0"]),
    ("--attack.steps 2.5", ["attack.steps", "whole number"]),
    ("--lr fast", ["lr", "fast", "a number >= 0"]),
    ("--momentum 1.5", ["momentum", "from 0 to 1"]),
    ("--batch-size 0", ["batch_size", "whole number >= 1"]),
    ("--epoch 3", ["--epoch", "did you mean --epochs?"]),
    ("--epochs", ["--epochs", "takes a value"]),
    ("--eps 8/255", ["--eps", "did you mean --attack.eps?"]),
    ("--steps 3", ["--steps", "did you mean --attack.steps?"]),
    ("--seed 1e20", ["seed", "1e20"]),
    ("--matched", ["matched", "recipe released is AFD itself", "vaft"]),
    ("--recipe vaft --alpha 0.1", ["--alpha", "no such flag"]),
    ("--recipe vaft --d2-weight-decay 0.1 --dataset digits", ["d2_weight_decay", "vAFT has no D2"]),
    ("--recipe atas --attack-bn train --dataset digits", ["attack_bn", "takes eval", "ATAS"]),
    ("--attack-bn train --engine fast --dataset digits", ["attack_bn", "engine fast"]),
    ("--print_config", ["--print_config"]),
    ("stray", ["stray"]),
    ("--loader fcv", ["loader", "did you mean ffcv?"]),
    ("--device gpu", ["device", "cuda"]),
    ("--device cuda:77", ["device", "cuda:77", "CUDA devices"]),
    ("--amp fp8", ["amp", "bf16"]),
    ("--normalize cifar --dataset digits", ["normalize", "did you mean cifar10?"]),
    ("--lr-schedule 0:nan", ["lr_schedule", "FRACTION:FACTOR"]),
    ("--lr-schedule 0:1,0.5:inf", ["lr_schedule", "FRACTION:FACTOR"]),
    ("--lr.momentum 5", ["--lr.momentum", "no such flag"]),
    ("--attack.eps.x 1/255", ["--attack.eps.x", "no such flag"]),
    ("--seed.foo=3", ["--seed.foo", "no such flag"]),
    ("--lr-schedule 0.5:1", ["lr_schedule", "FRACTION:FACTOR"]),
    ("--pretrained example --dataset digits", ["pretrained", "example", "CIFAR-10"]),
    ("--pretrained nowhere.pt --dataset digits", ["nowhere.pt", "there is none"]),
    ("--config nowhere.yaml", ["config", "nowhere.yaml"]),
    ("--resume nowhere", ["resume", "nowhere", "config.yaml"]),
    ("--resume", ["resume", "run folder"]),
    ("--resume nowhere --lr 1", ["resume", "no other flag"]),
    ("--dataset imagefolder --data-dir nowhere", ["data_dir", "nowhere"]),
    ("--recipe digits --batch-size 5000", ["batch_size", "5000"]),
]


@pytest.mark.parametrize("flags, words", FLAGS, ids=[flags for flags, _ in FLAGS])
def test_train(flags, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = line_of(train.main, flags.split(), capsys)
    assert all(word in line for word in words), line
    assert not (tmp_path / "runs").exists()  # a mistake creates no run folder


@pytest.mark.parametrize(
    "text, words",
    [
        ("lrr: 0.1", ["lrr", "did you mean lr?"]),
        ("attack:\n  esp: 8/255", ["attack.esp", "attack.eps"]),
        ("attack:\n  eps: 8", ["attack.eps", "8/255"]),
        ("recipe: papre", ["recipe", "paper"]),
        ("seed: 12345678901234567890", ["seed", "whole number"]),
        ("- 1", ["config"]),
        ("lr: [", ["config"]),
    ],
)
def test_config_file(text, words, capsys, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    line = line_of(train.main, ["--config", file], capsys)
    assert all(word in line for word in words), line


def test_settings_come_from_recipe_then_file_then_flags(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("recipe: paper\nlr: 0.5\nattack:\n  eps: 4/255\ngamma: 3\n")
    config = train.parse(["--config", str(file), "--gamma", "7", "--attack.step-size", "1/255"])
    assert (config.recipe, config.sgd.lr, config.sgd.weight_decay) == ("paper", 0.5, 5e-4)
    assert (config.attack.eps, config.attack.step_size) == (4 / 255, 1 / 255)
    assert (config.method.gamma, config.method.beta) == (7.0, 0.25)


@pytest.mark.parametrize("recipe", ["released", "paper", "released_cifar100", "digits"])
def test_config_files_read_back_as_they_were(recipe, tmp_path):
    config = train.parse(["--recipe", recipe, "--lr", "0.01", "--eval-n", "7"])
    file = tmp_path / "config.yaml"
    file.write_text(cli.to_yaml(config))
    assert train.parse(["--config", str(file)]) == config


def test_help_names_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    for flag in ("--attack.eps", "--alpha", "--pretrained", "--data-dir", "--pretrain.epochs", "--seed"):
        assert flag in shown
    assert "0.025" in shown and "<" not in shown


def test_digits_without_scikit_learn(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)  # as on a machine that was set up from the bundle
    line = line_of(train.main, ["--recipe", "digits"], capsys)
    assert "scikit-learn" in line and "--data-dir" in line


def test_evaluate_says_what_it_needs(tmp_path, capsys):
    weights, state = tmp_path, build_model("resnet8", 10).state_dict()
    torch.save(state, weights / "good.pt")
    save_file({name: value.contiguous() for name, value in state.items()}, weights / "good.safetensors")
    (weights / "text.pt").write_text("no weights")
    cases = [
        (["--weights", weights / "good.pt", "--dataset", "digits"], ["arch", "--weights"]),
        (["--weights", weights / "good.pt", "--arch", "resnet8"], ["dataset"]),
        (["--dataset", "digits"], ["model", "--weights"]),
        ([weights / "good.safetensors", "--dataset", "digits"], ["--arch"]),
        ([weights / "nowhere", "--dataset", "digits"], ["nowhere", "run folder"]),
        ([weights / "text.pt", "--dataset", "digits"], ["safetensors"]),
        (["run", "--weights", weights / "good.pt"], ["model", "--weights"]),
        (["--dataset", "digits", "--attack", "pgd-20"], ["attack", "did you mean pgd20?"]),
        (["--dataset", "digits", "--n", "0"], ["n:", ">= 1"]),
    ]
    for argv, words in cases:
        line = line_of(evaluate_main, argv, capsys)
        assert all(word in line for word in words), line


def test_recipe_and_config_file_must_agree(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("recipe: released\n")
    line = line_of(train.main, ["--config", tmp_path / "config.yaml", "--recipe", "paper"], capsys)
    assert "paper" in line and "released" in line


def test_out_that_holds_a_run_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("lr: 1\n")
    line = line_of(train.main, ["--recipe", "digits", "--out", tmp_path], capsys)
    assert "--resume" in line


def test_resume_of_a_broken_checkpoint(tmp_path, digit_tree, capsys):
    config = train.parse(["--recipe", "digits", "--epochs", "1", "--pretrain.epochs", "0", "--autoattack-n", "0"])
    (tmp_path / "config.yaml").write_text(cli.to_yaml(config))
    for content in (b"", b"nonsense"):
        (tmp_path / "last.pt").write_bytes(content)
        line = line_of(train.main, ["--resume", tmp_path], capsys)
        assert "resume: " in line and "last.pt" in line
    torch.save({"state_dict": {}}, tmp_path / "last.pt")
    assert "not a checkpoint" in line_of(train.main, ["--resume", tmp_path], capsys)


def test_pretrain_is_a_verb_with_the_same_manners(capsys):
    assert "did you mean --lr?" in line_of(pretrain.main, ["--lrr", "1"], capsys)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    argv = ["--recipe", "digits", "--pretrain.epochs", "0", "--out", tmp_path / "file" / "run"]
    assert "out:" in line_of(train.main, argv, capsys)


def test_out_of_memory_outside_a_step_is_one_line(capsys):
    def main(argv):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."
        )

    line = line_of(main, [], capsys, code=1)
    assert line.startswith("error: out of GPU memory: asked for 2.00 GiB. Take a smaller --batch-size")


@pytest.mark.parametrize("closed", ["stdout", "both"])
@pytest.mark.parametrize("what", ["lines", "mistake", "table", "command"])
def test_a_reader_that_goes_away_gets_no_traceback(what, closed):
    """As with `fastafd ... | head`, also if the output is still in Python's buffer at the end."""
    code = """
import sys
from fastafd import cli
from fastafd.console import Console
from fastafd.settings import UsageError
def main(argv):
    if argv[0] == "lines":
        for _ in range(100_000):
            print("a line")
    elif argv[0] == "table":
        Console().table("title", ["a"], [["b"]])
    else:
        print("a line")
        raise UsageError("a mistake")
sys.stdin.read()
if sys.argv[1] == "command":
    cli.run_script(lambda: print("a line") or 0)
cli.run(main, sys.argv[1:])
"""
    stderr = subprocess.STDOUT if closed == "both" else subprocess.PIPE
    command = [sys.executable, "-c", code, what]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stderr}
    process = subprocess.Popen(command, **pipes, text=True, env=environment)
    process.stdout.close()
    process.stdin.close()
    errors = "" if closed == "both" else process.stderr.read()
    assert process.wait() == (2 if what == "mistake" else 1)
    assert "Traceback" not in errors and "BrokenPipe" not in errors and "Exception ignored" not in errors
    assert ("a mistake" in errors) == (what == "mistake" and closed == "stdout")


def test_a_pretraining_folder_is_not_taken_for_another_model(tmp_path, capsys):
    argv = ["--dataset", "digits", "--epochs", "0", "--loader", "resident", "--out", tmp_path / "out"]
    pretrain.main([str(word) for word in [*argv, "--arch", "resnet8"]])
    assert "other settings" in line_of(pretrain.main, [*argv, "--arch", "wrn10_2"], capsys)


# -- the step in somebody's loop ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, y, words",
    [
        (torch.full((2, 3, 8, 8), 1.5), torch.tensor([0, 1]), "normalisation"),
        (torch.full((2, 3, 8, 8), -0.5), torch.tensor([0, 1]), r"\[0,1\]"),
        (torch.rand(2, 3, 8, 8), torch.tensor([0, 10]), "takes 0 to 9"),
        (torch.rand(2, 3, 8, 8), torch.tensor([-1, 1]), "takes 0 to 9"),
    ],
)
def test_images_and_labels_out_of_range(x, y, words):
    net = build_model("resnet8", 10)
    model = fastafd.disentangle(net)
    step = fastafd.AFDStep(model, net, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(UsageError, match=words):
        step(x, y)


def test_pixels_a_rounding_error_outside_are_let_through():
    net = build_model("resnet8", 10)
    model = fastafd.disentangle(net)
    step = fastafd.AFDStep(model, net, torch.optim.SGD(model.parameters(), lr=0.1), attack=fastafd.PGD(steps=1))
    step(torch.rand(2, 3, 8, 8) - 3e-8, torch.tensor([0, 1]))


# -- every setting, in a file and as a flag -----------------------------------------------------------------------

ODD = [
    None,
    5,
    -1,
    0,
    1e300,
    float("nan"),
    float("inf"),
    True,
    "",
    "word",
    "8/255",
    [],
    {},
    [[]],
    [1],
    [[0, 1], [0]],
    ["released"],
    {"a": {"b": 1}},
    {1: 2},
    10**400,
]
CONFIGS = {
    "train": lambda file: train.parse(["--config", str(file)]),
    "train digits": lambda file: train.parse(["--config", str(file), "--recipe", "digits"]),
    "train atas": lambda file: train.parse(["--config", str(file), "--recipe", "atas"]),
    "pretrain": lambda file: cli.parse(pretrain.PretrainConfig(), ["--config", str(file)], "fastafd.pretrain", ""),
    "evaluate": lambda file: cli.parse(evaluate_config(), ["--config", str(file)], "fastafd.evaluate", ""),
}
evaluate_config = verb("evaluate")["EvaluateConfig"]


def settings_named(name):
    of = {
        "train": find_recipe("released"),
        "train digits": find_recipe("digits"),
        "train atas": find_recipe("atas"),
        "pretrain": pretrain.PretrainConfig(),
        "evaluate": evaluate_config(),
    }[name]
    return [key for key, _, _ in cli.entries(of)]


@pytest.mark.parametrize("name", CONFIGS)
def test_odd_values_in_a_file_are_taken_or_refused_by_the_name_of_the_setting(name, tmp_path):
    """Every setting and every section with every odd value: a config, or one UsageError that names the setting."""
    file, keys = tmp_path / "config.yaml", settings_named(name)
    sections = sorted({key.partition(".")[0] for key in keys if "." in key})
    refused = 0
    for key in [*keys, *sections]:
        for value in ODD:
            section, _, leaf = key.partition(".")
            tree = {section: {leaf: value}} if leaf else {key: value}
            file.write_text(yaml.safe_dump(tree))
            try:
                CONFIGS[name](file)
            except UsageError as error:
                assert key in str(error), (key, value, str(error))
                refused += 1
    assert refused > 3 * len(keys)


@pytest.mark.parametrize(
    "text, words",
    [
        ("attack: 5", ["attack", "got 5", "settings of its own, such as eps"]),
        ("attack:", ["attack", "got None"]),
        ("pretrain: []", ["pretrain", "got []"]),
        ("recipe: [digits]", ["recipe", "['digits']"]),
        ("lr: 1\nseed: 3\nlr: 2", ["lr is there twice, again in line 3"]),
        ("attack:\n  steps: 1\n  eps: 0\n  steps: 2", ["steps is there twice"]),
        ("5: 3", ["5", "no such setting"]),
        ("? [a]\n: 3", ["config"]),
        ("attack: {1: 2}", ["attack.1", "no such setting"]),
        ("a: &a {b: *a}", ["a", "no such setting"]),
        ("lr: &a [*a]", ["lr"]),
        ("lr: 2026-01-01", ["lr", "a number"]),
        ("seed: !!int ''", ["config"]),
        ("lr: !!bool x", ["config"]),
        ("lr: !!timestamp x", ["config"]),
        ('out: "\\ud800"', ["out", "takes a path"]),
        ("lr_schedule: ['01']", ["lr_schedule"]),
        ("step_low: 9/255\nstep_high: 3/255\nrecipe: atas", ["step_low", "9/255", "step_high, 3/255"]),
    ],
)
def test_files_that_hold_something_else(text, words, capsys, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    line = line_of(train.main, ["--config", file], capsys)
    assert all(word in line for word in words), line


def test_a_recipe_that_does_not_exist_is_blamed_before_two_that_differ(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("recipe: 5\n")
    line = line_of(train.main, ["--config", tmp_path / "config.yaml", "--recipe", "digits"], capsys)
    assert "recipe: got 5, takes one of released" in line


@pytest.mark.parametrize("text", ["attack: 5", "attack: {eps: 9}", "image_size: big", "data_dir: [a]", "dataset: 7"])
def test_an_evaluation_names_what_is_wrong_in_the_run(text, tmp_path, capsys):
    from fastafd.checkpoint import save_model

    about = {"arch": "resnet8_half", "num_classes": 10, "normalize": "none", "image_size": 8}
    save_model(tmp_path / "model.safetensors", build_model("resnet8_half", 10), about)
    (tmp_path / "config.yaml").write_text(text)
    line = line_of(evaluate_main, [tmp_path], capsys)
    assert f"{tmp_path / 'config.yaml'}: {text.partition(':')[0]}" in line


def test_words_may_stand_behind_flags(capsys):
    defaults = evaluate_config()
    assert cli.words_apart(["a", "--n", "3", "b", "--json", "c", "--seed=4", "d"], defaults) == (
        ["a", "b", "c", "d"],
        ["--n", "3", "--json", "--seed=4"],
    )
    assert cli.words_apart(["--json", "true", "a"], defaults) == (["a"], ["--json", "true"])
    line = line_of(evaluate_main, ["runs/a", "--attack", "clean", "runs/b"], capsys)
    assert "model: got runs/a and runs/b, takes one" in line
    line = line_of(verb("report")["main"], ["results", "--out", "rep", "nowhere"], capsys)
    assert "nowhere" in line and "flag" not in line


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_launchers_of_several_processes_are_refused(variable, capsys, monkeypatch):
    for value, refused in (("2", True), ("abc", True), ("1", False), ("", False)):
        monkeypatch.setenv(variable, value)
        line = line_of(train.main, ["--recipe", "nothing"], capsys)
        assert (f"({variable})" in line) == refused and ("recipe" in line) != refused


def test_a_cpu_has_no_number(capsys):
    assert "device: got 'cpu:7', takes auto, cpu, cuda or cuda:N" in line_of(
        train.main, ["--recipe", "digits", "--device", "cpu:7"], capsys
    )


def test_lengths_are_shown_as_they_are_written():
    config = train.parse(["--recipe", "digits", "--attack.eps", "0.5/255", "--attack.step-size", "12.3456/255"])
    changed = cli.changes(find_recipe("digits"), config)
    assert changed == {"attack.eps": "0.5/255", "attack.step_size": "12.3456/255"}
    assert cli.written(find_recipe("released"))["attack.step_size"] == 0.007


@pytest.mark.parametrize(
    "verb_name, words, says",
    [
        ("train", ["--recipe", "digits", "--out", "~nobody-here/x"], "out: got ~nobody-here/x"),
        ("train", ["--recipe", "digits", "--data-dir", "~nobody-here"], "data_dir: got ~nobody-here"),
        ("train", ["--resume", "~nobody-here"], "resume: got ~nobody-here"),
        ("train", ["--config", "~nobody-here/c.yaml"], "config: got ~nobody-here/c.yaml"),
        ("train", ["--pretrained", "~nobody-here/w.pt"], "pretrained: got ~nobody-here/w.pt"),
        ("report", ["results", "~nobody-here"], "runs: got ~nobody-here"),
        ("evaluate", ["~nobody-here"], "model: got ~nobody-here"),
    ],
)
def test_home_folders_that_do_not_exist(verb_name, words, says, capsys):
    main = train.main if verb_name == "train" else verb(verb_name)["main"]
    assert f"{says}, and this machine has no such home folder" in line_of(main, words, capsys)


@pytest.mark.parametrize("text, says", [("[" * 3000, "nested too deeply"), ('out: "a\\0b"', "out: got 'a\\x00b'")])
def test_files_that_break_a_parser(text, says, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(text)
    assert says in line_of(train.main, ["--config", tmp_path / "config.yaml", "--recipe", "digits"], capsys)


def test_a_config_in_the_home_folder_chooses_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("recipe: vaft\n")
    assert train.parse(["--config=~/c.yaml"]).method == find_recipe("vaft").method


def test_a_model_is_named_once(capsys):
    assert "got x and --model" in line_of(evaluate_main, ["x", "--model", "y"], capsys)
