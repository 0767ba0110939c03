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


def afd_step_with(**fields):
    net = net_of()
    model = fastafd.disentangle(net)
    return fastafd.AFDStep(model, net, fastafd.make_sgd(model, 0.1, 0.9, 0.0), **fields)


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
    "one dimension": (lambda z: z[:, 0], r"returns \w+ \(8,\)"),
    "maps": (lambda z: z[:, :, None, None], r"returns \w+ \(8, 4, 1, 1\)"),
    "class numbers": (lambda z: z.argmax(1), r"returns \w+ \(8,\)"),
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
    assert "for 8 of 8 images, which count as wrong" in capsys.readouterr().err
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


# -- more of each kind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    {
        "no batch": (dict(batch_size=-1), "^batch_size: got -1"),
        "no images": (dict(n=-3), "^n: got -3"),
        "none of them": (dict(n=0), "^n: got 0"),
        "a fraction": (dict(n=2.5), "^n: got 2.5"),
        "eps of another scale": (dict(eps=8, attacks=("clean",)), r"^eps: got 8, .*8/255\?"),
        "a truth value": (dict(eps=True), "^eps: got True"),
        "a seed": (dict(seed=2**70), "^seed: got"),
        "AutoAttack of none": (dict(autoattack_n=0, attacks=("autoattack",)), "^autoattack_n: got 0"),
        "no attacks": (dict(attacks=None), "^attacks: got None"),
        "no such attack": (dict(attacks="pgd"), "^attacks: got 'pgd'.*did you mean pgd20"),
    }.values(),
)
def test_other_arguments_of_an_evaluation_are_refused(arguments, says):
    with pytest.raises(UsageError, match=says):
        fastafd.evaluate(net_of(), images_of(20), **arguments)


def images_of(count: int) -> ArraySplit:
    rng = np.random.default_rng(0)
    return ArraySplit(rng.integers(0, 256, (count, 6, 6, 3), np.uint8), np.arange(count) % 4)


def test_an_evaluation_takes_a_name_and_a_fraction():
    result = fastafd.evaluate(net_of(), images_of(20), "pgd20", eps="4/255")
    assert result["eps"] == "4/255" and "pgd20" in result and "clean" not in result
    with pytest.raises(UsageError, match=r"^test: got a split without images"):
        fastafd.evaluate(net_of(), images_of(0))


def test_an_evaluation_is_in_fp32_whatever_stands_around_it():
    kinds = set()
    net = net_of()
    net[-1].register_forward_hook(lambda layer, inputs, output: kinds.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        fastafd.evaluate(net, images_of(8), ("clean", "pgd20"))
    assert kinds == {torch.float32}


@pytest.mark.parametrize("value", [float("-inf"), float("inf"), float("nan")])
def test_logits_without_a_prediction_count_as_wrong(value, capsys):
    net = Function(lambda x: torch.full((len(x), 4), value))
    images = ArraySplit(np.zeros((8, 6, 6, 3), np.uint8), np.zeros(8, int))
    result = fastafd.evaluate(net, images, "clean")
    assert result["clean"]["correct"] == 0 and "8 of 8 images" in capsys.readouterr().err

    one = torch.tensor([value, 0.0, 0.0, 0.0])  # one infinite logit is a prediction, and so is any finite tie
    result = fastafd.evaluate(Function(lambda x: one.abs().expand(len(x), 4)), images, "clean")
    assert result["clean"]["correct"] == (0 if value != value else 8)
    assert fastafd.evaluate(Function(lambda x: x.new_zeros(len(x), 4)), images, "clean")["clean"]["correct"] == 8


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_probabilities_of_every_type_are_refused(kind):
    net = net_of()
    with pytest.raises(UsageError, match=r"^model: returns probabilities"):
        fastafd.evaluate(Function(lambda x: net(x).to(kind).softmax(1)), images_of(20), "clean")


def test_the_output_of_the_last_batch_is_checked():
    net = net_of()
    for odd, says in {
        "softmax": (lambda out: out.softmax(1), "probabilities"),
        "squeezed": (lambda out: out.squeeze(), r"returns float32 \(4,\) for 1 images"),
        "a tuple": (lambda out: (out,), "returns a tuple"),
    }.values():
        changed = Function(lambda x, odd=odd: odd(net(x)) if len(x) == 1 else net(x))
        with pytest.raises(UsageError, match=f"^model: {says}" if says[0] == "r" else says):
            fastafd.evaluate(changed, images_of(20), "clean", batch_size=19)


@pytest.mark.parametrize("entry", ["PGD", "KLPGD", "pgd20", "autoattack"])
@pytest.mark.parametrize("around", [torch.no_grad(), torch.inference_mode()])
def test_a_network_without_a_gradient_is_refused(entry, around):
    net = Function(around(net_of()))
    attacks = {"PGD": fastafd.PGD(), "KLPGD": KLPGD()}
    with pytest.raises(UsageError, match="its output has no gradient"):
        attacks[entry](net, X, Y) if entry in attacks else fastafd.evaluate(net, images_of(8), entry)


@pytest.mark.parametrize(
    "entry",
    {
        "PGD": lambda net, x: fastafd.PGD(steps=1)(net, x, Y),
        "accuracy": lambda net, x: accuracy_under(net, x, Y, None, 8, 0, Console(), "clean"),
        "AutoAttack": lambda net, x: run_autoattack(net, x, Y, 8 / 255, 8, 0, print),
    }.values(),
)
@pytest.mark.parametrize("x", [X.half(), X.double(), X[:, :1], X.repeat(1, 2, 1, 1)[:, :5]])
def test_images_that_the_network_cannot_take_are_named(entry, x):
    with pytest.raises(UsageError, match=r"^(classifier|model): fails for images float\d+ \([18], "):
        entry(net_of(), x)


def test_a_network_of_another_type_is_named():
    with pytest.raises(UsageError, match=r"^model: fails for images float32 \(20, 3, 6, 6\): .*"):
        fastafd.evaluate(net_of().half(), images_of(20), "clean")
    step = afd_step()
    step(X, Y)
    with pytest.raises(UsageError, match=r"^model: fails for images float32 \(8, 5, 6, 6\)"):
        step(X.repeat(1, 2, 1, 1)[:, :5], Y)


@pytest.mark.parametrize(
    ("x", "y", "says"),
    {
        "sparse": (X.to_sparse(), Y, "^x: got a sparse_coo float32 tensor"),
        "meta": (X.to("meta"), Y, "^x: got a meta tensor"),
        "float8": (X.to(torch.float8_e5m2), Y, "^x: got a strided float8_e5m2 tensor"),
        "no pixels": (X[..., :0], Y, r"^x: got \(8, 3, 6, 0\)"),
        "RGBA behind": (torch.rand(8, 6, 6, 4), Y, "the channels come before the rows"),
        "sparse labels": (X, Y.to_sparse(), "^y: got a sparse_coo int64 tensor"),
        "meta labels": (X, Y.to("meta"), "^y: got a meta tensor"),
    }.values(),
)
def test_tensors_without_ordinary_values_are_refused(x, y, says):
    for call in (fastafd.PGD(steps=1), lambda net, *batch: afd_step()(*batch)):
        with pytest.raises(UsageError, match=says):
            call(net_of(), x, y)


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_labels_of_every_whole_type_are_taken(kind):
    expected = accuracy_under(net_of(), X, Y, fastafd.PGD(steps=1), 8, 0, Console(), "pgd")
    assert torch.equal(accuracy_under(net_of(), X, Y.to(kind), fastafd.PGD(steps=1), 8, 0, Console(), "pgd"), expected)
    survive = Function(lambda x: x.flatten(1)[:, :4] * 0 + torch.arange(4.0))  # it is wrong for all but one class
    result = run_autoattack(survive, X[Y == 0], Y[Y == 0].to(kind), 8 / 255, 8, 0, print)
    assert result.predicted.tolist() == [3, 3]


def test_weights_made_in_inference_mode_are_named():
    with torch.inference_mode():
        net, x = net_of(), X.clone()
    for call in (
        lambda: fastafd.evaluate(net, images_of(8), "clean"),
        lambda: run_autoattack(net, X, Y, 8 / 255, 8, 0, print),
        lambda: TrainStep(net, torch.optim.SGD(net_of().parameters(), 0.1), PGDAT()),
    ):
        with pytest.raises(UsageError, match=r"^model: its weights are inference tensors"):
            call()
    with torch.inference_mode():
        step = afd_step()  # the network of a user, and a step that is made in inference mode
    assert step(x, Y)["loss"].isfinite()
    assert run_autoattack(net_of(), x[:2], Y[:2], 8 / 255, 8, 0, print).predicted.shape == (2,)


@pytest.mark.parametrize(
    ("call", "says"),
    {
        "no classifier": (lambda: fastafd.PGD()(None, X, Y), "^classifier: got a NoneType"),
        "a mode": (lambda: afd_step_with(attack_bn="foo"), "^attack_bn: got 'foo'"),
        "an average": (lambda: afd_step_with(ema_decay=2.0), "^ema_decay: got 2.0"),
        "a seed": (lambda: afd_step_with(seed=1.5), "^seed: got 1.5"),
        "no generator": (lambda: fastafd.PGD()(net_of(), X, Y, 0), "^generator: got a int"),
        "complex": (lambda: fastafd.PGD()(Function(lambda x: x.flatten(1)[:, :4] + 0j), X, Y), "returns complex64"),
        "no class": (lambda: fastafd.PGD()(Function(lambda x: x.flatten(1)[:, :0]), X, Y), r"returns float32 \(8, 0\)"),
        "huge labels": (lambda: ArraySplit(np.zeros((1, 6, 6, 3), np.uint8), np.array([2**63], np.uint64)), "^labels"),
        "negative labels": (lambda: ArraySplit(np.zeros((1, 6, 6, 3), np.uint8), np.array([-1])), "^labels: got -1"),
        "no pixels": (lambda: ArraySplit(np.zeros((1, 0, 0, 3), np.uint8), np.array([0])), "^images: got"),
    }.values(),
)
def test_other_objects_are_refused(call, says):
    with pytest.raises(UsageError, match=says):
        call()
