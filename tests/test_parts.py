"""Commands within a time budget: the runner, its parts for a GPU, and the reproduction of the paper's figures."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import parts

    return parts


@pytest.fixture
def suite(parts):
    from benchmarks import gpu_suite

    return gpu_suite


@pytest.fixture
def reproduce(parts):
    from benchmarks import reproduce

    return reproduce


@pytest.mark.parametrize("text, expected", [("9", 540), ("9m", 540), ("540s", 540), ("1.5", 90)])
def test_budget(parts, text, expected):
    assert parts.seconds(text) == expected


@pytest.mark.parametrize("text", ["", "m", "0", "0m", "-5", "9 m", "9h", "1m30s", "nan"])
def test_budget_mistakes(parts, suite, text, tmp_path, capsys):
    with pytest.raises(ArgumentTypeError, match=f"got {text!r}, takes"):
        parts.seconds(text)
    with pytest.raises(SystemExit, match="2"):
        suite.main([f"--budget={text}", "--out", str(tmp_path)])
    assert f"--budget: got {text!r}, takes minutes or seconds" in capsys.readouterr().err


def script(parts, name, code, cap=60.0, left_out=""):
    return parts.Part(name, [sys.executable, "-c", code], cap, left_out)


def running(pid: int) -> bool:
    """True if the process still runs; False if only its exit code is left."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_part_out_of_time_is_ended_with_its_children_and_the_next_one_runs(parts, tmp_path, capsys):
    child = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '600']); print('child', p.pid); time.sleep(600)"
    )
    chosen = [
        script(parts, "slow", child, cap=2),
        script(parts, "wrong", "import sys; print('\\33[31mno such kernel\\33[0m\\n\\n----'); sys.exit(3)"),
        script(parts, "right", "print('5 passed\\nall of it in x.json\\nW1122 03:51:22.2 1 x.py:1] a warning')"),
        script(parts, "not here", "raise SystemExit(1)", left_out="takes minutes"),
    ]
    began = time.monotonic()
    assert parts.run(chosen, 100, tmp_path) == 1
    assert time.monotonic() - began < 30
    summary = json.loads((tmp_path / "summary.json").read_text())
    outcomes = {row["part"]: (row["result"], row["line"]) for row in summary["rows"]}
    pid = re.fullmatch(r"child (\d+)", outcomes.pop("slow")[1])[1]
    assert not running(int(pid))
    assert outcomes == {
        "wrong": ("failed", "no such kernel"),
        "right": ("ok", "5 passed"),
        "not here": ("left out", "takes minutes"),
    }
    assert summary["rows"][0]["result"] == "out of time" and 2 <= summary["rows"][0]["seconds"] < 20
    assert summary["versions"]["torch"] == torch.__version__ and {"device", "date"} <= set(summary)
    assert capsys.readouterr().out.endswith(parts.parts_table(summary["rows"]) + "\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs.txt", "summary.json"]
    logs = (tmp_path / "logs.txt").read_text()
    assert re.findall("^==== (.*) ====$", logs, re.MULTILINE) == ["slow", "wrong", "right"]


def test_logs_are_cut_to_their_ends(parts, tmp_path):
    assert parts.run([script(parts, "loud", "print('x' * 10**6 + 'the end')")], 60, tmp_path) == 0
    logs = (tmp_path / "logs.txt").read_text()
    assert len(logs) < 210_000 and logs.rstrip().endswith("xthe end")
    assert logs.startswith("==== loud, its last 204800 of 1000008 bytes ====\n")


def test_with_the_budget_spent_the_rest_is_left_out(parts, tmp_path):
    chosen = [script(parts, "long", "import time; time.sleep(600)"), script(parts, "late", "raise SystemExit(1)")]
    assert parts.run(chosen, parts.LEAST + 1, tmp_path) == 1
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert [(row["result"], row["line"]) for row in rows] == [("out of time", ""), ("left out", "no time left")]


def test_the_same_folder_again_goes_on(parts, tmp_path):
    """Parts that are ok are kept; parts that failed or got no time run (again), and their seconds add up."""
    flag = tmp_path / "flag"
    once = f"import pathlib, sys; sys.exit(not pathlib.Path({str(flag)!r}).exists())"
    chosen = [
        script(parts, "good", f"open({str(tmp_path / 'count')!r}, 'a').write('x')"),
        script(parts, "bad", once),
        script(parts, "slow", "import time; time.sleep(3)", cap=1),
    ]
    assert parts.run(chosen, 60, tmp_path) == 1
    flag.touch()
    chosen[2] = script(parts, "slow", "import time; time.sleep(3)")
    assert parts.run(chosen, 60, tmp_path) == 0
    rows = {row["part"]: row for row in json.loads((tmp_path / "summary.json").read_text())["rows"]}
    assert [row["result"] for row in rows.values()] == ["ok", "ok", "ok"]
    assert (tmp_path / "count").read_text() == "x" and 4 <= rows["slow"]["seconds"] < 20
    assert (tmp_path / "logs.txt").read_text().count("==== slow") == 2


def test_a_command_made_when_the_part_begins_may_have_nothing_to_begin_with(parts, tmp_path):
    made, ended = [], []

    def command():
        if not made:
            made.append(1)
            raise parts.NotNow("there is no model yet")
        return [sys.executable, "-c", ""]

    part = parts.Part("late", command, 10)
    assert parts.run([part], 60, tmp_path, after=lambda: ended.append(1)) == 0
    (row,) = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert (row["result"], row["line"]) == ("left out", "there is no model yet") and not ended
    assert parts.run([part], 60, tmp_path, after=lambda: ended.append(1)) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["rows"][0]["result"] == "ok" and ended == [1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_part_ends_with_the_command_that_began_it(parts, tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from benchmarks.parts import Part, run
sleep = "import os, time; open({str(tmp_path / "pid")!r}, 'w').write(str(os.getpid())); time.sleep(600)"
run([Part("long", [sys.executable, "-c", sleep], 600)], 600, Path({str(tmp_path)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert not running(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("tiny", [False, True])
def test_parts_are_there_and_leave_few_files(suite, tiny, tmp_path):
    chosen = suite.parts(tmp_path, "cpu" if tiny else "auto", tiny)
    assert [part.name for part in chosen] == [
        *("tests", "numerics", "verify", "arms", "epoch-resnet18"),
        *("profile", "kernels", "epoch", "methods", "convolutions"),
    ]
    assert [part.name for part in chosen if part.left_out] == (
        ["numerics", "profile", "kernels", "epoch", "methods"] if tiny else []
    )
    outputs = [part.command[part.command.index("--out") + 1] for part in chosen if "--out" in part.command]
    assert all(Path(path).parent == tmp_path for path in outputs)
    assert len({*outputs, "logs.txt", "summary.json"}) <= 10
    for part in chosen:
        assert part.command[:2] == [sys.executable, "-m"] and find_spec(part.command[2])
        for argument in part.command[3:]:
            assert not argument.endswith(".py") or (ROOT / argument).exists()


# -- the reproduction ---------------------------------------------------------------------------------------------


def finished(folder: Path, pgd20: float, label: str = "AFD") -> None:
    """A run folder with the parts that are read."""
    folder.mkdir(parents=True)
    figure = {"n": 4, "correct": 2, "accuracy": pgd20, "interval": [0.1, 0.9]}
    models = {
        "natural": {"clean": figure},
        label: {"eps": "8/255", "clean": figure, "pgd20": figure},
        f"{label}, f2": {"clean": figure},
    }
    result = {
        "label": label,
        "dataset": {"name": "cifar10"},
        "models": models,
        "device": "a GPU",
        "date": "2026-11-22 10:00 UTC",
        "config": {"seed": 0},
    }
    result["seconds"] = {"finetuning": {"wall": 100.0, "compile": 20.0}}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "config.yaml").write_text("recipe: released\n")
    (folder / "metrics.jsonl").write_text('{"step": 39, "gap_linf": 0.5}\n{"step": 78, "gap_linf": 0.25}\n')


def commands_of(reproduce, out: Path, tiny: bool = False) -> dict[str, object]:
    return {part.name: part.command for part in reproduce.parts(out, "auto", tiny, Path("/data"))}


def test_what_matters_most_comes_first(reproduce, tmp_path):
    names = list(commands_of(reproduce, tmp_path))
    order = ["tests", "verify", "arms", "epoch-resnet18", "afd-released", "afd-paper", "vaft-matched", "autoattack-afd"]
    order += ["autoattack-vaft", "profile", "epoch", "natural", "afd-own", "methods", "afd-released-seed1"]
    order += ["convolutions"]
    assert [name for name in names if name in order] == order and len(set(names)) == len(names)


def test_training_commands_are_ones_that_training_takes(reproduce, tmp_path):
    from fastafd import train
    from fastafd.recipes import find_recipe

    configs = {}
    finished(tmp_path / "runs" / "natural", 0.0)
    (tmp_path / "runs" / "natural" / "model.safetensors").touch()
    for name, command in commands_of(reproduce, tmp_path).items():
        if name.startswith(("afd", "vaft")):
            words = command()
            assert words[:3] == [sys.executable, "-m", "fastafd.train"]
            configs[name] = train.parse(words[3:])
    released, paper = configs["afd-released"], configs["afd-paper"]
    assert (released.method, released.sgd) == (find_recipe("released").method, find_recipe("released").sgd)
    assert (paper.method, paper.sgd) == (find_recipe("paper").method, find_recipe("paper").sgd)
    assert configs["vaft-matched"].sgd == released.sgd and configs["vaft-matched"].attack == released.attack
    assert configs["afd-own"].pretrained == str(tmp_path / "runs" / "natural")
    assert {config.eval_n for config in configs.values()} == {None} and released.pretrained == "example"
    tried = [config for name, config in configs.items() if name.startswith("afd-released-")]
    assert len({str(config) for config in tried}) == 6  # each is another one


def test_the_better_afd_is_attacked(reproduce, parts, tmp_path):
    command = commands_of(reproduce, tmp_path)["autoattack-afd"]
    with pytest.raises(parts.NotNow, match="afd-released or afd-paper"):
        command()
    finished(tmp_path / "runs" / "afd-released", 0.4)
    for result in ("out of time", "failed"):  # one that was cut short is waited for
        rows = [{"part": "afd-paper", "result": result}]
        (tmp_path / "summary.json").write_text(json.dumps({"rows": rows}))
        if result == "out of time":
            with pytest.raises(parts.NotNow, match="no result of afd-paper"):
                command()
        else:
            assert str(tmp_path / "runs" / "afd-released") in command()
    finished(tmp_path / "runs" / "afd-paper", 0.5)
    assert str(tmp_path / "runs" / "afd-paper") in command()


def test_a_run_that_was_cut_short_is_resumed(reproduce, tmp_path):
    finished(tmp_path / "runs" / "vaft-matched", 0.5, "vAFT")
    command = commands_of(reproduce, tmp_path)["vaft-matched"]
    assert command()[3:] == ["--resume", str(tmp_path / "runs" / "vaft-matched")]


def test_runs_are_collected_and_shown_beside_the_paper(reproduce, monkeypatch, tmp_path):
    from benchmarks import table

    folder = tmp_path / "runs" / "afd-released"
    finished(folder, 0.5)
    of_later = {"n": 4, "correct": 1, "accuracy": 0.25, "interval": [0.05, 0.4]}
    attacked = {"dataset": "cifar10", "eps": "8/255", "autoattack": of_later}
    (folder / "evaluation-autoattack.json").write_text(json.dumps(attacked))
    (tmp_path / "runs" / "begun").mkdir()
    out = tmp_path / "results" / "a-gpu"
    out.mkdir(parents=True)
    (tmp_path / "runs").rename(out / "runs")
    reproduce.collect(out)
    (file,) = out.glob("*.json")
    result = json.loads(file.read_text())
    assert result["run"] == file.stem == "afd-released" and [line["step"] for line in result["log"]] == [39, 78]
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results")
    lines = table.reproduced().splitlines()
    ours = next(line for line in lines if line.startswith("| AFD, recipe `released` |"))
    assert "50.0 [10.0, 90.0] n=4; paper 52.70, within" in ours
    assert "25.0 [5.0, 40.0] n=4; paper 47.40, missed by -22.40" in ours
    assert "| a GPU |" in ours and "| 100 | 20 |" in ours and "results/a-gpu/afd-released.json" in ours
    assert not any("tried" in line for line in lines)
    assert sum("not run; paper 84.88" in line for line in lines) == 2  # by recipe paper, and from the own natural model


@pytest.mark.slow
def test_a_rehearsal_of_a_run_its_attack_and_its_resumption(reproduce, parts, cifar10_tree, tmp_path):
    """Real commands on real images: train, attack, collect; then the natural model and AFD from it."""
    few = tmp_path / "tree"
    for folder in cifar10_tree.glob("t*/*"):
        (few / folder.relative_to(cifar10_tree)).mkdir(parents=True)
        for image in sorted(folder.iterdir())[:2]:
            (few / image.relative_to(cifar10_tree)).symlink_to(image)
    chosen = {part.name: part for part in reproduce.parts(tmp_path, "cpu", True, few)}
    some = [chosen[name] for name in ("vaft-matched", "autoattack-vaft", "natural", "natural-pgd20")]
    assert parts.run(some, 600, tmp_path, after=lambda: reproduce.collect(tmp_path)) == 0
    result = json.loads((tmp_path / "vaft-matched.json").read_text())
    assert result["models"]["vAFT"]["autoattack"]["n"] == 2 and result["config"]["matched"]
    assert {"gap_linf", "seconds"} <= set(result["log"][-1]) and result["seconds"]["finetuning"]["wall"] > 0
    natural = json.loads((tmp_path / "natural.json").read_text())
    assert natural["clean"]["n"] == 4 and natural["seconds"]["wall"] > 0
