"""AFD: adversarial fine-tuning via disentanglement (Eq. 1 to 6). `fastafd.kernels.afd_loss` computes the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fastafd.kernels import afd_loss
from fastafd.methods.base import Batch, Loss, Method
from fastafd.models import Disentangled
from fastafd.settings import check, number, setting


@dataclass(frozen=True)
class AFD(Method):
    """alpha L1 + beta L2 + L3. With alpha = beta = gamma = 0 it is plain adversarial fine-tuning through D1."""

    label: ClassVar[str] = "AFD"
    uses_teacher: ClassVar[bool] = True
    disentangled: ClassVar[bool] = True

    alpha: float = setting(0.05, "weight of L1, the confused features' cross-entropy", number(0))
    beta: float = setting(0.25, "weight of L2, which drives f1 away from f2", number(0))
    gamma: float = setting(25.0, "weight of the angular distance between f1 and the teacher's features", number(0))
    classifier_alpha: float = setting(0.0, "share of L1's gradient that the classifier gets too", number(0))

    def __post_init__(self) -> None:
        check(self)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        assert isinstance(model, Disentangled) and batch.teacher_features is not None
        out = afd_loss(
            model.features(batch.x_adv),
            batch.teacher_features,
            batch.y,
            model.d1.weight,
            model.d2.weight,
            model.classifier.weight,
            model.classifier.bias,
            alpha=self.alpha,
            beta=self.beta,
            gamma=self.gamma,
            classifier_alpha=self.classifier_alpha,
        )
        return Loss(out.total, out.terms, out.logits)
