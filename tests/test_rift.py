"""RiFT: criticality, fine-tuning of one module and mixing, compared with transcriptions; the held-out images."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transcriptions
from float64 import BATCH, assert_same, batches, small_net

from fastafd.attacks import PGD
from fastafd.console import Console
from fastafd.data import ArraySplit
from fastafd.recipes import find_recipe
from fastafd.training.optim import make_sgd
from fastafd.training.rift import choose_mixture, criticality, hold_out, mix
from fastafd.training.step import TrainStep


def test_criticality_is_its_transcription():
    net = small_net().eval()
    x, y = batches(1)[0]
    for radius in (0.1, 1e-3):  # a ball that does not limit the weight, and one that does
        ours = criticality(net, x, y, radius=radius, climbs=4, batch_size=BATCH, console=Console())
        literal = transcriptions.rift_criticality(net, x, y, steps=4, radius=radius)
        assert list(ours) == list(literal) == ["0", "5"]
        assert ours == pytest.approx(literal, rel=1e-9)
    assert all(not p.grad for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("engine", ["reference", "fast"])
def test_fine_tuning_of_one_module_is_its_transcription(engine):
    literal, data = small_net(), batches(5)
    net = copy.deepcopy(literal).requires_grad_(False)
    net.get_submodule("0").requires_grad_()
    step = TrainStep(net, make_sgd(net, 0.01, 0.9, 5e-4), find_recipe("rift").method, amp="fp32", engine=engine)
    for x, y in data:
        step(x, y)
    transcriptions.rift_finetune(literal, "0", data, [0.01] * 5)
    assert_same(net, literal)


def test_mixing_is_its_transcription():
    robust, tuned = small_net().state_dict(), {k: v + 1 for k, v in small_net().state_dict().items()}
    for share in (0.0, 0.3, 1.0):
        ours, literal = mix(robust, tuned, share), transcriptions.rift_interpolate(robust, tuned, share)
        for name in literal:
            torch.testing.assert_close(ours[name], literal[name], rtol=1e-12, atol=1e-12)


def test_mixture_is_the_best_on_clean_images_that_loses_no_robustness(monkeypatch):
    from fastafd.training import rift

    of_share = {0.0: (0.5, 0.40), 0.1: (0.7, 0.41), 0.2: (0.7, 0.40), 0.3: (0.8, 0.38), 1.0: (0.9, 0.1)}
    seen = []

    def accuracy(net, x, y, attack, *_):
        share = round(float(net[-1].bias.detach()[0]), 1)
        seen.append((share, attack))
        clean, robust = of_share.get(share, (0.9, 0.0))
        return torch.arange(100) < 100 * (clean if attack is None else robust)

    monkeypatch.setattr(rift, "accuracy_under", accuracy)
    robust, tuned = small_net(), small_net()
    robust[-1].bias.data.fill_(0.0)
    tuned[-1].bias.data.fill_(1.0)
    held = ArraySplit(np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int64))
    for drop, expected in ((0.001, 0.2), (0.025, 0.3)):
        mixed, rows, share = choose_mixture(robust, tuned, held, PGD(), drop, 0, Console())
        assert share == expected and float(mixed[-1].bias.detach()[0]) == pytest.approx(expected) and len(rows) == 11


def test_held_out_images_are_not_trained_on(digit_tree):
    from fastafd.data import load_dataset
    from fastafd.settings import UsageError

    whole = load_dataset("imagefolder", digit_tree).train
    train_part, held = hold_out(whole, 40, 0)
    assert len(train_part) == 200 and len(held) == 40 and np.bincount(held.labels).tolist() == [4] * 10
    together = np.concatenate([train_part.images(), held.images()])
    assert sorted(image.tobytes() for image in together) == sorted(image.tobytes() for image in whole.images())
    with pytest.raises(UsageError, match=r"held_out: got 121, takes at most half of the 240"):
        hold_out(whole, 121, 0)
