"""AFKD: vAFT with representation-guided knowledge distillation (Suzuki et al., ICCV 2023, arXiv 2308.16454).

    CE(h(x'), y) + rgkd (1 - cos(g(x'), g_P(x)))

Their code is not public. The form and the weight are those of the AFD authors' ARREST.py, which made the rows of the
AFD paper. One difference: there the teacher's BatchNorm is in train mode, here it is in eval mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastafd.kernels.afd_loss import angular_distance
from fastafd.methods.base import Batch, Loss, Method, cross_entropy
from fastafd.models import SplitNet
from fastafd.settings import check, number, setting


@dataclass(frozen=True)
class AFKD(Method):
    """The cross-entropy on attacked images, and the distance of their features from the teacher's clean ones."""

    label: ClassVar[str] = "AFKD"
    uses_teacher: ClassVar[bool] = True

    rgkd: float = setting(50.0, "weight of the angular distance between the features and the teacher's", number(0))

    def __post_init__(self) -> None:
        check(self)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        assert isinstance(model, SplitNet) and batch.teacher_features is not None
        features = model.features(batch.x_adv)
        classification = cross_entropy(model.classifier(features), batch.y)
        alignment = distance(features, batch.teacher_features)
        terms = classification.terms | {"alignment": alignment.detach()}
        return Loss(classification.total + self.rgkd * alignment, terms, classification.logits)


def distance(u: Tensor, v: Tensor) -> Tensor:
    """The mean of 1 - cos(u, v) over the batch, computed in fp32 or wider: (B,D), (B,D) -> ()."""
    wide = torch.promote_types(u.dtype, torch.float32)
    return angular_distance(u.to(wide), v.to(wide))
