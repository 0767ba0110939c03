"""The epochs around a step.

Learning rate, log, checkpoints, signals. A resumed run continues as if it never stopped.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fastafd.checkpoint import load_run, save_run
from fastafd.config import SGD
from fastafd.console import Bar, Console
from fastafd.data.loaders import Loader
from fastafd.device import enough_memory
from fastafd.files import as_json, save_text
from fastafd.settings import RunError, Stopped, UsageError
from fastafd.training.optim import learning_rate
from fastafd.training.step import TrainStep


def fit(
    step: TrainStep,
    loader: Loader,
    sgd: SGD,
    folder: Path,
    console: Console,
    *,
    label: str,
    log_every: int,
    save_every: int = 0,
    identity: str,
) -> dict[str, float]:
    """Train for sgd.epochs epochs, continuing from `folder/last.pt` if it exists; returns seconds by phase.

    Writes `metrics.jsonl` (one line every `log_every` steps) and `last.pt` (after every epoch, every `save_every`
    steps, and on SIGTERM or SIGINT). identity: names the data and the settings, which must be the same on resuming.
    Raises UsageError for a checkpoint of another identity, RunError for a loss that is not finite (the last good
    checkpoint stays), Stopped after a signal.
    """
    last = folder / "last.pt"
    for leftover in folder.glob(".*.tmp"):  # of a run that was killed while it wrote
        leftover.unlink()
    step.timer.on = True
    per_epoch = len(loader)
    done, seconds = 0, {}
    if last.exists():
        state = load_run(last)
        if state["progress"]["identity"] != identity:
            raise UsageError(f"resume: {last} was written with other data, or by a run of other settings")
        step.load_state_dict(state["step"])
        done, seconds = state["progress"]["steps"], state["progress"]["seconds"]
        console.line(f"{label}: resumed at step {done} of {per_epoch * sgd.epochs}")
        note_arms(folder, step)

    def save() -> None:
        log.check_finite()
        progress = {"steps": done, "seconds": log.total_seconds(seconds), "identity": identity}
        save_run(last, {"step": step.state_dict(), "progress": progress})
        note_arms(folder, step)

    def advice() -> str:
        return f"Take a smaller --batch-size than {loader.batch_size}, or 16 bits (--amp bf16); {kept(last)}"

    bar = Bar(console, label, per_epoch * sgd.epochs, done)
    with MetricsLog(folder, done, step) as log, StopFlag() as stop, bar, enough_memory(advice):
        while done < per_epoch * sgd.epochs:
            epoch, first = divmod(done, per_epoch)
            rate = -1.0  # not set yet
            batches = loader.epoch(epoch, first)
            try:
                while (batch := log.next_batch(batches)) is not None:
                    due = (done + 1) % log_every == 0 or done + 1 == per_epoch * sgd.epochs
                    before, rate = (
                        rate,
                        learning_rate(done / per_epoch, sgd.epochs, sgd.lr, sgd.lr_schedule, sgd.lr_between),
                    )
                    if rate != before:
                        for group in step.optimizer.param_groups:
                            group["lr"] = rate
                    metrics = step(*batch, probe=due)
                    done += 1
                    log.add(metrics, len(batch[1]))
                    if due:
                        bar.note = log.write(done, epoch, rate)
                    bar.advance()
                    if stop.asked:
                        break
                    if save_every and done % save_every == 0 and done % per_epoch:
                        save()
            finally:
                batches.close()
            save()
            if stop.asked:  # the signal may have come during the save
                raise Stopped(f"stopped by {stop.asked} after step {done}; saved to {last}")
    return log.total_seconds(seconds)


def kept(last: Path) -> str:
    """The part of an error message that says whether there is a checkpoint."""
    return f"{last} keeps the last good state" if last.exists() else "nothing had been saved yet"


def note_arms(folder: Path, step: TrainStep) -> None:
    """Write the chosen forms of the attack's convolutions into the run's env.json, if there are any."""
    file = folder / "env.json"
    if step.arms and file.exists():
        environment = json.loads(file.read_text())
        if environment.get("arms") != step.arms:
            save_text(file, as_json(environment | {"arms": step.arms}))


class MetricsLog:
    """Sums metrics on the device and writes their means to `metrics.jsonl`; it waits for the device once a line."""

    def __init__(self, folder: Path, steps: int, step: TrainStep):
        self.path, self.step = folder / "metrics.jsonl", step
        folder.mkdir(parents=True, exist_ok=True)
        save_text(self.path, "".join(_lines_up_to(self.path, steps)))
        self.file = self.path.open("a", buffering=1)
        self.tensorboard = _tensorboard(folder, steps)
        self.bad_step = torch.full((), -1, device=step.device)  # the first step whose loss was not finite
        self.phases: dict[str, float] = {}
        self.began_run = time.perf_counter()
        self._restart()

    def _restart(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.images, self.waited = 0, 0.0
        self.began = time.perf_counter()

    def next_batch(self, batches: Any) -> tuple[Tensor, Tensor] | None:
        """The next batch, None at the end of the epoch. The time spent waiting counts as the phase `data`."""
        began = time.perf_counter()
        batch = next(batches, None)
        self.waited += time.perf_counter() - began
        return batch

    def add(self, metrics: dict[str, Tensor], images: int) -> None:
        """Add the metrics of one step on that many images."""
        self.images += images
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
            self.counts[name] = self.counts.get(name, 0) + 1
        first_bad = (self.bad_step < 0) & ~torch.isfinite(metrics["loss"])
        self.bad_step = torch.where(first_bad, self.step.steps, self.bad_step)

    def check_finite(self) -> None:
        """Raise RunError, naming the step, if a loss was NaN or infinite."""
        bad = int(self.bad_step)
        if bad >= 0:
            last = self.path.parent / "last.pt"
            raise RunError(f"loss: not finite at step {bad}; {kept(last)}. A smaller learning rate is the usual cure")

    def write(self, steps: int, epoch: int, rate: float) -> str:
        """Write one line; returns a short form of it for the progress bar."""
        self.check_finite()
        names = list(self.sums)
        values = torch.stack([self.sums[name].double() for name in names]).tolist()
        means = {name: value / self.counts[name] for name, value in zip(names, values, strict=True)}
        wall = time.perf_counter() - self.began
        seconds = {"data": self.waited, **self.step.timer.collect()}
        for phase, spent in seconds.items():
            self.phases[phase] = self.phases.get(phase, 0.0) + spent
        record = {
            "step": steps,
            "epoch": epoch + 1,
            "lr": rate,
            **means,
            "images_s": self.images / wall,
            "seconds": seconds,
        }
        self.file.write(json.dumps(record) + "\n")
        if self.tensorboard is not None:
            flat = {name: value for name, value in record.items() if isinstance(value, float)}
            for name, value in flat.items():
                self.tensorboard.add_scalar(name, value, steps)
        self._restart()
        accuracy = {name: means[name] for name in ("adversarial_accuracy", "clean_accuracy") if name in means}
        gist = ", ".join(f"{name.removesuffix('_accuracy')} {100 * value:.1f} %" for name, value in accuracy.items())
        return f"epoch {epoch + 1}, loss {means['loss']:.3f}, {gist}, {record['images_s']:.0f} images/s"

    def total_seconds(self, earlier: dict[str, float]) -> dict[str, float]:
        """Seconds of the loop (`wall`) and of each logged phase, summed over all resumes."""
        spent = {"wall": time.perf_counter() - self.began_run, **self.phases}
        return {name: earlier.get(name, 0.0) + spent.get(name, 0.0) for name in {**spent, **earlier}}

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()


class StopFlag:
    """Turns SIGTERM and SIGINT into a flag, which the loop reads after each step.

    A second SIGINT ends the process with 130.
    """

    def __enter__(self) -> StopFlag:
        self.asked: str | None = None
        self.before: dict[int, Any] = {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._note)
        except ValueError:  # not the main thread, which alone may handle signals
            pass
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None and number == signal.SIGINT:
            os._exit(130)
        self.asked = signal.Signals(number).name

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _lines_up_to(path: Path, steps: int) -> list[str]:
    """The log's complete lines up to that step: the steps after the last checkpoint are trained again."""
    if not path.exists() or steps == 0:
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= steps]


def _tensorboard(folder: Path, steps: int) -> Any:
    """A TensorBoard writer; None if TensorBoard cannot be imported, or cannot write there."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder / "tensorboard"), purge_step=steps)
    except Exception:  # not installed, broken by another protobuf version, a path that is not UTF-8
        return None
