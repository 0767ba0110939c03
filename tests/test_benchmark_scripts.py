"""The scripts of benchmarks/: where they write, the limits that they compare with, a user's mistake in one line."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


# -- where results go ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [CPU, "triton-3.8.0"])
def test_git_ignores_the_files_without_out(of):
    from benchmarks.clock import RESULTS, result_file

    file = result_file("epoch-time", of)
    assert file.parent.name == str(of) and RESULTS not in file.parents
    if (ROOT / ".git").exists():
        assert subprocess.run(["git", "check-ignore", "-q", str(file)], cwd=ROOT).returncode == 0


WITH_A_DEFAULT = {  # script: what measures, and what it returns; flags
    "arms": ("measure", None, "--device cpu"),
    "convolutions": ("shapes", {}, "--device cpu --arch resnet8_half"),
    "epoch_time": ("measure_task", None, "--device cpu --tiny --tasks natural"),
    "kernel_builds": ("launches", [], ""),
    "kernels": ("measured_rows", [], ""),
    "profile_step": ("rows_of", [], "--device cpu"),
    "threads": ("measured", dict(arch="a", side=8, batch=4, multiplications=1, one_s=1.0, two_s=1.0), "--quick"),
    "verify_rates": ("false_alarms", [{"arch": "a", "amp": "fp32", "seed": 0}], "--runs 1 --device cpu"),
}


def test_every_script_with_a_file_of_its_own_is_tested_here():
    scripts = (ROOT / "benchmarks").glob("*.py")
    assert {path.stem for path in scripts if re.search("import .*result_file", path.read_text())} == set(WITH_A_DEFAULT)


@pytest.mark.parametrize("script", WITH_A_DEFAULT)
def test_without_out_a_script_writes_to_the_folder_that_git_ignores(script, monkeypatch, tmp_path, capsys):
    """Each script with its measuring replaced: the committed files stay, and the output names the new one."""
    from importlib import import_module

    from benchmarks import clock
    from benchmarks.limits import Limits

    module = import_module(f"benchmarks.{script}")
    measures, found, flags = WITH_A_DEFAULT[script]
    monkeypatch.setattr(clock, "MEASURED", tmp_path / "measured")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # put back: some scripts set it
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(module, measures, lambda *_, **__: found)
    for name in ("convolutions_table", "rates_table", "builds_table", "profile_table", "kernels_table", "epoch_table"):
        monkeypatch.setattr(module, name, lambda rows: "", raising=False)
    monkeypatch.setattr(module, "limits", lambda *_, **__: Limits(1e12, "a product", 1e10), raising=False)
    if script in ("arms", "epoch_time", "convolutions"):  # these write after each piece that they measure
        written_by(module, script, monkeypatch)
    if script == "verify_rates":
        found[0].update(false_alarm=False)
    if script == "kernel_builds":
        monkeypatch.setattr(module, "ProcessPoolExecutor", lambda *_, **__: pool())
        monkeypatch.setattr(os, "environ", os.environ | {})
    committed = {file: file.stat().st_mtime_ns for file in clock.RESULTS.rglob("*") if file.is_file()}
    argv = [script, *flags.split()]
    monkeypatch.setattr(sys, "argv", argv)
    takes_argv = module.main.__code__.co_argcount
    assert not module.main(argv[1:]) if takes_argv else not module.main()
    (file,) = (tmp_path / "measured").rglob("*.json")
    assert file.stem == script.replace("_step", "").replace("_", "-") and json.loads(file.read_text())
    assert f"in {file}" in capsys.readouterr().out
    assert committed == {path: path.stat().st_mtime_ns for path in clock.RESULTS.rglob("*") if path.is_file()}


def written_by(module, script, monkeypatch):
    """Replace the measuring of a script that writes piece by piece by something that writes at once."""
    if script == "arms":
        monkeypatch.setattr(module, "measure", lambda args, device, result, out: module.save(result, out))
    elif script == "epoch_time":
        monkeypatch.setattr(
            module, "measure_task", lambda args, arch, task, device, out, result: module.save(result, out)
        )
    else:
        shape = module.Shape(4, 8, 4, 1, 1)
        monkeypatch.setattr(module, "shapes", lambda arch: {shape: 1})
        monkeypatch.setattr(module, "times", lambda *_: (dict.fromkeys(module.RATES, 1.0), {}))


class pool:
    """A pool of processes that has nothing to do."""

    def __enter__(self):
        return SimpleNamespace(map=lambda *_, **__: [])

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("script", ["small_runs.sh", "engines.sh"])
@pytest.mark.parametrize("chosen", [False, True])
def test_shell_scripts_copy_results_to_where_they_are_told(script, chosen, tmp_path):
    """In a copy of the tree whose Python makes empty results: without a second word, no committed file changes."""
    tree = tmp_path / "clone"
    (tree / "benchmarks" / "results").mkdir(parents=True)
    (tree / "benchmarks" / script).write_text((ROOT / "benchmarks" / script).read_text())
    python = tree / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/usr/bin/env bash\nfor word in "$@"; do\n'
        '    if [ "${last:-}" = --out ]; then mkdir -p "$word" && echo "{}" >"$word/result.json"; fi\n'
        '    last=$word\ndone\necho "{}"\n'
    )
    python.chmod(0o755)
    (tmp_path / "trees").mkdir()
    (tree / "runs").mkdir()
    words = ["bash", f"benchmarks/{script}", str(tmp_path / "trees"), *["benchmarks/results"] * chosen]
    done = subprocess.run(words, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    committed, measured = (list((tree / "benchmarks" / of).glob("*.json")) for of in ("results", "measured/cpu"))
    assert bool(committed) == chosen and bool(measured) != chosen and len(committed + measured) >= 3
    assert done.stdout.splitlines()[-1] == f"all of it in {(committed + measured)[0].parent}"


# -- what a rate is compared with ---------------------------------------------------------------------------------


def test_the_limit_is_that_of_the_fastest(monkeypatch):
    """Of products, linear layers and convolutions in every layout; where convolutions are faster, theirs."""
    from benchmarks import limits

    monkeypatch.setattr(limits, "SIDES", {"cpu": (16,)})
    monkeypatch.setattr(limits, "GFLOP", {"cpu": 1e-6})
    names = [candidate.name for candidate in limits.candidates(CPU, torch.float32)]
    assert {"a product of 16", "a linear layer of 16"} < set(names) and len(set(names)) == len(names)
    assert sum("channels_last" in name for name in names) == sum("NCHW" in name for name in names) == 7
    for fastest in ("a product of 16", "a 3x3 convolution, 256 channels of 8x8, channels_last"):
        measured = []
        flops = {candidate.name: candidate.flops for candidate in limits.candidates(CPU, torch.float32)}
        order = iter([*names, "copy"])

        def seconds(call, inputs, rounds, device, order=order, measured=measured, flops=flops, fastest=fastest):
            name = next(order)
            measured.append(name)
            return [9.0, flops.get(name, 1.0) / (4e9 if name == fastest else 1e9)]

        monkeypatch.setattr(limits, "seconds_of_rounds", seconds)
        found = limits.limits(CPU, torch.float32, 2)
        assert found.flops == pytest.approx(4e9) and found.by == fastest and measured == [*names, "copy"]


def test_candidates_count_their_own_flops(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks import limits

    monkeypatch.setattr(limits, "SIDES", {"cpu": (16,)})
    monkeypatch.setattr(limits, "GFLOP", {"cpu": 1e-6})
    for candidate in limits.candidates(CPU, torch.float32):
        if "oneDNN" not in candidate.name:  # the counter does not know that layout
            with FlopCounterMode(display=False) as counter:
                candidate.call(*candidate.inputs[0])
            assert counter.get_total_flops() == candidate.flops, candidate.name


@pytest.mark.parametrize("old", [False, True])
def test_no_share_above_the_peak_is_shown(old):
    """Old files have the share of one product, which convolutions may exceed; new ones that of the peak."""
    from benchmarks import epoch_tables

    row = {"arch": "resnet18", "task": "afd", "peak_gib": None, "first_call_s": 1.0, "images_s": 4.0, "tflops": 0.1}
    row |= {"epoch_s": 9.0, "fastest_s": 9.0, "slowest_s": 9.0, "times_paper_style": 1.0}
    key, limit = (
        ("of_product", {"product_tflops": 0.5})
        if old
        else ("of_peak", {"peak_tflops": 0.5, "peak_by": "a 1x1 convolution"})
    )
    about = {"amp": "fp32", "batch": 16, "pgd_steps": 10, "torch": "2", "threads": 1, "date": "today", "rounds": 1}
    result = {"device": "a CPU", "steps": 1, "whole": [], "phases": [], "compile": []} | about | limit

    def shown(*shares: float) -> tuple[str, str]:
        rows = [row | {"form": f"form {index}", key: share} for index, share in enumerate(shares)]
        of = result | {"rows": rows}
        return epoch_tables.epoch_table(of), epoch_tables.epoch_note(of)

    table, note = shown(0.55, 0.9)
    assert "| 55% |" in table and "| 90% |" in table and "A form was faster" not in note
    assert ("| of a product's |" in table) == old and ("| of the peak |" in table) != old
    said = "A matrix product reaches 0.5 TFLOP/s." if old else "fastest product or convolution measured, is 0.5 TFLOP/s"
    assert said in note and ("a 1x1 convolution" in note) != old
    table, note = shown(0.55, 1.12)
    assert "%" not in table and "A form was faster, so no share of it is shown." in note
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_tables_of_kernels_and_convolutions_show_no_share_above_their_limit():
    from benchmarks import convolutions, kernels

    row = {"operation": "linf_step", "size": "32x32 images", "form": "eager", "us": 1.0, "gb_s": 1.0}
    assert kernels.kernels_table([row | {"of_copy": 0.9}]).splitlines()[-1].endswith("| 90% |")
    assert kernels.kernels_table([row | {"of_copy": 1.387}]).splitlines()[-1].endswith("| 1.0 |  |")
    row = {"arch": "a", "kernel": 1, "stride": 1, "c_in": 4, "c_out": 4, "side": 8, "count": 1, "gflop": 1, "mb": 1}
    row |= {"us": {"forward": 1.0, "dgrad": 4.0}, "tflops": {"forward": 1.0, "dgrad": 1.0}, "failed": {}}
    last = convolutions.convolutions_table([row | {"roofline_us": 2.0}]).splitlines()[-1]
    assert last == "All 1 convolutions of a: roofline 2 us, forward 1 us, dgrad 4 us (50% of the limit)."


# -- a user's mistake ---------------------------------------------------------------------------------------------


def ending(script, words, monkeypatch, capsys):
    """The exit code of a script and its lines on stderr."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as stop:
        warnings.simplefilter("ignore", RuntimeWarning)  # the module was imported before it runs as a script
        runpy.run_module(f"benchmarks.{script}", run_name="__main__")
    return stop.value.code, capsys.readouterr().err.splitlines()


FOLDERS = {  # script: flags with a folder that is empty, what the line names
    "epoch_time": (["--device", "cpu", "--quick", "--data-dir", "{empty}"], "data_dir: {empty} holds no readable"),
    "gpu_suite": (["--budget", "1", "--out", "{out}", "--data-dir", "{empty}"], "data_dir: {empty} holds no readable"),
    "reproduce": (["--budget", "1", "--out", "{out}", "--data-dir", "{empty}"], "data_dir: {empty} holds no readable"),
    "table": (["natural", "{empty}"], "runs: {empty} has no natural-ENGINE-SEED"),
}


def test_every_script_that_takes_a_folder_of_data_is_tested_here():
    """The sweep passes --data-dir on to fastafd.train, whose own line is shown."""
    scripts = (ROOT / "benchmarks").glob("*.py")
    assert {path.stem for path in scripts if '"--data-dir", type=Path' in path.read_text()} == set(FOLDERS) - {"table"}


@pytest.mark.parametrize("script", FOLDERS)
def test_an_empty_folder_of_data_is_one_line(script, monkeypatch, capsys, tmp_path):
    from torchvision import datasets

    def no_network(*_):
        raise OSError("there is no network")

    monkeypatch.setattr(datasets.CIFAR10, "download", no_network)
    empty, out = tmp_path / "empty", tmp_path / "out"
    empty.mkdir()
    words, expected = FOLDERS[script]
    code, lines = ending(script, [word.format(empty=empty, out=out) for word in words], monkeypatch, capsys)
    assert code == 2 and len(lines) == 1 and lines[0].startswith(f"error: {expected.format(empty=empty)}")
    assert not out.exists()


def test_a_sweep_over_a_wrong_folder_shows_the_line_of_the_run(tmp_path):
    words = ["alpha", "--scale", "small", "--only", "alpha-0-seed0", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "benchmarks.sweep", *words, "--", "--data-dir", str(tmp_path / "nowhere")]
    command += ["--dataset", "tiny-imagenet"]  # of which nothing is downloaded
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "alpha-0-seed0: exit code 2" in done.stdout
    assert "Traceback" not in done.stderr and done.stderr.splitlines()[-1].startswith("error: data_dir: ")


WITH_A_NETWORK = {
    "arms": ["--device", "cpu"],
    "convolutions": ["--device", "cpu"],
    "epoch_time": ["--device", "cpu", "--quick"],
    "profile_step": ["--device", "cpu"],
    "verify_rates": ["--runs", "1", "--device", "cpu"],
}


@pytest.mark.parametrize("script", WITH_A_NETWORK)
def test_a_wrong_network_is_one_line(script, monkeypatch, capsys, tmp_path):
    from benchmarks import limits

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # put back: some scripts set it
    monkeypatch.setattr(limits, "limits", lambda *_, **__: limits.Limits(1e12, "a product", 1e10))
    words = [*WITH_A_NETWORK[script], "--arch", "resnet81", "--out", tmp_path / "found.json"]
    code, lines = ending(script, words, monkeypatch, capsys)
    assert code == 2 and "arch" in lines[-1] and "'resnet81'" in lines[-1] and lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
@pytest.mark.parametrize("script", ["arms", "convolutions", "epoch_time", "profile_step"])
def test_a_device_that_is_not_there_is_one_line(script, monkeypatch, capsys):
    code, lines = ending(script, ["--device", "cuda"], monkeypatch, capsys)
    assert code == 2 and lines == ["error: device: got 'cuda', and this machine has 0 CUDA devices"]


def test_a_file_that_cannot_be_written_is_one_line(capsys, tmp_path):
    from benchmarks.clock import save
    from fastafd.cli import run_script

    with pytest.raises(SystemExit) as stop:
        run_script(lambda: save({}, tmp_path) or 0)
    assert stop.value.code == 1
    assert capsys.readouterr().err == f"error: {tmp_path}: cannot be written: Is a directory\n"


@pytest.mark.parametrize(
    "error, code, line",
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), 1, "error: out of GPU memory: asked for 2.00"),
        (ValueError("no such thing"), 1, "error: this is a bug in fastafd"),
    ],
)
def test_a_script_ends_as_a_verb_does(error, code, line, capsys):
    from benchmarks.parts import last_line
    from fastafd.cli import run_script

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    said = capsys.readouterr().err
    assert stop.value.code == code and said.splitlines()[-1].startswith(line)
    if "bug" in line:  # the summary of gpu_suite says what happened, not that it is a bug
        assert "Traceback" in said and last_line(said) == "ValueError: no such thing"
    else:
        assert "Traceback" not in said


def test_a_script_ends_with_its_own_exit_code(capsys):
    from fastafd.cli import run_script

    with pytest.raises(SystemExit) as stop:
        run_script(lambda: 3)
    assert stop.value.code == 3 and capsys.readouterr().err == ""
