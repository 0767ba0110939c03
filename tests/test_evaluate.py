"""Evaluation: what is counted, and AutoAttack through the library's traps."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import verb
from torch import nn

import fastafd
from fastafd.attacks import KLPGD, PGD
from fastafd.checkpoint import save_model
from fastafd.console import Console
from fastafd.data import ArraySplit, load_dataset, to_unit
from fastafd.evaluation import ATTACKS, evaluate, measurements, pgd20, run_autoattack
from fastafd.kernels import linf_step
from fastafd.models import build_model, split
from fastafd.samples import save_samples
from fastafd.training.natural import example_weights
from fastafd.training.rift import choose_mixture

main = verb("evaluate")["main"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return load_dataset("digits", tmp_path_factory.mktemp("none"))


@pytest.fixture(scope="module")
def classifier(digits):
    """A linear-ish classifier of digits, trained for a moment: accurate, and weak under attack."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10))
    x, y = to_unit(torch.from_numpy(digits.train.images())), torch.from_numpy(digits.train.labels)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


def test_counts_are_those_of_a_plain_loop(classifier, digits):
    result = evaluate(
        classifier, digits.test, ("clean", "pgd20"), n=50, autoattack_n=0, batch_size=16, console=Console()
    )
    indices = np.array(result["clean"]["indices"])
    assert result["pgd20"]["indices"] == indices.tolist() and len(indices) == 50
    assert np.bincount(digits.test.labels[indices]).tolist() == [5] * 10
    x, y = to_unit(torch.from_numpy(digits.test.images(indices))), torch.from_numpy(digits.test.labels[indices])
    assert result["clean"]["correct"] == int((classifier(x).argmax(1) == y).sum())
    generator, correct = torch.Generator().manual_seed(0), 0
    for first in range(0, 50, 16):
        images = x[first : first + 16].contiguous(memory_format=torch.channels_last)
        x_adv = pgd20()(classifier, images, y[first : first + 16], generator)
        correct += int((classifier(x_adv).argmax(1) == y[first : first + 16]).sum())
    assert result["pgd20"]["correct"] == correct
    assert result["pgd20"]["accuracy"] == correct / 50 < result["clean"]["accuracy"]
    assert (attack := pgd20()) == PGD(8 / 255, 0.003, 20, True) and attack.step_size == 0.003


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """The namespaces of the operations that run."""

    def __init__(self):
        super().__init__()
        self.namespaces = set()

    def __torch_dispatch__(self, function, types, operands=(), named=None):
        self.namespaces.add(function.namespace)
        return function(*operands, **(named or {}))


@pytest.mark.parametrize("what", ["evaluation", "samples", "choice of RiFT", "PGD", "KLPGD"])
def test_no_kernel_of_fastafd_runs(what, classifier, digits, tmp_path):
    """Reported robustness must not depend on a fast path: plain PyTorch alone, whatever the device."""
    x, y = to_unit(torch.from_numpy(digits.test.images(np.arange(8)))), torch.from_numpy(digits.test.labels[:8])
    held = ArraySplit(digits.test.images(np.arange(8)), digits.test.labels[:8])
    run = {
        "evaluation": lambda: evaluate(classifier, digits.test, ATTACKS, n=8, autoattack_n=2, console=Console()),
        "samples": lambda: save_samples(tmp_path / "samples.npz", split(classifier), digits.test, 8, 0, 8 / 255),
        "choice of RiFT": lambda: choose_mixture(classifier, classifier, held, PGD(steps=2), 0.1, 0, Console()),
        "PGD": lambda: PGD(steps=2)(classifier, x, y),
        "KLPGD": lambda: KLPGD(steps=2)(classifier, x, y),
    }[what]
    with Operations() as operations:
        run()
    assert operations.namespaces <= {"aten", "prim", "profiler"} and "aten" in operations.namespaces
    with Operations() as operations:  # which sees a kernel where there is one
        linf_step(x.clone(), x, x, 0.1, 0.1)
    assert "fastafd" in operations.namespaces


@pytest.mark.parametrize(
    "model, wrong",
    [
        ("classifier", False),
        ("masked", True),  # no gradient reaches the image
        ("saturated", True),  # in fp32 the loss is 0 whatever the pixels
    ],
)
def test_an_attack_that_raises_no_loss_is_named(model, wrong, classifier, digits, capsys):
    net = {
        "classifier": classifier,
        "masked": nn.Sequential(Rounded(), classifier),
        "saturated": nn.Sequential(classifier, Scaled(1e6)),
    }[model]
    predicted = classifier(to_unit(torch.from_numpy(digits.test.images()))).argmax(1).numpy()
    kept = np.flatnonzero(predicted == digits.test.labels)
    test = ArraySplit(digits.test.images(kept), digits.test.labels[kept])
    result = evaluate(net, test, ("clean", "pgd20"), n=40, autoattack_n=0, console=Console())
    warned = "the attack has not raised the mean loss" in capsys.readouterr().err
    assert warned == wrong == ("warnings" in result["pgd20"]) and "warnings" not in result["clean"]


def test_autoattack_that_breaks_nothing_is_named(classifier, digits, capsys, monkeypatch):
    from fastafd.evaluation import AutoAttackResult

    def breaks_nothing(model, x, y, *_):
        return AutoAttackResult(x.clone(), model(x).argmax(1), {}, [])

    monkeypatch.setattr(measurements, "run_autoattack", breaks_nothing)
    result = evaluate(classifier, digits.test, ("autoattack",), n=8, autoattack_n=8, console=Console())
    assert "AutoAttack has changed no image" in result["autoattack"]["warnings"][0]
    assert "AutoAttack has changed no image" in capsys.readouterr().err


class Rounded(nn.Module):
    def forward(self, x):
        return x.round()


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, z):
        return self.factor * z


def test_whole_split_needs_no_indices(classifier, digits):
    result = evaluate(classifier, digits.test, ("clean",), n=None, autoattack_n=0, console=Console())
    assert result["clean"]["n"] == len(digits.test) and "indices" not in result["clean"]


@pytest.mark.slow
def test_autoattack_is_the_worst_case_and_leaves_the_generators_alone(classifier, digits, capsys):
    before = torch.get_rng_state()
    result = evaluate(classifier, digits.test, ATTACKS, n=12, autoattack_n=10, console=Console())
    assert torch.equal(before, torch.get_rng_state())
    measured = result["autoattack"]
    assert measured["version"] == "standard" and measured["accuracy"] <= result["pgd20"]["accuracy"]
    assert next(iter(measured["accuracy_after"])) == "apgd-ce"
    assert measured["accuracy"] == pytest.approx(list(measured["accuracy_after"].values())[-1], abs=1e-4)
    assert "robust accuracy after" in capsys.readouterr().err


def test_autoattack_with_fewer_classes_than_its_targets(digits):
    """Six classes have five wrong ones, not nine."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 6)).eval()
    x = to_unit(torch.from_numpy(digits.test.images(np.arange(4))))
    with torch.no_grad():
        y = net(x).argmax(1)
    result = run_autoattack(net, x, y, 1e-4, 4, 0, print)
    assert result.predicted.shape == (4,) and set(result.accuracy_after) == {"apgd-ce", "apgd-t", "fab-t", "square"}
    with pytest.raises(fastafd.settings.UsageError, match="4 classes"):
        run_autoattack(nn.Sequential(nn.Flatten(), nn.Linear(3072, 3)), x, y % 3, 1e-4, 4, 0, print)


def test_command_on_a_run_like_file(tmp_path, capsys):
    torch.manual_seed(0)
    net = build_model("resnet8", 10)
    about = {"arch": "resnet8", "num_classes": 10, "normalize": "none", "image_size": 32}
    save_model(tmp_path / "model.safetensors", net, about)
    argv = [str(tmp_path / "model.safetensors"), "--dataset", "digits", "--attack", "clean", "--n", "30"]
    main(argv)
    assert "clean" in capsys.readouterr().out
    main([*argv, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["clean"]["n"] == 30 and len(result["clean"]["indices"]) == 30
    assert {"device", "versions", "date", "seed", "eps", "dataset"} <= set(result)


# -- a real, naturally trained network ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_shipped_resnet18_on_real_images(cifar10_tree, capsys):
    """pyautoattack's example is a natural CIFAR-10 ResNet-18: right on clean images, helpless under PGD-20."""
    argv = ["--arch", "resnet18", "--weights", str(example_weights()), "--dataset", "cifar10", "--json"]
    argv += ["--data-dir", str(cifar10_tree)]
    main([*argv, "--attack", "clean", "--n", "200"])
    clean = json.loads(capsys.readouterr().out)["clean"]
    assert clean["accuracy"] > 0.88  # 93.9 % of 1,000: benchmarks/results/small-resnet18-natural.json
    main([*argv, "--attack", "pgd20", "--n", "20"])
    assert json.loads(capsys.readouterr().out)["pgd20"]["correct"] == 0
