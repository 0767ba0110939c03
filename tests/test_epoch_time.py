"""Epoch times: the plain forms compute the same results, FLOPs are counted, rows and tables add up."""

from __future__ import annotations

import json
import statistics
import sys

import pytest
import torch
from conftest import ROOT

from fastafd import kernels
from fastafd.models import build_model


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def test_plain_operations_are_those_of_the_kernels():
    from benchmarks import plain

    torch.manual_seed(0)
    g, t = (torch.randn(6, 20, dtype=torch.float64, requires_grad=True) for _ in range(2))
    d1, d2 = (torch.randn(20, 20, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 20), (5,)))
    y = torch.randint(0, 5, (6,))
    weights = {"alpha": 0.3, "beta": 0.7, "gamma": 2.0}
    total, _, wrong = plain.afd_loss(g, t.detach(), y, d1, d2, w, b, **weights)
    ours = kernels.afd_loss(g, t, y, d1, d2, w, b, **weights)
    # the plain form rounds logits and cosines to fp32
    torch.testing.assert_close(total.double(), ours.total, rtol=1e-5, atol=1e-5)
    assert torch.equal(wrong, ours.wrong_labels)
    leaves = (g, d1, d2, w, b)
    for a, e in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(ours.total, leaves), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)

    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    offsets, flips = torch.randint(0, 5, (4, 2)), torch.tensor([True, False, True, False])
    x = plain.augment(images, offsets, flips, 2)
    torch.testing.assert_close(x, kernels.augment(images, offsets, flips, 2))
    x_adv, grad = x + 0.05 * torch.randn_like(x), torch.randn_like(x)
    stepped = plain.linf_step(x_adv, grad, x, 0.03, 0.007)
    assert torch.equal(stepped, kernels.linf_step(x_adv, grad, x, 0.03, 0.007))


@pytest.mark.parametrize("form", [{}, {"naive": True}, {"layout": torch.channels_last, "amp": torch.bfloat16}])
@pytest.mark.parametrize("task", ["afd", "natural"])
def test_plain_steps_train(task, form):
    from benchmarks.forms import plain_step, random_batches

    torch.manual_seed(0)
    net = build_model("resnet8_half", 10)
    step = plain_step(net, task, **form)
    (batch,) = random_batches(4, 1, torch.device("cpu"))
    x = torch.rand(4, 3, 32, 32)
    if task == "afd":
        x_adv = step.attacked(x, batch[1])
        assert (x_adv - x).abs().max() <= 8 / 255 + 1e-6 and not torch.equal(x_adv, x)
    before = step.model.classifier.weight.clone()
    assert bool(step(*batch).isfinite()) and not torch.equal(before, step.model.classifier.weight)


@pytest.mark.parametrize("arch, forward", [("resnet18", 1.1108), ("wrn34_10", 13.318)])
def test_an_afd_step_is_24_forward_passes(arch, forward):
    """GFLOP an image: ten forwards and input gradients, the teacher, forward and backward; heads are 0.05 per cent."""
    from benchmarks.forms import counted_flops

    assert counted_flops(arch, "afd") / 1e9 == pytest.approx(24 * forward, rel=1e-3)
    assert counted_flops(arch, "natural") / 1e9 == pytest.approx(3 * forward, rel=2e-3)


def test_rows_and_table():
    from benchmarks import epoch_tables, epoch_time

    measured = {"first_call_s": 1.0, "peak_bytes": 2**30}
    forms = {"paper-style": {"step_s": [0.2, 0.4]}, "fast": {"step_s": [0.1, 0.2]}}
    samples = {name: measured | steps for name, steps in forms.items()}
    paper, fast = epoch_time.rows_of("resnet18", "natural", samples, 128, peak=1e15)
    assert paper["epoch_s"] == pytest.approx(0.3 * 390) and fast["times_paper_style"] == pytest.approx(2.0)
    assert fast["images_s"] == pytest.approx(128 / 0.15)
    lines = epoch_tables.epoch_table(
        {"rows": [paper, fast], "whole": [], "device": "NVIDIA H100 80GB HBM3", "peak_tflops": 1000.0}
    ).splitlines()
    assert lines[0].count("|") == lines[3].count("|") and "| fast | 58.50 | 39.00 to 78.00 | 2.00 |" in lines[3]
    assert any("Table 5" in line and "| 46 |" in line for line in lines) and any("roofline" in line for line in lines)


def test_totals_begin_with_what_a_method_begins_with():
    """With the paper's seconds of an epoch, the totals are the paper's, up to its rounding."""
    from benchmarks import epoch_tables, epoch_time
    from benchmarks.forms import METHODS
    from fastafd.reporting.paper import TABLE5

    assert {label: config.sgd.epochs for label, config in METHODS.items()} == {
        label: epochs for label, (epochs, _, _) in TABLE5.items()
    }
    passes = {label: 8 if label == "Free-AT" else 1 for label in TABLE5}
    samples = {label: {"step_s": [epoch / 390 / passes[label]] * 3} for label, (_, epoch, _) in TABLE5.items()}
    rows = epoch_time.method_rows("resnet18", samples, dict.fromkeys(TABLE5, "fast"), 128)
    assert [row["method"] for row in rows] == list(TABLE5)
    for row, (_, epoch, total) in zip(rows, TABLE5.values(), strict=True):
        assert row["epoch_s"] == pytest.approx(epoch) == row["fastest_s"] == row["slowest_s"]
        assert row["total_s"] == pytest.approx(total, rel=0.02)
    lines = epoch_tables.methods_table({"methods": rows}).splitlines()
    assert lines[-1] == "| resnet18 | AFD | fast | 20 | 46.00 | 46.00 to 46.00 | 1520 | 46 | 1510 |"
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 + 11


def test_a_rehearsal_of_all_methods(monkeypatch, capsys, tmp_path):
    """The fast engine's parts run uncompiled: compiling seven steps takes minutes on a CPU."""
    from benchmarks import epoch_tables, epoch_time
    from benchmarks.forms import METHODS
    from fastafd.reporting.paper import TABLE5

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    words = ["--tiny", "--tasks", "--methods", "--device", "cpu", "--out", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", ["epoch_time", *words])
    assert epoch_time.main() == 0
    result = json.loads((tmp_path / "found.json").read_text())
    rows = {row["method"]: row for row in result["methods"]}
    assert list(rows) == list(TABLE5) and result["rows"] == []
    for label, row in rows.items():
        config = METHODS[label]
        assert row["arch"] == "resnet8_half" and (row["recipe"], row["epochs"]) == (config.recipe, config.sgd.epochs)
        assert row["engine"] == ("reference" if config.method.only_reference else "fast")
        steps = 50_000 // 8 * (8 if label == "Free-AT" else 1)
        assert len(row["step_s"]) == 2 and row["epoch_s"] == pytest.approx(steps * statistics.median(row["step_s"]))
        before = {"scratch": 0.0, "natural": rows["Standard"]["total_s"], "robust": rows["PGD-AT"]["total_s"]}
        assert row["total_s"] == pytest.approx(row["epochs"] * row["epoch_s"] + before[config.method.begins])
    assert {label for label, row in rows.items() if row["engine"] == "reference"} == {"Free-AT", "FGSM-GA", "ATAS"}
    output = capsys.readouterr().out
    assert output.index(epoch_tables.methods_table(result)) == 0  # without tasks there is no table of them
    assert epoch_tables.epoch_note(result) in output and "Methods: " in epoch_tables.epoch_note(result)


def test_steps_of_methods_are_those_of_their_runs(monkeypatch):
    """What each step trains and starts from.

    One module for RiFT, ATAS after its warm-up, teachers, averages, attacks.
    """
    from benchmarks.forms import METHODS, method_step
    from fastafd.data import Loader

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    torch.manual_seed(0)
    net, loader = build_model("resnet18", 10), Loader(16, 8, 0, True, torch.device("cpu"))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    steps = {label: method_step(net, config, loader, "fp32") for label, config in METHODS.items()}
    tuned = [name for name, weight in steps["RiFT"].model.named_parameters() if weight.requires_grad]
    assert tuned == ["layer2.1.conv2.weight"] and all(weight.requires_grad for weight in net.parameters())
    assert steps["ATAS"].steps == 5 * len(loader) and steps["ARREST"].loader is loader
    assert {label for label, step in steps.items() if step.has_teacher} == {"vAFT", "AFKD", "ARREST", "AFD"}
    assert [label for label, step in steps.items() if step.ema is not None] == ["AFD"]
    climbing = {label for label, step in steps.items() if step.attack is not None}
    assert climbing == {"PGD-AT", "TRADES", "vAFT", "AFKD", "ARREST", "AFD"}
    assert all(step.attack == METHODS[label].attack for label, step in steps.items() if label in climbing)
    weights = [id(next(step.model.parameters())) for step in steps.values()]
    assert len({*weights, id(next(net.parameters()))}) == 12
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_profile_adds_up():
    from benchmarks import profile_step

    rows = profile_step.rows_of("reference", "resnet8_half", 2, torch.device("cpu"))
    assert sum(row["share"] for row in rows) == pytest.approx(1.0) and rows[0]["ms"] == max(row["ms"] for row in rows)
    assert any("convolution" in row["name"] for row in rows)
    assert profile_step.profile_table(rows).splitlines()[-1].startswith(f"| reference | all {len(rows)} |")


def test_a_form_without_a_kernel_does_not_call_it(monkeypatch):
    from benchmarks import forms

    module, _ = forms.INSTEAD["linf_step"]
    ours = module.linf_step
    seen = []
    step = forms.without("linf_step", lambda x, y: seen.append(module.linf_step))
    step(torch.zeros(1), torch.zeros(1))
    assert seen == [forms.INSTEAD["linf_step"][1]] and module.linf_step is ours
