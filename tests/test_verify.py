"""python -m fastafd.verify: the fast step is held to float64, and one that is wrong is found out."""

from __future__ import annotations

import json

import pytest
import torch

from fastafd import verify
from fastafd.engine import Fast
from fastafd.methods import Loss
from fastafd.settings import RunError

ARGUMENTS = "--arch resnet8_half --device cpu --amp fp32 --batch-size 8 --comparisons 3".split()


@pytest.mark.slow
def test_the_fast_step_is_verified(tmp_path, capsys):
    out = tmp_path / "certificate.json"
    verify.main([*ARGUMENTS, "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["verified"] and found["amp"] == "fp32" and found["versions"]["torch"] == torch.__version__
    groups = {row["group"] for row in found["rows"]}
    assert groups == {"attack", "loss terms", "gradients", "weights", "BatchNorm buffers", "averages"}
    named = {row["quantity"] for row in found["rows"]}
    assert {"mean cross-entropy", "alignment", "d2.weight", "backbone.layer3.0.bn2.running_var"} <= named
    assert all(0 <= row["fast"] <= row["limit"] for row in found["rows"])
    assert sum(row["eager"] > 0 for row in found["rows"]) > 100
    assert "TOO FAR" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "part, group",
    [("loss", "gradients"), ("perturb", "attack"), ("average", "averages")],
)
def test_a_wrong_part_is_found_out(part, group, tmp_path, monkeypatch):
    """A thousandth too much of a loss, an attack that stands still, an average that moves a little too far."""
    monkeypatch.setattr(Fast, "__init__", plain_init)
    for name in ("teacher_features", "perturb", "loss", "average", "f1"):
        monkeypatch.setattr(Fast, name, lambda self, *of, name=name: getattr(self.reference, name)(*of))
    wrong = {
        "loss": lambda self, *of: scaled(self.reference.loss(*of)),
        "perturb": lambda self, x, noise, y: x,
        "average": lambda self, weight: self.reference.average(1.001 * weight),
    }
    monkeypatch.setattr(Fast, part, wrong[part])
    out = tmp_path / "certificate.json"
    with pytest.raises(RunError, match="too far"):
        verify.main([*ARGUMENTS, "--out", str(out)])
    found = json.loads(out.read_text())
    assert not found["verified"] and group in {row["group"] for row in found["rows"] if not row["ok"]}


def plain_init(self, model, method, teacher, attack, ema, amp, console):
    from fastafd.engine import Reference

    self.reference = Reference(model, method, teacher, attack, "eval", ema, amp)


def scaled(loss: Loss) -> Loss:
    return Loss(1.001 * loss.total, loss.terms, loss.logits)
