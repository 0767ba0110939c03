"""The suite for a first session on a GPU: its budget, its parts, and the convolutions that it measures."""

from __future__ import annotations

import json
import re
import sys
import time
from argparse import ArgumentTypeError
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import gpu_suite

    return gpu_suite


@pytest.fixture
def convolutions(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import convolutions

    return convolutions


# -- the suite ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [("9m", 540), ("540s", 540), ("540", 540), ("1.5m", 90)])
def test_budget(suite, text, expected):
    assert suite.seconds(text) == expected


@pytest.mark.parametrize("text", ["", "m", "0", "0m", "-5", "9 m", "9h", "1m30s", "nan"])
def test_budget_mistakes(suite, text, tmp_path, capsys):
    with pytest.raises(ArgumentTypeError, match=f"got {text!r}, takes"):
        suite.seconds(text)
    with pytest.raises(SystemExit, match="2"):
        suite.main([f"--budget={text}", "--out", str(tmp_path)])
    assert f"--budget: got {text!r}, takes minutes or seconds" in capsys.readouterr().err


def test_a_folder_with_something_in_it_is_refused(suite, tmp_path, capsys):
    (tmp_path / "verify.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        suite.main(["--budget", "9m", "--out", str(tmp_path)])
    assert "is not empty" in capsys.readouterr().err


def script(suite, name, code, cap=60.0, left_out=""):
    return suite.Part(name, [sys.executable, "-c", code], cap, left_out)


def running(pid: int) -> bool:
    """Whether the process is there, and not merely its exit code."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_part_out_of_time_is_ended_with_its_children_and_the_next_one_runs(suite, tmp_path, capsys):
    child = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '600']); print('child', p.pid); time.sleep(600)"
    )
    chosen = [
        script(suite, "slow", child, cap=2),
        script(suite, "wrong", "import sys; print('\\33[31mno such kernel\\33[0m\\n\\n----'); sys.exit(3)"),
        script(suite, "right", "print('5 passed\\nall of it in x.json\\nW1122 03:51:22.2 1 x.py:1] a warning')"),
        script(suite, "not here", "raise SystemExit(1)", left_out="takes minutes"),
    ]
    began = time.monotonic()
    assert suite.run(chosen, 100, tmp_path) == 1
    assert time.monotonic() - began < 30
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = {row["part"]: (row["result"], row["line"]) for row in summary["rows"]}
    pid = re.fullmatch(r"child (\d+)", found.pop("slow")[1])[1]
    assert not running(int(pid))
    assert found == {
        "wrong": ("failed", "no such kernel"),
        "right": ("ok", "5 passed"),
        "not here": ("left out", "takes minutes"),
    }
    assert summary["rows"][0]["result"] == "out of time" and 2 <= summary["rows"][0]["seconds"] < 20
    assert summary["versions"]["torch"] == torch.__version__ and {"device", "date"} <= set(summary)
    assert capsys.readouterr().out.endswith(suite.table(summary["rows"]) + "\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs.txt", "summary.json"]
    logs = (tmp_path / "logs.txt").read_text()
    assert re.findall("^==== (.*) ====$", logs, re.MULTILINE) == ["slow", "wrong", "right"]


def test_logs_are_cut_to_their_ends(suite, tmp_path):
    assert suite.run([script(suite, "loud", "print('x' * 10**6 + 'the end')")], 60, tmp_path) == 0
    logs = (tmp_path / "logs.txt").read_text()
    assert len(logs) < 210_000 and logs.rstrip().endswith("xthe end")
    assert logs.startswith("==== loud, its last 204800 of 1000008 bytes ====\n")


def test_with_the_budget_spent_the_rest_is_left_out(suite, tmp_path):
    chosen = [script(suite, "long", "import time; time.sleep(600)"), script(suite, "late", "raise SystemExit(1)")]
    assert suite.run(chosen, suite.LEAST + 1, tmp_path) == 1
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert [(row["result"], row["line"]) for row in rows] == [("out of time", ""), ("left out", "no time left")]


@pytest.mark.parametrize("tiny", [False, True])
def test_parts_are_there_and_leave_few_files(suite, tiny, tmp_path):
    chosen = suite.parts(tmp_path, "cpu" if tiny else "auto", tiny)
    assert [part.name for part in chosen] == [
        *("tests", "numerics", "verify", "epoch-resnet18"),
        *("profile", "kernels", "epoch", "convolutions"),
    ]
    assert [part.name for part in chosen if part.left_out] == (
        ["numerics", "profile", "kernels", "epoch"] if tiny else []
    )
    outputs = [part.command[part.command.index("--out") + 1] for part in chosen if "--out" in part.command]
    assert all(Path(path).parent == tmp_path for path in outputs)
    assert len({*outputs, "logs.txt", "summary.json"}) <= 8
    for part in chosen:
        assert part.command[:2] == [sys.executable, "-m"] and find_spec(part.command[2])
        for argument in part.command[3:]:
            assert not argument.endswith(".py") or (ROOT / argument).exists()


# -- the convolutions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch, gflop, width", [("resnet18", 1.1108, 512), ("wrn34_10", 13.318, 640)])
def test_shapes_are_all_the_flops_but_those_of_the_last_layer(convolutions, arch, gflop, width):
    """Figures of the whole networks, for one image, as PyTorch's FlopCounterMode counts them."""
    flops = sum(count * shape.flops(1) for shape, count in convolutions.shapes(arch).items())
    assert flops + 2 * width * 10 == pytest.approx(gflop * 1e9, rel=5e-5)


def test_shapes_of_resnet18(convolutions):
    found = convolutions.shapes("resnet18")
    assert found.total() == 20 and found[convolutions.Shape(64, 32, 64, 3, 1)] == 4
    stem = convolutions.Shape(3, 32, 64, 3, 1)
    assert next(iter(found)) == stem and stem.numbers(1) == 3 * 1024 + 64 * 1024 + 64 * 27


@pytest.mark.parametrize("kernel", [1, 3])
def test_input_gradient_as_a_forward_convolution(convolutions, kernel):
    shape = convolutions.Shape(5, 8, 7, kernel, 1)
    drawn = convolutions.draw(shape, 2, torch.device("cpu"), torch.float64)
    function, names = convolutions.forms(shape, cuda=False, templates=False)["dgrad as forward"]
    x = drawn["x"].requires_grad_()
    (expected,) = torch.autograd.grad(F.conv2d(x, drawn["w"], padding=kernel // 2), x, drawn["g"])
    torch.testing.assert_close(function(*(drawn[name] for name in names.split())), expected, rtol=1e-12, atol=1e-12)


def test_every_form_is_the_operation_it_stands_for(convolutions):
    """In float64 against autograd; with a stride, and with the stem's padding."""
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
        found = convolutions.forms(shape, cuda=False, templates=False)
        assert ("forward of 8" in found) == (shape.c_in == 3) and ("dgrad as forward" in found) == (shape.stride == 1)
        for form, (function, names) in found.items():
            if form == "compiled":
                continue
            got = function(*(drawn[name] for name in names.split()))
            assert convolutions.distance(got, expected[convolutions.SAME.get(form, form)]) < 1e-12, form


def test_table_names_what_failed_and_adds_up(convolutions, monkeypatch, tmp_path, capsys):
    """A run with forms that raise or compute something else, in the place of those of a GPU."""
    whole = convolutions.forms

    def some(shape, cuda, templates):
        found = whole(shape, cuda, templates)
        found["compiled"] = found["bias, ReLU"]
        found["cuDNN fused"] = lambda x, w, b: torch.ops.aten.cudnn_convolution_relu(x, w, b, [1], [1], [1], 1), "x w b"
        found["Triton template"] = lambda x, w, b: found["bias, ReLU"][0](x, 1.1 * w, b), "x w b"
        return found

    monkeypatch.setattr(convolutions, "forms", some)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # put back: main sets it
    monkeypatch.setattr(convolutions, "limits", lambda device, dtype, rounds: (1e12, 1e10))
    out = tmp_path / "found.json"
    small = ["--arch", "resnet8_half", "--device", "cpu", "--batch", "2", "--rounds", "1", "--out", str(out)]
    assert convolutions.main(small) == 0
    found = json.loads(out.read_text())
    assert f"{convolutions.about(found)}\n\n{convolutions.table(found['rows'])}\n" in capsys.readouterr().out
    assert sum(row["count"] for row in found["rows"]) == 9
    for row in found["rows"]:
        assert set(row["failed"]) == {"cuDNN fused", "Triton template"}
        assert row["failed"]["cuDNN fused"].startswith("NotImplementedError: Could not run")
        assert re.match(r"ArithmeticError: off by \d+\.\d% of the norm of bias, ReLU", row["failed"]["Triton template"])
        shape = convolutions.Shape(*(row[name] for name in ("c_in", "side", "c_out", "kernel", "stride")))
        limit = max(shape.flops(2) / 1e12, 4 * shape.numbers(2) / 1e10)
        assert row["roofline_us"] == pytest.approx(1e6 * limit, abs=0.01)
        assert row["tflops"]["forward"] == pytest.approx(row["gflop"] / row["us"]["forward"] / 1e-3, abs=1e-4)
    lines = convolutions.table(found["rows"]).splitlines()
    assert len({line.count("|") for line in lines[:10]}) == 1 and all(line.count(" no ") == 2 for line in lines[2:10])
    limit = sum(row["count"] * row["roofline_us"] for row in found["rows"])
    spent = sum(row["count"] * row["us"]["dgrad"] for row in found["rows"])
    assert f"dgrad {spent:.0f} us ({limit / spent:.0%} of the limit)" in lines[-1]
