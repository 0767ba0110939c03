"""Free-AT, FGSM with GradAlign and ATAS: compared with literal transcriptions in float64, and stopped and resumed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transcriptions
from float64 import BATCH, CLASSES, EPS, assert_same, batches, draws, floats, small_net
from torch import nn

from fastafd.data import ArraySplit, Augment, to_unit
from fastafd.data.loaders import Loader, ResidentLoader, epoch_order
from fastafd.methods.grad_align import misalignment
from fastafd.models import split
from fastafd.recipes import find_recipe
from fastafd.training.fast_at import ATASStep, FreeStep, GradAlignStep, Replayed
from fastafd.training.optim import learning_rate, make_sgd


def test_free_at_is_its_transcription():
    literal, data, times = small_net(), batches(4), 3
    model = split(literal)
    config = find_recipe("free_at")
    sgd = config.sgd
    optimizer = make_sgd(model, 0.0, sgd.momentum, sgd.weight_decay)
    method = type(config.method)(replays=times)
    step = FreeStep(model, optimizer, method, attack=config.attack, amp="fp32", engine="reference")
    total = times * len(data)
    rates = [learning_rate(k, total, sgd.lr, sgd.lr_schedule, sgd.lr_between) for k in range(total)]
    assert rates[0] == 0 and max(rates) == pytest.approx(0.04)
    for k, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        step(*data[k // times])
    delta = transcriptions.free_at(literal, data, rates, times)
    assert_same(model.merge(), literal)
    torch.testing.assert_close(step.delta, delta, rtol=0, atol=1e-12)
    assert delta.abs().max() <= EPS + 1e-12 and delta.abs().max() > 0


def test_fgsm_with_grad_align_is_its_transcription():
    literal, data = small_net(), batches(6)
    model, config = split(literal), find_recipe("fgsm_ga")
    sgd = config.sgd
    optimizer = make_sgd(model, 0.0, sgd.momentum, sgd.weight_decay)
    step = GradAlignStep(model, optimizer, config.method, attack=config.attack, amp="fp32", engine="reference")
    rates = [learning_rate(k, len(data), sgd.lr, sgd.lr_schedule, sgd.lr_between) for k in range(len(data))]
    for (x, y), rate in zip(data, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        metrics = step(x, y)
    transcriptions.fgsm_ga(literal, data, draws(data), rates)
    assert_same(model.merge(), literal, 1e-7)  # second derivatives, at rates up to 0.3
    assert 0 < metrics["misalignment"] < 2


def test_misalignment_ignores_images_without_a_gradient():
    u = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    v = torch.tensor([[0.0, 2.0], [1.0, 0.0], [3.0, 3.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    mean = misalignment(u, v)
    assert float(mean.detach()) == pytest.approx((1 + 0) / 2)
    mean.backward()
    assert v.grad.isfinite().all() and not v.grad[1].any() and not v.grad[3].any() and v.grad[0].any()
    nothing = misalignment(torch.zeros(2, 3), torch.ones(2, 3))
    assert float(nothing) == 0


class Images(Loader):
    """uint8 images of random pixels in batches, in the usual order."""

    kind = "test"

    def __init__(self, n: int):
        super().__init__(n, BATCH, 0, True, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randint(0, 256, (n, 8, 8, 3), dtype=torch.uint8, generator=generator)
        self.y = torch.randint(0, CLASSES, (n,), generator=generator)

    def deliver(self, order):
        for first in range(0, len(order), self.batch_size):
            batch = torch.from_numpy(order[first : first + self.batch_size])
            yield self.x[batch], self.y[batch]


def atas_step(net: nn.Module, loader: Loader, epochs: int, **fields) -> ATASStep:
    model, config = split(net), find_recipe("atas")
    optimizer = make_sgd(model, 0.1, config.sgd.momentum, config.sgd.weight_decay)
    method = type(config.method)(warm_up=1, redraw_every=3, **fields)
    around = {"augment": Augment(1, True, 0), "amp": "fp32", "engine": "reference"}
    return ATASStep(model, optimizer, method, attack=config.attack, loader=loader, epochs=epochs, **around)


def test_atas_is_its_transcription():
    """Four epochs: a warm-up, adaptive steps, new perturbations before the third, one more; with crops and flips."""
    literal, loader, epochs = small_net(), Images(3 * BATCH), 4
    step = atas_step(literal, loader, epochs, step_c=0.05)
    augment, data = Augment(1, True, 0), []
    for epoch in range(epochs):
        order = epoch_order(loader.n, 0, epoch)
        data.append([])
        for index, (x, y) in enumerate(loader.epoch(epoch)):
            offsets, flips = augment.draw(len(x))
            pixels = to_unit(x).double()
            data[-1].append((torch.from_numpy(order[BATCH * index :][:BATCH]), pixels, y, offsets, flips))
            step(x, y)
    generator = torch.Generator().manual_seed(0)
    first, again = (
        torch.empty(loader.n, 3, 10, 10, dtype=torch.float64).uniform_(-EPS, EPS, generator=generator) for _ in range(2)
    )
    # Both divide the pixels by 255 in float32.
    deltas, v = transcriptions.atas(
        literal, data, [first], [0.1] * epochs, resets={2: again}, padding=1, warmup=1, c=0.05
    )
    assert_same(step.averaged().merge(), literal, 1e-8)
    torch.testing.assert_close(step.deltas, deltas, rtol=0, atol=1e-9)
    torch.testing.assert_close(step.squares, v, rtol=1e-7, atol=1e-15)
    lengths = step.method.step_sizes(step.squares).flatten()
    assert ((lengths > 4 / 255 + 1e-6) & (lengths < 14 / 255 - 1e-6)).any()  # some step lengths lie between both bounds


@pytest.mark.parametrize("kind", ["free", "atas", "grad_align"])
def test_perturbations_that_are_kept_are_resumed(kind, tmp_path):
    """A stop in the middle of an epoch, and between two passes over a batch.

    The same weights and state, bit for bit.
    """
    from fastafd.checkpoint import load_run, save_run

    images = Images(3 * BATCH)
    loader = Replayed(images, 4) if kind == "free" else images

    def make():
        net = small_net()
        if kind == "atas":
            return atas_step(net, loader, 3)
        model, config = split(net), find_recipe("free_at" if kind == "free" else "fgsm_ga")
        method = type(config.method)(replays=4) if kind == "free" else config.method
        around = {"augment": Augment(1, True, 0), "amp": "fp32", "engine": "reference", "attack": config.attack}
        of = FreeStep if kind == "free" else GradAlignStep
        return of(model, make_sgd(model, 0.05, 0.9, 5e-4), method, **around)

    def run(step, first, last):
        for index in range(first, last):
            epoch, batch = divmod(index, len(loader))
            for x, y in loader.epoch(epoch, batch):
                step(x, y)
                break

    whole, stopped, resumed = make(), make(), make()
    end = 2 * len(loader)
    middle = len(loader) + 2
    run(whole, 0, end)
    run(stopped, 0, middle)
    save_run(tmp_path / "last.pt", {"step": stopped.state_dict(), "progress": {}})
    resumed.load_state_dict(load_run(tmp_path / "last.pt")["step"])
    run(resumed, middle, end)
    for name, value in floats(resumed.averaged()).items():
        assert torch.equal(value, floats(whole.averaged())[name]), name
    for held in ("delta", "deltas", "squares"):
        if hasattr(whole, held):
            assert torch.equal(getattr(resumed, held), getattr(whole, held)), held


def test_replayed_batches():
    loader = Replayed(Images(2 * BATCH), 3)
    plain = [y for _, y in Images(2 * BATCH).epoch(1)]
    assert len(loader) == 6 and [y.tolist() for _, y in loader.epoch(1)] == [
        y.tolist() for y in plain for _ in range(3)
    ]
    for start in range(7):
        assert [y.tolist() for _, y in loader.epoch(1, start)] == [y.tolist() for y in plain for _ in range(3)][start:]


def test_the_loader_of_a_run_is_replayed_from_the_middle():
    images = ArraySplit(np.zeros((12, 8, 8, 3), np.uint8), np.arange(12))
    shape = {"n": 12, "batch_size": 4, "seed": 0, "drop_last": True, "device": torch.device("cpu")}
    loader = Replayed(ResidentLoader(images, **shape), 2)
    assert [y.tolist() for _, y in loader.epoch(0, 3)] == [y.tolist() for _, y in loader.epoch(0)][3:]
