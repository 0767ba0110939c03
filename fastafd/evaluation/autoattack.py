"""AutoAttack standard (Croce and Hein 2020) by the library pyautoattack, with the work-arounds that it needs."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastafd.attacks import check_images, check_labels, check_logits, check_network, named_failure
from fastafd.device import device_of
from fastafd.settings import UsageError

REPORT_EVERY_S = 15.0  # seconds between two lines within one of its attacks


class AutoAttackResult(NamedTuple):
    """x_adv (N,3,H,W) and predicted (N,), on the CPU.

    The accuracy after each of its attacks; the library's warnings.
    """

    x_adv: Tensor
    predicted: Tensor
    accuracy_after: dict[str, float]
    warnings: list[str]


@torch.inference_mode(False)
def run_autoattack(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, batch_size: int, seed: int, report: Callable[[str], None]
) -> AutoAttackResult:
    """Attack each image with APGD-CE, targeted APGD, targeted FAB and Square in turn, until one succeeds.

    x: float32 (N,3,H,W) in [0,1]; y: (N,) int64; both on the CPU. report: gets a line now and then. Global generators
    are left as they were. Raises UsageError for images outside [0,1], for labels that are no class numbers, and for a
    model that does not return logits of at least four classes, which the targeted losses rank.
    """
    from pyautoattack import AutoAttack

    check_images(x)
    check_network(model, "model")
    device = device_of(model)
    classes = check_classes(model, x[:1])
    check_labels(y, len(x), classes)
    x, y = (t.clone() if t.is_inference() else t for t in (x, y.long()))  # autograd saves no inference tensor
    x = x.contiguous(memory_format=torch.contiguous_format)  # its gradient checks fail with a channels-last input
    gpus = [device] if device.type == "cuda" else []
    with _Log(report) as log, torch.random.fork_rng(devices=gpus):  # the library seeds the global generators
        adversary = AutoAttack(_Logits(model), norm="Linf", eps=eps, version="standard", seed=seed, device=device)
        if classes < 10:  # by default it targets nine wrong classes
            adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = classes - 1
        x_adv, predicted = adversary.run_standard_evaluation(x.to(device), y.to(device), batch_size=batch_size)
    return AutoAttackResult(x_adv.cpu(), predicted.cpu(), log.accuracy_after, log.warnings)


def check_classes(model: nn.Module, x: Tensor) -> int:
    """The number of classes of the model; x: (B,3,H,W).

    UsageError if there are fewer than four, no logits, or no gradient.
    """
    x = x.to(device_of(model))
    with torch.enable_grad(), named_failure(x, "model"):
        logits = model(x.clone().requires_grad_())
    check_logits(logits, len(x), "model", finite=False)
    if not logits.requires_grad:
        raise UsageError("model: its output has no gradient; an attack needs one, so nothing may detach it")
    classes = logits.shape[1]
    if classes < 4:
        raise UsageError(f"attack: AutoAttack's targeted losses need 4 classes, this model has {classes}; take pgd20")
    return classes


class _Logits(nn.Module):
    """The classifier in the form that AutoAttack needs: fp32 logits in new memory, because Square writes into them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).float().clone()


class _Log(logging.Handler):
    """Turns the library's log into progress lines; collects its warnings and the accuracy after each attack."""

    def __init__(self, report: Callable[[str], None]):
        super().__init__(logging.DEBUG)
        self.report = report
        self.reported = time.monotonic()
        self.warnings: list[str] = []
        self.accuracy_after: dict[str, float] = {}
        self.logger = logging.getLogger("auto-attack")

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        after = re.match(r"robust accuracy after (\S+): ([\d.]+)%", message)
        if after:
            self.accuracy_after[after[1].lower()] = float(after[2]) / 100
        if record.levelno >= logging.WARNING:
            self.warnings.append(message)
        batch = re.match(r"\S+ - \d+/\d+ - ", message) and time.monotonic() - self.reported > REPORT_EVERY_S
        if after or batch or record.levelno >= logging.WARNING:
            self.reported = time.monotonic()
            self.report(message)

    def __enter__(self) -> _Log:
        self.before = self.logger.level, self.logger.propagate
        self.logger.setLevel(logging.DEBUG)
        self.logger.propagate = False
        self.logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)
        self.logger.level, self.logger.propagate = self.before
