"""The operations of fastafd as a user would write them, and a step made of them: the baseline of the benchmarks.

`PlainStep` is the step of recipe `released` in plain PyTorch, without a line of fastafd's step, engine or kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastafd.models import Disentangled
from fastafd.training.ema import EMA

EPS, STEP_SIZE = 8 / 255, 0.007


def afd_loss(
    g: Tensor,
    t: Tensor,
    y: Tensor,
    d1: Tensor,
    d2: Tensor,
    w: Tensor,
    b: Tensor,
    *,
    alpha: float,
    beta: float,
    gamma: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The total, the logits of f1 and y'. The weights have the features' type."""
    f1, f2 = F.linear(g, d1), F.linear(g.detach(), d2)
    z1, z2 = F.linear(f1, w, b).float(), F.linear(f2, w.detach(), b.detach()).float()
    wrong = z1.detach().scatter(1, y[:, None], float("-inf")).argmax(1)
    exclusion = F.cosine_similarity(f1.float(), f2.detach().float()).mean() - 1
    alignment = 1 - F.cosine_similarity(f1.float(), t.float()).mean()
    confused, cross_entropy = F.cross_entropy(z2, wrong), F.cross_entropy(z1, y)
    return alpha * confused + beta * exclusion + cross_entropy + gamma * alignment, z1, wrong


def linf_step(x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, step_size: float) -> Tensor:
    stepped = x_adv + step_size * grad.sign()
    return torch.clamp(torch.clamp(stepped, x - eps, x + eps), 0.0, 1.0)


def augment(x: Tensor, offsets: Tensor, flips: Tensor, padding: int) -> Tensor:
    """Augment images: uint8 (B,H,W,3) to float32 (B,3,H,W) in [0,1]."""
    width = x.shape[2]
    padded = F.pad(x, (0, 0, padding, padding, padding, padding))
    at = torch.arange(width, device=x.device)
    rows, columns = offsets[:, :1] + at, offsets[:, 1:] + torch.where(flips[:, None], width - 1 - at, at)
    cropped = padded[torch.arange(len(x), device=x.device)[:, None, None], rows[:, :, None], columns[:, None]]
    return cropped.permute(0, 3, 1, 2).float().div_(255)


class PlainStep:
    """One step of AFD, or with steps = 0 of natural training through D1, on uint8 (B,H,W,3) batches.

    layout: the memory format of weights and images. amp: the type of autocast, or None. compiled: the network under
    torch.compile, its weights frozen in the attack (else the compiled backward would form their gradients).
    naive: the attack in train mode by loss.backward(), which forms every weight's gradient and drops it.
    """

    def __init__(
        self,
        model: Disentangled,
        teacher: nn.Module,
        steps: int,
        layout: torch.memory_format = torch.contiguous_format,
        amp: torch.dtype | None = None,
        compiled: bool = False,
        naive: bool = False,
    ):
        self.model, self.teacher = model.to(memory_format=layout), teacher.to(memory_format=layout)
        self.teacher.eval().requires_grad_(False)
        self.steps, self.layout, self.amp, self.naive, self.compiled = steps, layout, amp, naive, compiled
        self.parameters = list(model.parameters())
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-3, momentum=0.9, weight_decay=1e-3)
        self.ema = EMA(model, 0.999) if steps else None
        self.logits: Callable[[Tensor], Tensor] = model
        self.features, self.teach = model.features, self.teacher.forward
        if compiled:
            self.logits, self.features, self.teach = (
                torch.compile(call, dynamic=False) for call in (model.forward, model.features, self.teacher.forward)
            )

    def __call__(self, images: Tensor, y: Tensor) -> Tensor:
        batch = len(images)
        offsets = torch.randint(0, 9, (batch, 2), device=self.device)
        x = augment(images, offsets, torch.rand(batch, device=self.device) < 0.5, 4)
        x = x.contiguous(memory_format=self.layout)
        with torch.autocast(self.device.type, dtype=self.amp or torch.bfloat16, enabled=self.amp is not None):
            x_adv = self.attacked(x, y) if self.steps else x
            self.model.train()
            if self.steps:
                with torch.no_grad():
                    t = self.teach(x)
                model = self.model
                g = self.features(x_adv)
                weights = (model.d1.weight, model.d2.weight, model.classifier.weight, model.classifier.bias)
                loss = afd_loss(g, t, y, *(v.to(g.dtype) for v in weights), alpha=0.05, beta=0.5, gamma=25.0)[0]
            else:
                loss = F.cross_entropy(self.logits(x).float(), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.ema is not None:
            self.ema.move(self.ema.advance())
        return loss.detach()

    def attacked(self, x: Tensor, y: Tensor) -> Tensor:
        self.model.train(self.naive)
        if self.compiled:
            self.model.requires_grad_(False)
        x_adv = x + torch.empty_like(x).uniform_(-EPS, EPS)
        for _ in range(self.steps):
            x_adv = x_adv.detach().requires_grad_()
            loss = F.cross_entropy(self.logits(x_adv).float(), y, reduction="sum")
            if self.naive:
                loss.backward()
                assert x_adv.grad is not None
                grad = x_adv.grad
            else:
                (grad,) = torch.autograd.grad(loss, x_adv)
            x_adv = linf_step(x_adv.detach(), grad, x, EPS, STEP_SIZE)
        if self.compiled:
            self.model.requires_grad_(True)
        return x_adv.detach()
