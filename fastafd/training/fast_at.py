"""The steps of the fast adversarial training methods, which make their attacked images themselves: Free-AT, FGSM-GA,
ATAS.

They run on the reference engine: Free-AT keeps a perturbation from batch to batch, FGSM-GA differentiates a gradient,
ATAS keeps a perturbation of every training image. Perturbations are part of the step's state, so a resumed run is
exact.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastafd.attacks import Ball, input_gradient, linf_noise
from fastafd.data import Loader
from fastafd.data.loaders import Batches, epoch_order
from fastafd.device import autocast
from fastafd.methods import ATAS, Batch, FreeAT, GradAlign, Loss
from fastafd.methods.atas import window
from fastafd.methods.grad_align import misalignment
from fastafd.training.step import Inputs, TrainStep


class Replayed(Loader):
    """A loader that delivers every batch of `loader` several times in a row."""

    def __init__(self, loader: Loader, times: int):
        super().__init__(loader.n, loader.batch_size, loader.seed, drop_last=True, device=loader.device)
        self.kind, self.loader, self.times = loader.kind, loader, times
        self.batches = times * len(loader)

    def epoch(self, epoch: int, start: int = 0) -> Batches:
        whole, left = divmod(start, self.times)
        batches = self.loader.epoch(epoch, whole)
        try:
            for batch in batches:
                for _ in range(left, self.times):
                    yield batch
                left = 0
        finally:
            batches.close()


class FreeStep(TrainStep):
    """One pass of Free-AT over a batch. All passes over a batch share the crop and the flip of the first one."""

    method: FreeAT

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, method: FreeAT, *, attack: Ball, **rest: Any
    ):
        super().__init__(model, optimizer, method, attack=attack, **rest)
        self.eps = attack.eps
        self.delta: Tensor | None = None  # (B,3,H,W)
        self.drawn: tuple[Tensor | None, Tensor | None] = None, None  # offsets and flips of the batch's first pass

    def feed(self, loader: Loader) -> Loader:
        return Replayed(loader, self.method.replays)

    def _inputs(self, x: Tensor, y: Tensor) -> Inputs:
        x, y, offsets, flips, noise, epoch = super()._inputs(x, y)
        if self.steps % self.method.replays == 0:
            self.drawn = offsets, flips
        return x, y, *self.drawn, noise, epoch

    def _attacked(self, x: Tensor, inputs: Inputs) -> Tensor:
        if self.delta is None:
            self.delta = torch.zeros_like(x)
        return (x + self.delta).requires_grad_()

    def _update(self, batch: Batch) -> Loss:
        out = super()._update(batch)
        assert self.delta is not None and batch.x_adv.grad is not None
        self.delta = self.method.moved(self.delta, batch.x_adv.grad, batch.x, self.eps)
        return out

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"delta": self.delta, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        offsets, flips = state["drawn"]
        self.delta, self.drawn = self._on_device(state["delta"]), (self._on_device(offsets), self._on_device(flips))

    def _on_device(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self.device)


class GradAlignStep(TrainStep):
    """A step of FGSM with gradient alignment. BatchNorm is in train mode in all passes: at x, x + delta and x + eta."""

    method: GradAlign

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, method: GradAlign, *, attack: Ball, **rest: Any
    ):
        super().__init__(model, optimizer, method, attack=attack, **rest)
        self.eps = attack.eps

    def _attacked(self, x: Tensor, inputs: Inputs) -> Tensor:
        self.modes.train()
        with autocast(self.device, self.engine.amp):
            self.gradient = input_gradient(self.model, x.clone().requires_grad_(), inputs[1])
        delta = (self.method.step_factor * self.eps * self.gradient.sign()).clamp(-self.eps, self.eps)
        return (x + delta).clamp(0.0, 1.0)

    def _loss(self, batch: Batch) -> Loss:
        out = super()._loss(batch)
        noisy = (batch.x + linf_noise(batch.x, self.eps, self.generator)).requires_grad_()  # not clipped to [0,1]
        with autocast(self.device, self.engine.amp):
            logits = self.model(noisy)
            summed = F.cross_entropy(
                logits.to(torch.promote_types(logits.dtype, torch.float32)), batch.y, reduction="sum"
            )
            (gradient,) = torch.autograd.grad(summed, noisy, create_graph=True)
        penalty = misalignment(self.gradient, gradient)
        return out._replace(
            total=out.total + self.method.align_weight * penalty, terms=out.terms | {"misalignment": penalty.detach()}
        )


class ATASStep(TrainStep):
    """A step of ATAS. The loader's order says which images a batch holds."""

    method: ATAS
    loader: Loader

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: ATAS,
        *,
        attack: Ball,
        loader: Loader,
        epochs: int,
        **rest: Any,
    ):
        super().__init__(model, optimizer, method, attack=attack, loader=loader, **rest)
        self.eps, self.epochs = attack.eps, epochs
        self.deltas: Tensor | None = None  # (N,3,H+2p,W+2p), p pixels of padding
        self.squares = torch.zeros(loader.n, dtype=next(model.parameters()).dtype, device=self.device)  # v
        self._order = -1, torch.empty(0)  # the number of an epoch, and its order (N,) on the device

    def _attacked(self, x: Tensor, inputs: Inputs) -> Tensor:
        _, y, offsets, flips, *_ = inputs
        epoch, batch = divmod(self.steps, len(self.loader))
        if offsets is None or flips is None:
            offsets, flips = torch.zeros(len(x), 2, dtype=torch.int64, device=x.device), torch.zeros_like(y).bool()
        if self.deltas is None or (batch == 0 and self._redraws(epoch)):
            side = x.shape[2] + 2 * (0 if self.augment is None else self.augment.padding)
            like = torch.empty(self.loader.n, 3, side, side, dtype=x.dtype, device=x.device)
            self.deltas = linf_noise(like, self.eps, self.generator)
        if self._order[0] != epoch:
            order = epoch_order(self.loader.n, self.loader.seed, epoch)
            self._order = epoch, torch.from_numpy(order).to(x.device)  # the copy waits for the device, once an epoch
        first = batch * self.loader.batch_size
        images = self._order[1][first : first + len(x)]
        _, rows, columns = window(offsets, flips, x.shape[2])
        place = images[:, None, None], slice(None), rows, columns

        start = (x + self.deltas[place].permute(0, 3, 1, 2)).clamp(0.0, 1.0)
        self.model.eval()
        with autocast(self.device, self.engine.amp):
            gradient = input_gradient(self.model, start.clone().requires_grad_(), y) / len(x)  # of the mean
        length: float | Tensor = self.eps
        if epoch >= self.method.warm_up:
            self.squares[images] = self.method.mean_square(self.squares[images], gradient)
            length = self.method.step_sizes(self.squares[images])
        x_adv = start + length * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - self.eps), x + self.eps).clamp(0.0, 1.0)
        self.deltas[place] = (x_adv - x).permute(0, 2, 3, 1)
        return x_adv

    def _redraws(self, epoch: int) -> bool:
        """Whether all perturbations are drawn anew before this epoch; never before the last one."""
        return (epoch + 1) % self.method.redraw_every == 0 and epoch + 1 != self.epochs

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"deltas": self.deltas, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.deltas = None if state["deltas"] is None else state["deltas"].to(self.device)
        self.squares = state["squares"].to(self.device)
