"""The training loop: the run folder, kills and resumes, signals, NaN losses, full disks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastafd
from fastafd import cli, train
from fastafd.checkpoint import load_run
from fastafd.settings import RunError, Stopped, UsageError
from fastafd.training.step import TrainStep

# 240 images of 8x8 pixels, 15 steps an epoch
SMALL = (
    "--dataset imagefolder --arch resnet8 --batch-size 16 --epochs 4 --attack.steps 3 --log-every 5 --eval-n 20".split()
)
SMALL += "--pretrain.epochs 2 --pretrain.batch-size 16 --autoattack-n 0 --loader resident --device cpu".split()


def arguments(tree: Path, out: Path, *more: str) -> list[str]:
    return [*SMALL, "--data-dir", str(tree), "--out", str(out), *more]


@pytest.fixture(scope="module")
def whole_run(digit_tree, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train.main(arguments(digit_tree, out))
    return out


def start(tree: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastafd.train", *arguments(tree, out, *more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_steps(out: Path, steps: int) -> None:
    """Wait until the run has logged that many steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        log = out / "metrics.jsonl"
        if log.exists() and f'"step": {steps},' in log.read_text():
            return
        time.sleep(0.01)
    raise AssertionError("the run never got that far")


def assert_same_run(out: Path, whole: Path) -> None:
    """Every tensor of the final state, bit for bit: weights, BatchNorm, average, momentum, generators, merged model."""

    def flatten(value, name=""):
        if isinstance(value, dict):
            return {k: v for key, inner in value.items() for k, v in flatten(inner, f"{name}.{key}").items()}
        if isinstance(value, list):
            return {k: v for key, inner in enumerate(value) for k, v in flatten(inner, f"{name}.{key}").items()}
        return {name: value}

    ours, theirs = (flatten(load_run(folder / "last.pt")["step"]) for folder in (out, whole))
    assert ours.keys() == theirs.keys() and len(ours) > 100
    for name, value in ours.items():
        same = torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]
        assert same, name
    merged, expected = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_run_folder(whole_run):
    names = {path.name for path in whole_run.iterdir()} - {"tensorboard"}
    assert names == {
        *("config.yaml", "env.json", "metrics.jsonl", "last.pt"),
        *("natural.safetensors", "model.safetensors", "result.json", "samples.npz"),
    }
    result = json.loads((whole_run / "result.json").read_text())
    assert set(result["models"]) == {"natural", "AFD", "AFD, f2"}
    config = train.parse(["--config", str(whole_run / "config.yaml")])
    assert list(result["settings"]) == [name for name, *_ in cli.entries(config)]
    assert (result["settings"]["attack.eps"], result["settings"]["epochs"]) == ("8/255", 4)
    assert "pgd20" not in result["models"].pop("AFD, f2")
    for model in result["models"].values():
        for attack in ("clean", "pgd20"):
            low, high = model[attack]["interval"]
            assert model[attack]["n"] == 20 and low <= model[attack]["accuracy"] <= high
    lines = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5, 61, 5))
    wanted = {"loss", "confused", "exclusion", "cross_entropy", "alignment", "adversarial_accuracy", "clean_accuracy"}
    wanted |= {f"{gap}_{norm}" for gap in ("gap", "own_gap") for norm in ("l1", "l2", "linf", "cosine")}
    assert wanted | {"epoch", "lr", "images_s", "seconds"} <= set(lines[-1])
    assert {"data", "attack", "update", "teacher", "ema"} <= set(lines[-1]["seconds"])
    assert lines[-1]["lr"] == pytest.approx(0.025 * 0.2)  # the last of four epochs starts at 0.75 of the run
    assert json.loads((whole_run / "env.json").read_text())["versions"]["torch"] == torch.__version__


def test_f2_is_what_the_confused_features_alone_predict(whole_run, digit_tree):
    from fastafd.data import load_dataset, to_unit

    dataset = load_dataset("imagefolder", digit_tree)
    clean = json.loads((whole_run / "result.json").read_text())["models"]["AFD, f2"]["clean"]
    state = load_run(whole_run / "last.pt")["step"]["ema"]["module"]
    model = fastafd.disentangle(fastafd.load_model(whole_run)).eval()
    model.load_state_dict(state)
    indices = clean["indices"]
    with torch.no_grad():
        f2 = model.d2(model.features(to_unit(torch.from_numpy(dataset.test.images(indices)))))
        right = model.classifier(f2).argmax(1) == torch.from_numpy(dataset.test.labels[indices])
    assert clean["correct"] == int(right.sum())


def test_saved_model_is_the_merged_average(whole_run):
    net = fastafd.load_model(whole_run)
    assert not net.training and "linear.weight" in net.state_dict() and len(net.state_dict()) == 6 + 3 * 12 + 2 * 6 + 2
    state = load_run(whole_run / "last.pt")["step"]["ema"]["module"]
    merged = state["classifier.weight"].double() @ state["d1.weight"].double()
    torch.testing.assert_close(net.state_dict()["linear.weight"], merged.float())
    torch.testing.assert_close(net.state_dict()["bn1.running_mean"], state["backbone.bn1.running_mean"])


def test_fine_tuning_from_the_pretrained_cache_is_the_same_run(whole_run, digit_tree, tmp_path, capsys):
    """The second run loads the natural model from the cache instead of training it again."""
    train.main(arguments(digit_tree, tmp_path / "again"))
    assert "natural pre-training: resnet8" not in capsys.readouterr().err
    assert_same_run(tmp_path / "again", whole_run)


def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(whole_run, digit_tree, tmp_path):
    out = tmp_path / "killed"
    process = start(digit_tree, out, "--save-every", "4")
    wait_for_steps(out, 20)
    process.kill()
    process.wait()
    saved = load_run(out / "last.pt")["progress"]["steps"]
    assert 15 <= saved < 60 and not (out / "result.json").exists()
    train.main(["--resume", str(out)])
    assert_same_run(out, whole_run)
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 60


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_next_step_and_exits_75(number, whole_run, digit_tree, tmp_path):
    out = tmp_path / "stopped"
    process = start(digit_tree, out)
    wait_for_steps(out, 5)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "saved" in err.splitlines()[-1] and "Traceback" not in err
    assert load_run(out / "last.pt")["progress"]["steps"] < 60
    train.main(["--resume", str(out)])
    assert_same_run(out, whole_run)


def test_a_second_interrupt_stops_at_once(digit_tree, tmp_path):
    """The loop reads the flag between steps; the second SIGINT does not wait for the end of the step."""
    out = tmp_path / "twice"
    process = start(digit_tree, out, "--attack.steps", "2000")
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    process.stderr.close()


def test_a_run_that_diverges_at_once_stops_and_saves_nothing(digit_tree, tmp_path):
    out = tmp_path / "nan"
    with pytest.raises(RunError, match=r"not finite at step [1-5]; nothing had been saved yet"):
        train.main(arguments(digit_tree, out, "--lr", "1e18"))
    assert not (out / "last.pt").exists()


def test_a_later_bad_loss_is_named_exactly_and_the_last_good_state_kept(whole_run, digit_tree, tmp_path, monkeypatch):
    from fastafd.methods import AFD

    loss, calls = AFD.loss, []

    def poisoned(self, *args):
        calls.append(1)
        out = loss(self, *args)
        return out._replace(total=out.total * float("nan")) if len(calls) == 18 else out

    monkeypatch.setattr(AFD, "loss", poisoned)
    out = tmp_path / "poisoned"
    with pytest.raises(RunError, match=r"at step 18; .*keeps the last good"):
        train.main(arguments(digit_tree, out))
    assert load_run(out / "last.pt")["progress"]["steps"] == 15  # the end of the first epoch


@pytest.mark.parametrize(
    "error, words",
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which "
                "12.50 MiB is free. Including non-PyTorch memory, this process has 79.09 GiB memory in use."
            ),
            "out of GPU memory: asked for 20.00 MiB, 12.50 MiB free. Take",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "out of GPU memory. Take",
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to "
                "allocate 4000000000 bytes. Error code 12 (Cannot allocate memory)"
            ),
            "out of memory: asked for 4000000000 bytes. Take",
        ),
        (MemoryError(), "out of memory. Take"),
    ],
)
def test_out_of_memory_says_what_to_do_and_the_last_state_stays(
    error, words, whole_run, digit_tree, tmp_path, monkeypatch
):
    step, calls = TrainStep.__call__, []

    def fails(self, *batch, **named):
        calls.append(1)
        if len(calls) == 18:
            raise error
        return step(self, *batch, **named)

    monkeypatch.setattr(TrainStep, "__call__", fails)
    out = tmp_path / "full"
    with pytest.raises(RunError) as stopped:
        train.main(arguments(digit_tree, out))
    message = str(stopped.value)
    assert words in message and "a smaller --batch-size than 16, or 16 bits (--amp bf16)" in message
    assert message.endswith(f"{out / 'last.pt'} keeps the last good state")
    assert load_run(out / "last.pt")["progress"]["steps"] == 15


def test_another_error_of_a_step_is_not_reported_as_out_of_memory(whole_run, digit_tree, tmp_path, monkeypatch):
    def fails(self, *batch, **named):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(TrainStep, "__call__", fails)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train.main(arguments(digit_tree, tmp_path / "wrong"))


def test_the_teacher_is_part_of_the_run(whole_run, digit_tree, tmp_path, monkeypatch, capsys):
    """A resumed run loads the teacher from its folder, even if the file or the cache that it came from is gone."""
    import shutil

    out = tmp_path / "moved"
    out.mkdir()
    for name in ("config.yaml", "natural.safetensors"):
        shutil.copy(whole_run / name, out)
    monkeypatch.setenv("FASTAFD_CACHE", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    train.main(["--resume", str(out)])
    assert "natural pre-training" not in capsys.readouterr().err
    assert_same_run(out, whole_run)


def test_a_signal_during_the_last_save_is_not_lost(digit_tree, tmp_path, monkeypatch):
    from fastafd.training import loop

    saved = []

    def save_and_signal(path, state):
        saved.append(state["progress"]["steps"])
        if saved[-1] == 60:
            os.kill(os.getpid(), signal.SIGTERM)
        save_run(path, state)

    save_run = loop.save_run
    monkeypatch.setattr(loop, "save_run", save_and_signal)
    out = tmp_path / "late"
    with pytest.raises(Stopped, match="after step 60"):
        train.main(arguments(digit_tree, out))
    assert not (out / "model.safetensors").exists() and saved[-1] == 60
    assert not issubclass(Stopped, Exception)  # code that recovers from errors must not catch it


def test_stopping_in_pre_training_leaves_a_run_to_resume(digit_tree, tmp_path, monkeypatch):
    from fastafd.training import loop

    def save_and_signal(path, state):
        save_run(path, state)
        os.kill(os.getpid(), signal.SIGTERM)

    save_run = loop.save_run
    monkeypatch.setattr(loop, "save_run", save_and_signal)
    monkeypatch.setenv("FASTAFD_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "early"
    with pytest.raises(Stopped, match="after step 15;"):
        train.main(arguments(digit_tree, out))
    monkeypatch.setattr(loop, "save_run", save_run)
    monkeypatch.undo()
    monkeypatch.setenv("FASTAFD_CACHE", str(tmp_path / "cache"))
    train.main(["--resume", str(out)])
    assert (out / "result.json").exists()


def test_resume_refuses_other_data(whole_run, digit_tree, tmp_path):
    import shutil

    out, tree = tmp_path / "copy", tmp_path / "tree"
    shutil.copytree(whole_run, out)
    shutil.copytree(digit_tree, tree)
    next((tree / "train" / "digit3").iterdir()).unlink()
    text = (out / "config.yaml").read_text().replace(str(digit_tree), str(tree))
    (out / "config.yaml").write_text(text)
    with pytest.raises(UsageError, match="other data"):
        train.main(["--resume", str(out)])


def test_resume_takes_a_copy_of_the_data(whole_run, digit_tree, tmp_path):
    """The data may lie in another folder and have other modification times."""
    import shutil

    out, tree = tmp_path / "copy", tmp_path / "tree"
    shutil.copytree(whole_run, out)
    shutil.copytree(digit_tree, tree, copy_function=shutil.copyfile)
    text = (out / "config.yaml").read_text().replace(str(digit_tree), str(tree))
    (out / "config.yaml").write_text(text)
    train.main(["--resume", str(out)])
    assert_same_run(out, whole_run)


def test_a_full_disk_leaves_nothing_half_written(whole_run, tmp_path, monkeypatch):
    from fastafd import checkpoint

    def full(state, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    (tmp_path / "last.pt").write_bytes(b"the old one")
    with pytest.raises(RunError, match="No space left"):
        checkpoint.save_run(tmp_path / "last.pt", {})
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert (tmp_path / "last.pt").read_bytes() == b"the old one"


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="no /dev/full here")
def test_a_really_full_device_is_one_line(tmp_path):
    from fastafd.files import write_atomic

    def write(path):
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)

    with pytest.raises(RunError, match="No space left"):
        write_atomic(tmp_path / "file", write)
    assert not list(tmp_path.iterdir())
