"""The benchmark that times convolutions one by one."""

from __future__ import annotations

import json
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT


@pytest.fixture
def convolutions(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import convolutions

    return convolutions


@pytest.mark.parametrize("arch, gflop, width", [("resnet18", 1.1108, 512), ("wrn34_10", 13.318, 640)])
def test_shapes_are_all_the_flops_but_those_of_the_last_layer(convolutions, arch, gflop, width):
    """The FLOPs of whole networks for one image equal those of PyTorch's FlopCounterMode."""
    flops = sum(count * shape.flops(1) for shape, count in convolutions.shapes(arch).items())
    assert flops + 2 * width * 10 == pytest.approx(gflop * 1e9, rel=5e-5)


def test_shapes_of_resnet18(convolutions):
    counts = convolutions.shapes("resnet18")
    assert counts.total() == 20 and counts[convolutions.Shape(64, 32, 64, 3, 1)] == 4
    stem = convolutions.Shape(3, 32, 64, 3, 1)
    assert next(iter(counts)) == stem and stem.numbers(1) == 3 * 1024 + 64 * 1024 + 64 * 27


@pytest.mark.parametrize("kernel", [1, 3])
def test_input_gradient_as_a_forward_convolution(convolutions, kernel):
    shape = convolutions.Shape(5, 8, 7, kernel, 1)
    drawn = convolutions.draw(shape, 2, torch.device("cpu"), torch.float64)
    function, names = convolutions.shape_forms(shape, cuda=False, templates=False)["dgrad as forward"]
    x = drawn["x"].requires_grad_()
    (expected,) = torch.autograd.grad(F.conv2d(x, drawn["w"], padding=kernel // 2), x, drawn["g"])
    torch.testing.assert_close(function(*(drawn[name] for name in names.split())), expected, rtol=1e-12, atol=1e-12)


def test_every_form_is_the_operation_it_stands_for(convolutions):
    """In float64 compared with autograd, with a stride and with padding."""
    for shape in (
        convolutions.Shape(3, 8, 4, 3, 1),
        convolutions.Shape(4, 8, 6, 3, 2),
        convolutions.Shape(4, 8, 6, 1, 2),
    ):
        drawn = convolutions.draw(shape, 2, torch.device("cpu"), torch.float64)
        x, w = drawn["x"].clone().requires_grad_(), drawn["w"].clone().requires_grad_()
        out = F.conv2d(x, w, None, shape.stride, shape.kernel // 2)
        dx, dw = torch.autograd.grad(out, (x, w), drawn["g"])
        expected = {"forward": out, "dgrad": dx, "wgrad": dw, "bias, ReLU": (out + drawn["b"][:, None, None]).relu()}
        forms = convolutions.shape_forms(shape, cuda=False, templates=False)
        assert ("forward of 8" in forms) == (shape.c_in == 3) and "dgrad as forward" in forms
        for form, (function, names) in forms.items():
            if form == "compiled":
                continue
            got = function(*(drawn[name] for name in names.split()))
            assert convolutions.distance(got, expected[convolutions.SAME.get(form, form)]) < 1e-12, form


def test_table_names_what_failed_and_adds_up(convolutions, monkeypatch, tmp_path, capsys):
    """A run in which some forms raise an error or compute something else."""
    whole = convolutions.shape_forms

    def some(shape, cuda, templates):
        forms = whole(shape, cuda, templates)
        forms["compiled"] = forms["bias, ReLU"]
        forms["cuDNN fused"] = lambda x, w, b: torch.ops.aten.cudnn_convolution_relu(x, w, b, [1], [1], [1], 1), "x w b"
        forms["Triton template"] = lambda x, w, b: forms["bias, ReLU"][0](x, 1.1 * w, b), "x w b"
        return forms

    monkeypatch.setattr(convolutions, "shape_forms", some)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # put back: main sets it
    monkeypatch.setattr(convolutions, "limits", lambda device, dtype, rounds: (1e12, "a product", 1e10))
    out = tmp_path / "found.json"
    small = ["--arch", "resnet8_half", "--device", "cpu", "--batch", "2", "--rounds", "1", "--out", str(out)]
    assert convolutions.main(small) == 0
    result = json.loads(out.read_text())
    assert (
        f"{convolutions.convolutions_note(result)}\n\n{convolutions.convolutions_table(result['rows'])}\n"
        in capsys.readouterr().out
    )
    assert sum(row["count"] for row in result["rows"]) == 9
    for row in result["rows"]:
        assert set(row["failed"]) == {"cuDNN fused", "Triton template"}
        assert row["failed"]["cuDNN fused"].startswith("NotImplementedError: Could not run")
        assert re.match(r"ArithmeticError: off by \d+\.\d% of the norm of bias, ReLU", row["failed"]["Triton template"])
        shape = convolutions.Shape(*(row[name] for name in ("c_in", "side", "c_out", "kernel", "stride")))
        limit = max(shape.flops(2) / 1e12, 4 * shape.numbers(2) / 1e10)
        assert row["roofline_us"] == pytest.approx(1e6 * limit, abs=0.01)
        assert row["tflops"]["forward"] == pytest.approx(row["gflop"] / row["us"]["forward"] / 1e-3, abs=1e-4)
    lines = convolutions.convolutions_table(result["rows"]).splitlines()
    assert len({line.count("|") for line in lines[:10]}) == 1 and all(line.count(" no ") == 2 for line in lines[2:10])
    limit = sum(row["count"] * row["roofline_us"] for row in result["rows"])
    spent = sum(row["count"] * row["us"]["dgrad"] for row in result["rows"])
    assert f"dgrad {spent:.0f} us ({limit / spent:.0%} of the limit)" in lines[-1]
