"""Every entry that takes pixels names the argument that it cannot take: range, type, shape, NaN, labels, outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fastafd
from fastafd.attacks import KLPGD
from fastafd.console import Console
from fastafd.data import ArraySplit
from fastafd.evaluation import accuracy_under, run_autoattack
from fastafd.methods import PGDAT
from fastafd.models import split
from fastafd.settings import RunError, UsageError
from fastafd.training.step import TrainStep

X = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 4


def net_of(*ends: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(8, 4), *ends).eval()


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def afd_step(net=None):
    net = net or net_of()
    model = fastafd.disentangle(net)
    return fastafd.AFDStep(model, net, fastafd.make_sgd(model, 0.1, 0.9, 0.0), steps=1)


def at_step():
    model = split(net_of())
    return TrainStep(model, torch.optim.SGD(model.parameters(), 0.1), PGDAT(), attack=fastafd.PGD(steps=1))


def second_batch(x, y):
    step = afd_step()
    step(X, Y)
    return step(x, y)


ENTRIES = {
    "PGD": lambda x, y: fastafd.PGD(steps=1)(net_of(), x, y),
    "PGD without steps": lambda x, y: fastafd.PGD(steps=0, random_start=False)(net_of(), x, y),
    "KLPGD": lambda x, y: KLPGD(steps=1)(net_of(), x, y),
    "AutoAttack": lambda x, y: run_autoattack(net_of(), x, y, 8 / 255, 8, 0, print),
    "accuracy_under": lambda x, y: accuracy_under(net_of(), x, y, fastafd.PGD(steps=1), 8, 0, Console(), "test"),
    "AFDStep": lambda x, y: afd_step()(x, y),
    "AFDStep, its second batch": second_batch,
    "TrainStep": lambda x, y: at_step()(x, y),
}
with_nan = X.clone()
with_nan[2, 0, 0, 0] = float("nan")
IMAGES = {
    "normalised": ((X - 0.5) / 0.25, r"^x: .*-\d"),
    "0 to 255": (X * 255, "^x: .*255"),
    "NaN": (with_nan, "^x: got NaN in 1 of 8"),
    "infinite": (X.clone().masked_fill_(X > 0.99, float("inf")), "^x: .*inf"),
    "flat": (X.flatten(1), r"^x: .*\(8, 108\)"),
    "one image": (X[0], r"^x: .*\(3, 6, 6\)"),
    "channels last": (X.permute(0, 2, 3, 1).contiguous(), "^x: .*channels"),
    "numpy": (X.numpy(), "^x: got a ndarray"),
    "whole numbers": ((X * 255).long(), "^x: got int64"),
}
LABELS = {
    "one-hot": (nn.functional.one_hot(Y, 4), "^y: .*one-hot"),
    "soft": (nn.functional.one_hot(Y, 4).float(), "^y: .*soft"),
    "(B,1)": (Y[:, None], "^y: .*squeeze"),
    "floats": (Y.float(), "^y: got float32"),
    "NaN": (torch.full((8,), float("nan")), "^y: got float32"),
    "too large": (Y + 1, "^y: got labels from 1 to 4, takes 0 to 3"),
    "negative": (Y - 1, "^y: got labels from -1"),
    "too few": (Y[:5], r"^y: got \(5,\) for 8"),
    "a list": (Y.tolist(), "^y: got a list"),
    "booleans": (Y > 1, "^y: got bool"),
}
ENTRIES_WITHOUT_OUTPUT = ("PGD without steps",)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("images", IMAGES)
def test_other_images_are_refused(entry, images):
    x, says = IMAGES[images]
    if entry == "accuracy_under" and images == "numpy":
        pytest.skip("takes tensors of a split")
    with pytest.raises(UsageError, match=says):
        ENTRIES[entry](x, Y)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("labels", LABELS)
def test_other_labels_are_refused(entry, labels):
    y, says = LABELS[labels]
    if entry in ENTRIES_WITHOUT_OUTPUT and labels == "too large":
        pytest.skip("no output tells the number of classes")
    with pytest.raises(UsageError, match=says):
        ENTRIES[entry](X, y)


@pytest.mark.parametrize("shape", [(8, 6, 6), (8, 6, 6, 1), (8, 1, 6, 6), (6, 6, 3)])
def test_grey_uint8_images_are_refused(shape):
    x = torch.zeros(shape, dtype=torch.uint8)
    with pytest.raises(UsageError, match=r"^x: got uint8"):
        afd_step()(x, Y)
    with pytest.raises(UsageError, match=r"^x: got uint8"):
        fastafd.PGD()(net_of(), x, Y)


def test_an_empty_batch():
    assert fastafd.PGD()(net_of(), X[:0], Y[:0]).shape == (0, 3, 6, 6)
    with pytest.raises(UsageError, match="at least one image"):
        afd_step()(X[:0], Y[:0])


def test_a_grey_float_network_is_attacked():
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    assert (fastafd.PGD()(net, X[:, :1], Y) - X[:, :1]).abs().max() > 0


# -- outputs ------------------------------------------------------------------------------------------------------

OUTPUTS = {
    "a tuple": (lambda z: (z, z), "returns a tuple"),
    "a dict": (lambda z: {"logits": z}, "returns a dict"),
    "probabilities": (lambda z: z.softmax(1), "returns probabilities"),
    "one dimension": (lambda z: z[:, 0], r"returns \(8,\)"),
    "maps": (lambda z: z[:, :, None, None], r"returns \(8, 4, 1, 1\)"),
    "class numbers": (lambda z: z.argmax(1), r"returns \(8,\)"),
}
split_of = ArraySplit(np.random.default_rng(0).integers(0, 256, (8, 6, 6, 3), dtype=np.uint8), Y.numpy())


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("entry", ["PGD", "KLPGD", "evaluate", "AutoAttack"])
def test_other_outputs_are_refused(output, entry):
    function, says = OUTPUTS[output]
    net = net_of(Function(function))
    run = {
        "PGD": lambda: fastafd.PGD(steps=1)(net, X, Y),
        "KLPGD": lambda: KLPGD(steps=1)(net, X, Y),
        "evaluate": lambda: fastafd.evaluate(net, split_of, ("clean",)),
        "AutoAttack": lambda: run_autoattack(net, X, Y, 8 / 255, 8, 0, print),
    }[entry]
    with pytest.raises(UsageError, match=f"^(classifier|model): {says.replace('8', '[18]')}"):
        run()


def spoiled(rows):
    """A network that returns NaN for the first images of a batch."""

    class Spoils(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net_of()

        def forward(self, x):
            logits = self.net(x)
            bad = torch.arange(len(x)) < rows
            return logits.masked_fill(bad[:, None], float("nan"))

    return Spoils()


def test_pgd_refuses_nan():
    with pytest.raises(UsageError, match=r"^classifier: returns NaN for 2 of 8"):
        fastafd.PGD(steps=1)(spoiled(2), X, Y)


@pytest.mark.parametrize("attacks", [("clean",), ("clean", "pgd20"), ("clean", "pgd20", "autoattack")])
def test_nan_counts_as_wrong_in_an_evaluation(attacks, capsys):
    """argmax takes NaN for the largest, so all-NaN rows would count as class 0."""
    zeros = ArraySplit(split_of.array, np.zeros(8, np.int64))

    result = fastafd.evaluate(net_of(Function(lambda z: z * float("nan"))), zeros, attacks)
    assert [result[attack]["correct"] for attack in attacks] == [0] * len(attacks)
    assert "NaN for 8 of 8 images, which count as wrong" in capsys.readouterr().err
    assert all("NaN" in result[attack]["warnings"][0] for attack in attacks[:2])
    some = fastafd.evaluate(spoiled(3), split_of, ("clean",))
    rest = fastafd.evaluate(net_of(), split_of, ("clean",))
    assert some["clean"]["correct"] <= rest["clean"]["correct"]


def test_nan_ends_a_training_step():
    with pytest.raises(RunError, match="not finite"):
        net = net_of()
        step = afd_step(net)
        step.model.classifier.weight.data[0, 0] = float("nan")
        step(X, Y)


def test_a_step_without_gradients_says_so():
    for off in (torch.no_grad, torch.inference_mode):
        with off(), pytest.raises(UsageError, match="needs gradients"):
            afd_step()(X, Y)


# -- inference mode -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [fastafd.PGD(steps=2), KLPGD(steps=2)])
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_an_attack_works_without_gradients(attack, off):
    net = net_of()
    expected = attack(net, X, Y, torch.Generator().manual_seed(0))
    with off():
        x, y = X.clone(), Y.clone()  # under inference_mode these are inference tensors
        attacked = attack(net, x, y, torch.Generator().manual_seed(0))
    assert torch.equal(attacked, expected) and (attacked - X).abs().max() > 0


@pytest.mark.slow
def test_an_evaluation_works_under_inference_mode():
    net, two = net_of(), ArraySplit(split_of.array[:2], Y[:2].numpy())
    expected = fastafd.evaluate(net, two, ("clean", "pgd20", "autoattack"))
    with torch.inference_mode():
        result = fastafd.evaluate(net, two, ("clean", "pgd20", "autoattack"))
    for attack in ("clean", "pgd20", "autoattack"):
        assert result[attack]["correct"] == expected[attack]["correct"]


# -- splits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images, labels, says",
    [
        (split_of.array / 255, Y, "^images: got float64"),
        (split_of.array[..., 0], Y, r"^images: got \(8, 6, 6\)"),
        (split_of.array[..., :1], Y, r"^images: got \(8, 6, 6, 1\)"),
        (split_of.array[:, :4], Y, "^images: .*square"),
        (split_of.array, Y.float(), "^labels: got float32"),
        (split_of.array, Y[:, None], r"^labels: got int64 \(8, 1\)"),
        (split_of.array, Y[:5], r"^labels: got int64 \(5,\) for 8"),
    ],
)
def test_a_split_in_memory_takes_bytes_and_class_numbers(images, labels, says):
    with pytest.raises(UsageError, match=says):
        ArraySplit(images, labels.numpy())


def test_an_evaluation_takes_a_split_and_a_network():
    with pytest.raises(UsageError, match=r"^test: got a tuple"):
        fastafd.evaluate(net_of(), (X, Y))
    with pytest.raises(UsageError, match=r"^model: got a function"):
        fastafd.evaluate(lambda x: x, split_of)
    with pytest.raises(UsageError, match=r"^y: got labels from 0 to 3, takes 0 to 1"):
        fastafd.evaluate(nn.Sequential(nn.Flatten(), nn.Linear(108, 2)), split_of, ("clean",))
