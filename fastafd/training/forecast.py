"""How long a run will take, from a few timed passes of its network: one line before the first stage begins."""

from __future__ import annotations

import copy
import time
from typing import NamedTuple

import torch
from torch import nn

from fastafd.attacks import PGD
from fastafd.config import TrainConfig
from fastafd.data import Dataset
from fastafd.methods import FreeAT

AT_ONCE = 250  # images that an evaluation takes at a time
PGD20_STEPS = 20
# AutoAttack standard on images that survive it: passes forward and backward of APGD-CE, APGD-T and FAB-T, and queries
# of Square. Beside them each iteration costs the library some host time.
AUTOATTACK_PASSES, AUTOATTACK_QUERIES = 100 + 900 + 900, 5000
HOST_S = 0.0012
SURVIVE = 0.6  # the share of the images that a robust model keeps; a natural one keeps none


class Forecast(NamedTuple):
    """Seconds of each part of a run."""

    pretraining: float
    finetuning: float
    evaluation: float

    def line(self, at_most: bool) -> str:
        """The line that says so. at_most: the compiled step will be faster than the timed passes."""
        total = duration(sum(self))
        parts = ", ".join(f"{name} {duration(spent)}" for name, spent in self._asdict().items() if spent >= 0.5)
        about = "at most about" if at_most else "about"
        return f"all of it will take {about} {total} ({parts}), longer beside other work"


def duration(seconds: float) -> str:
    """Seconds in words: "50 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def forecast(
    config: TrainConfig, net: nn.Module, dataset: Dataset, device: torch.device, pretrains: bool, robust_start: bool
) -> Forecast:
    """The forecast of the run.

    net: the classifier, with any weights. pretrains: whether a natural model is trained first. robust_start: whether
    the weights that the method starts from are robust, so that AutoAttack needs long for them too.
    """
    steps = config.attack.steps if isinstance(config.attack, PGD) else 1
    replays = config.method.replays if isinstance(config.method, FreeAT) else 1
    classes = len(dataset.classes)
    batch = config.sgd.batch_size
    both, _ = seconds_of_passes(net, batch, dataset.image_size, device)
    per_epoch = len(dataset.train) // batch
    pretraining = both * config.pretrain.epochs * per_epoch if pretrains else 0.0
    finetuning = both * (steps + 2) * replays * config.sgd.epochs * per_epoch

    n = min(config.eval_n or len(dataset.test), len(dataset.test))
    models = 2 if config.method.begins != "scratch" else 1
    evaluation = both / batch * n * (PGD20_STEPS + 2) * models
    survivors = min(config.autoattack_n, len(dataset.test)) * SURVIVE * (1 + robust_start)
    if survivors and classes >= 4:
        calls = -(-survivors // AT_ONCE)
        both, forward = seconds_of_passes(net, int(max(1, min(survivors, AT_ONCE))), dataset.image_size, device)
        share = survivors / AT_ONCE / calls if survivors > AT_ONCE else 1.0
        passes = AUTOATTACK_PASSES * (both + 3 * HOST_S) + AUTOATTACK_QUERIES * (forward + HOST_S)
        evaluation += calls * share * passes
    return Forecast(pretraining, finetuning, evaluation)


def seconds_of_passes(net: nn.Module, batch: int, side: int, device: torch.device) -> tuple[float, float]:
    """The seconds of a forward and backward pass, and of a forward pass alone, eager in fp32: the best of three."""
    net = copy.deepcopy(net).to(device).eval()
    x = torch.zeros(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)

    def forward() -> None:
        with torch.no_grad():
            net(x)

    def both() -> None:
        net(x).sum().backward()

    best = []
    for call in (both, forward):
        spent = []
        for _ in range(4):  # the first is a warm-up
            began = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            spent.append(time.perf_counter() - began)
        best.append(min(spent[1:]))
    return best[0], best[1]
