"""python -m fastafd.verify: a correct step passes every time, and planted faults are found in the right group."""

from __future__ import annotations

import json
import math
from unittest import mock

import pytest
import torch
from test_graphs import OnTheCPU

from benchmarks.faults import FAULTS, kernels_on_a_cpu, scaled
from benchmarks.verify_rates import certificate, far, uncompiled
from fastafd import cli, verify
from fastafd.kernels.operation import OPERATIONS
from fastafd.settings import RunError, UsageError
from fastafd.training.build import build_step
from fastafd.verification.certificate import (
    LIMITS,
    Distances,
    Limit,
    attack_rows,
    float64_rows,
    kernel_rows,
    largest,
    limits,
    middle,
    row,
    update_rows,
)
from fastafd.verification.kernel_checks import Launch, Watch, deviations, nearly_tied

SMALL = "--device cpu --batch-size 8 --comparisons 3".split()
ARGUMENTS = [*SMALL, "--arch", "resnet8_half", "--amp", "fp32"]
GROUPS = {"attack", "loss terms", "gradients", "gradients' lengths", "weights", "BatchNorm buffers", "averages"}


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["fp32", "bf16"])
def test_the_fast_step_is_verified(amp, tmp_path, capsys):
    out = tmp_path / "certificate.json"
    verify.main([*SMALL, "--amp", amp, "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["verified"] and result["amp"] == amp and result["versions"]["torch"] == torch.__version__
    assert result["arch"] == "resnet8_half" and result["recipe"] == "released" and not result["kernels"]
    groups = {row["group"] for row in result["rows"]}
    assert groups >= GROUPS | {f"float64, {group}" for group in GROUPS - {"gradients' lengths"}}
    named = {row["quantity"] for row in result["rows"]}
    assert {"mean cross-entropy", "alignment", "d2.weight", "backbone.layer3.0.bn2.running_var"} <= named
    assert all(0 <= row["fast"] <= row["limit"] for row in result["rows"])
    assert sum((row["eager"] or 0) > 0 for row in result["rows"]) > 100
    output = capsys.readouterr()
    assert "TOO FAR" not in output.out and "no kernel ran: on a CPU and without" in output.err
    assert "resnet8_half takes about two minutes" in output.err and "verified in" in output.err


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["trades", "arrest"])
def test_steps_of_other_methods_are_verified(recipe):
    assert certificate(*ARGUMENTS, "--recipe", recipe)["verified"]


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_where_it_stands(name):
    fault = FAULTS[name]
    with uncompiled(), fault.plant():
        result = certificate(*ARGUMENTS, "--recipe", fault.recipe)
    if name == "no fault, kernels":
        assert result["kernels"].keys() == {"augment", "attack_head", "linf_step", "afd_loss", "afd_gradients"}
    if fault.group:
        assert not result["verified"] and any(group.startswith(fault.group) for group in far(result)), far(result)
    else:
        assert result["verified"], far(result)


@pytest.mark.parametrize("recipe, message", [("atas", "takes one whose attack the fast engine"), ("rift", "arrest")])
def test_a_recipe_without_a_fast_attack_is_refused(recipe, message, capsys):
    with pytest.raises(UsageError, match=message):
        verify.main([*ARGUMENTS, "--recipe", recipe])


# -- steps that are launched as graphs, by a stand-in for a recording -----------------------------------------------


class Refuses(OnTheCPU):
    def _record(self, *inputs):
        raise RuntimeError("operation not permitted when stream is capturing")


class WithOldInputs(OnTheCPU):
    """A replay that does not read the new images."""

    def _record(self, *inputs):
        recorded, held, outputs = super()._record(*inputs)
        return recorded, tuple(None if v is None else v.clone() for v in held), outputs


class WithoutAverage(OnTheCPU):
    """A recording without the weight average."""

    def _record(self, *inputs):
        engine = self.step.engine
        average, engine.average = engine.average, lambda weight: None
        recorded, held, outputs = super()._record(*inputs)
        replay = recorded.replay

        def replay_without():
            engine.average = lambda weight: None
            replay()
            engine.average = average

        engine.average = average
        return type("Recorded", (), {"replay": staticmethod(replay_without)}), held, outputs


class WithALongerLoss(OnTheCPU):
    """A replay whose loss and gradients are 10 % too large."""

    def _record(self, *inputs):
        recorded, held, outputs = super()._record(*inputs)
        engine = self.step.engine

        def replay():
            with mock.patch.object(engine, "loss", lambda batch: scaled(type(engine).loss(engine, batch), 1.1)):
                recorded.replay()

        return type("Recorded", (), {"replay": staticmethod(replay)}), held, outputs


class WithOldRates(OnTheCPU):
    """A recording that keeps its first learning rates."""

    def _record(self, *inputs):
        recorded, held, outputs = super()._record(*inputs)
        first = [float(rate) for rate in self.step._rates]

        def replay():
            for rate, value in zip(self.step._rates, first):
                rate.fill_(value)
            recorded.replay()

        return type("Recorded", (), {"replay": staticmethod(replay)}), held, outputs


@pytest.mark.parametrize("amp", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "graphs, group",
    [
        (OnTheCPU, None),
        (Refuses, "graph"),
        (WithOldInputs, "graph, gradients"),
        (WithoutAverage, "graph, averages"),
        (WithALongerLoss, "graph, gradients"),
        (WithOldRates, "graph, weights"),
    ],
)
def test_a_replayed_step_is_compared_with_an_unrecorded_one(graphs, group, amp, monkeypatch):
    fast = []

    def recorded(*operands):
        step = build_step(*operands)
        if step.fast:
            fast.append(step)
            step._replay(graphs(step))
        return step

    monkeypatch.setattr(verify, "build_step", recorded)
    with uncompiled():
        result = certificate(*SMALL, "--amp", amp)
    (unreplayed,) = [row for row in result["rows"] if row["quantity"] == "steps that were not replayed"]
    _, step = fast  # the float64 step is compared without its graph
    assert step.graphs.replays == 3 - unreplayed["fast"] and len(step.graphs.recorded) == (graphs is not Refuses)
    if group is None:
        assert result["verified"] and unreplayed["fast"] == 0
        wanted = {f"graph, {name}" for name in GROUPS - {"attack", "gradients' lengths"}}
        assert wanted <= {row["group"] for row in result["rows"]}
    else:
        assert not result["verified"] and any(name.startswith(group) for name in far(result))
        assert all(name.startswith("graph") for name in far(result))


# -- what a verdict is made of --------------------------------------------------------------------------------------


def test_one_flip_does_not_decide_and_a_median_does():
    def rows(eager, fast):
        of = [Distances(), Distances()]
        for distances, values in zip(of, (eager, fast)):
            distances.of["gradients: w"], distances.slopes["gradients: w"] = values, [0.0]
        return {one["group"]: one["ok"] for one in update_rows(*of, LIMITS["fp32"])}["gradients"]

    small, flip, wrong = 1e-6, 1e-2, 0.01
    assert rows([small] * 5, [small] * 5) and rows([small] * 5, [small, flip, small, flip, small])
    assert not rows([small] * 5, [wrong] * 5)
    assert not rows([0.5] * 5, [0.5] * 5)  # an equally wrong eager step is no excuse
    assert not rows([small] * 5, [float("nan")] * 5)


@pytest.mark.parametrize("place", range(3))
def test_no_nan_is_lost(place):
    values = [1e-16, 2e-16, 3e-16]
    values[place] = float("nan")
    assert math.isnan(largest(values)) and math.isnan(middle(values))
    distances = Distances()
    distances.of["gradients: w"] = values
    attack = {"compiled augmented": 0.0, "compiled attacked": 0.0}
    assert [one["ok"] for one in float64_rows(distances, [attack])] == [True, True, False]


def test_a_limit_is_twice_eagers_and_an_allowance_below_a_ceiling():
    limit = Limit(0.01, 0.1)
    assert limit.of(0.0) == 0.01 and limit.of(0.02) == 0.05 and limit.of(1.0) == 0.1
    assert not row("group", "quantity", None, float("nan"), 1.0)["ok"]
    assert limits("fp32", torch.device("cpu")) is LIMITS["fp32"]
    assert limits("fp32", torch.device("cuda")) is LIMITS["fp16"]  # TF32, as PyTorch has it by default


def test_an_attack_that_gains_nothing_is_too_far():
    losses = {"clean": 1.0, "exact": 3.0, "eager": 3.0, "fast": 1.0}
    attack = {f"{name} loss": loss for name, loss in losses.items()}
    attack |= {f"{name} {kind}": 0.0 for name in losses for kind in ("augmented", "attacked")}
    (of_loss,) = [one for one in attack_rows([attack], LIMITS["bf16"]) if one["quantity"] == "mean cross-entropy"]
    assert of_loss["fast"] == 1.0 and not of_loss["ok"]


def test_a_gradient_without_length_is_not_relative_to_it():
    exact = {"gradients: w": torch.ones(4).double(), "gradients: zero": torch.full((4,), 1e-17).double()}
    distances = Distances()
    distances.measure({name: value + 1e-16 for name, value in exact.items()}, exact)
    assert all(max(values) < 1e-9 for values in distances.of.values())


def test_ties_of_wrong_classes_do_not_decide_over_a_kernel(monkeypatch):
    """A kernel that sums in another order may choose the other of two tied wrong classes and still be right."""
    generator = torch.Generator().manual_seed(0)
    g, t = (torch.randn(8, 16, generator=generator) for _ in range(2))
    d1, d2 = (torch.eye(16) + 0.1 * torch.randn(16, 16, generator=generator) for _ in range(2))
    w, y = torch.randn(5, 16, generator=generator), torch.zeros(8, dtype=torch.int64)
    w[2] = w[1]  # classes 1 and 2 tie
    operands = (g, t, y, d1, d2, w, None, 0.1, 0.5, 2.0, 0.1)
    operation = OPERATIONS["afd_loss"]
    wrong, *_, dz = operation.reference(*operands)[3:]
    tied = nearly_tied(operands)
    assert 0 < tied.sum() < len(tied) and (wrong[tied] == 1).all()

    def takes_the_other(*operands):
        w = operands[5].clone()
        w[2] += 1e-7 * w[2].sign()
        bias = torch.tensor([0, 0, 1e-5, 0, 0])
        return operation.reference(*operands[:5], w, bias, *operands[7:])

    results = list(takes_the_other(*operands))
    assert (results[3] != wrong).any() and float((results[6] - dz).norm()) > 0.1
    monkeypatch.setattr(operation, "fused", takes_the_other)
    by_result = deviations("afd_loss", Launch(operands, results))
    assert by_result["wrong labels"].fused == 0 and by_result["gradients of logits"].fused < 1e-3


def test_a_kernel_is_checked_at_each_of_its_shapes():
    """A form is launched for many convolutions; a fault in one of them must show."""
    watch, generator = Watch(), torch.Generator().manual_seed(0)
    shapes = [((2, 3, 8, 8), (4, 3, 3, 3)), ((2, 4, 8, 8), (4, 4, 1, 1))]
    operands = [(*(torch.randn(shape, generator=generator) for shape in pair), torch.randn(4)) for pair in shapes]

    def wrong(x, weight, bias, residual, stride, padding):
        out = OPERATIONS["conv_relu"].reference(x, weight, bias, residual, stride, padding)
        return 1.01 * out if weight.shape[2] == 1 else out

    with kernels_on_a_cpu(conv_relu=wrong), watch():
        for x, weight, bias in 2 * operands:
            torch.ops.fastafd.conv_relu(x, weight, bias, None, [1, 1], [weight.shape[2] // 2] * 2)
        kernels = {label: deviations(label, launch) for label, launch in watch.first.items()}
    assert watch.counts == {"conv_relu": 4} and list(kernels) == ["conv_relu", "conv_relu 2"]
    ok = {one["group"]: one["ok"] for one in kernel_rows([kernels])}
    assert ok == {"kernel conv_relu": True, "kernel conv_relu 2": False}


def test_help_names_the_parts(capsys):
    with pytest.raises(SystemExit):
        cli.run(verify.main, ["--help"])
    assert "--recipe" in capsys.readouterr().out


def test_the_certificate_is_written_where_something_is_too_far(tmp_path):
    out = tmp_path / "certificate.json"
    with (
        uncompiled(),
        FAULTS["the attack stands still"].plant(),
        pytest.raises(RunError, match="too far, first float64"),
    ):
        verify.main([*ARGUMENTS, "--out", str(out)])
    assert not json.loads(out.read_text())["verified"]
