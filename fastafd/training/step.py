"""The hot path: one training step, from a batch of images to updated weights and their average.

    images -> augment, [0,1] -> attack (PGD on the f1 path) -> teacher on x, student on x_adv -> loss terms
           -> one backward -> one SGD step -> EMA

This module puts the parts in order and launches them: one after the other, or, with the fast engine on CUDA, as one
graph. The parts themselves, and everything about arithmetic types, compilers and BatchNorm modes, are in `engine.py`.
No step waits for the device, except the first one of a batch shape: it checks the batch, compiles, and times
convolutions.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor, nn

from fastafd.attacks import PGD
from fastafd.console import Console
from fastafd.data.augment import Augment, to_unit
from fastafd.device import resolve_amp
from fastafd.kernels.afd_loss import angular_distance
from fastafd.methods import Batch, Loss, Method
from fastafd.models import SplitNet, split
from fastafd.settings import UsageError
from fastafd.training.ema import EMA
from fastafd.training.engine import Engine, Fast, Reference, engine_of, keep_compiled
from fastafd.training.graphs import Graphs
from fastafd.training.optim import fuse, needs_host, restore, to_channels_last
from fastafd.training.timing import PhaseTimer

# images, labels, crop offsets, flips, the attack's noise, the epoch
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Seen = tuple[Tensor, Tensor, Tensor | None]  # x, x_adv, the teacher's features of x


class TrainStep:
    """One step of any method; call it with a batch."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: Method,
        *,
        teacher: nn.Module | None = None,
        attack: PGD | None = None,
        attack_bn: str = "eval",
        ema_decay: float = 0.0,
        amp: str = "auto",
        engine: str = "auto",
        augment: Augment | None = None,
        seed: int = 0,
        per_epoch: int = 0,
        console: Console | None = None,
    ):
        """per_epoch: steps of an epoch, for a method that does something else in another epoch."""
        if method.uses_teacher and teacher is None:
            raise ValueError(f"{type(method).__name__} needs a teacher")
        self.model, self.optimizer, self.method = model, optimizer, method
        self.device = next(model.parameters()).device
        self.console = console or Console()
        self.fast = engine_of(method, engine, self.device, self.console) == "fast"
        if self.fast and to_channels_last(model, optimizer):  # before anything refers to its tensors
            self.console.line("the network's weights are put into channels_last, the layout of the fast engine")
        self.attack = attack if method.adversarial and method.attacks else None
        self.per_epoch = per_epoch
        if method.replays_noise and not per_epoch:
            raise ValueError(f"{type(method).__name__} needs per_epoch, the steps of an epoch")
        if method.replays_noise and (self.attack is None or not self.attack.random_start):
            raise UsageError(f"attack.random_start: got false, takes true with {method.label}, which replays its noise")
        frozen = None if teacher is None else _frozen_features(teacher, model, self.device)
        self.taught = frozen is not None
        self.ema = EMA(model, ema_decay) if ema_decay else None
        self.augment = augment
        amp = resolve_amp(amp, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**12, enabled=amp == "fp16")
        self.generator = torch.Generator(self.device).manual_seed(seed)  # the attack's starts
        self.timer = self._phases = PhaseTimer(self.device)
        self.steps = 0

        self.graphs: Graphs | None = None
        self._state: Any = None  # the optimizer's, as it was recorded
        self.engine: Engine
        if not self.fast:
            self.engine = Reference(model, method, frozen, self.attack, attack_bn, self.ema, amp)
            return
        if self.attack is not None and attack_bn != "eval":
            raise UsageError(f"attack_bn: got {attack_bn!r}, takes eval with engine fast; reference has both")
        self.engine = Fast(model, method, frozen, self.attack, self.ema, amp, self.console)
        self._met: set[torch.Size] = set()  # shapes of batches that it has been compiled for
        fuse(self.optimizer)
        if self.device.type == "cuda":
            if reason := needs_host(optimizer, self.scaler.is_enabled()):
                self.console.line(f"no CUDA graph: {type(optimizer).__name__} {reason}")
            else:
                self._replay(Graphs(self._recorded, self.device, self.console))

    def __call__(self, x: Tensor, y: Tensor, probe: bool = False) -> dict[str, Tensor]:
        """Train on one batch; returns detached scalars on the device: `loss`, the method's terms, accuracies.

        x: uint8 (B,H,W,3) or (B,3,H,W), or float (B,3,H,W) in [0,1]; y: (B,) int64, on the model's device. A given
        `augment` is applied to uint8 batches. With `probe`, clean accuracy and feature gaps are measured as
        well, in eval mode and of the weights before the update, at the price of two more forward passes.
        """
        with self.timer("inputs"):
            inputs = self._inputs(x, y)
        if self.steps == 0:
            self._check_first(*inputs[:2])
        weight = 0.0 if self.ema is None else self.ema.advance()
        if self.fast and inputs[0].shape not in self._met:
            run = self._compile
        else:
            run = self._launch
        metrics = run(inputs, weight, probe and self.method.adversarial)
        self.steps += 1
        return metrics

    def averaged(self) -> nn.Module:
        """The model that is evaluated: the weight average, or without one the model itself."""
        return self.model if self.ema is None else self.ema.module

    @property
    def arms(self) -> dict[str, Any]:
        """The forms of the attack's convolutions and the machine that they were timed on; nothing where none were."""
        chosen = self.engine.choice if isinstance(self.engine, Fast) else None
        return {} if chosen is None else chosen.state()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, the generators included; the same from either engine."""
        optimizer = self.optimizer.state_dict()
        optimizer["param_groups"] = [group | {"lr": float(group["lr"])} for group in optimizer["param_groups"]]
        state: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": optimizer}
        state |= {"generator": self.generator.get_state(), "steps": self.steps, "scaler": self.scaler.state_dict()}
        state["torch_rng"] = torch.get_rng_state()  # of a network with dropout, say
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        if self.augment is not None:
            state["augment"] = self.augment.generator.get_state()
        if self.arms:
            state["arms"] = self.arms
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict()`. UsageError where it is of the other kind of device, whose generators differ."""
        if ("cuda_rng" in state) != (self.device.type == "cuda"):
            of = "a GPU" if "cuda_rng" in state else "a CPU"
            raise UsageError(f"device: got {self.device.type}, and the state to go on from is that of a step on {of}")
        self.model.load_state_dict(state["model"])
        in_place = restore(self.optimizer, state["optimizer"])
        if self.fast:
            fuse(self.optimizer)
        if in_place:
            self._state = self.optimizer.state  # recordings still hold its tensors
        self.generator.set_state(state["generator"])
        self.steps = state["steps"]
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["torch_rng"])
        if "cuda_rng" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.augment is not None:
            self.augment.generator.set_state(state["augment"])
        if "arms" in state and isinstance(self.engine, Fast) and self.engine.choice is not None:
            self.engine.choice.keep(state["arms"])

    # -- what a step is made of -----------------------------------------------------------------------------------

    def _inputs(self, x: Tensor, y: Tensor) -> Inputs:
        """The batch and all that is drawn for it, on the device."""
        x, y = x.to(self.device, non_blocking=True), y.to(self.device, torch.int64, non_blocking=True)
        dtype = next(self.model.parameters()).dtype
        offsets = flips = noise = epoch = None
        if x.dtype == torch.uint8:
            x = (x if x.shape[-1] == 3 else x.permute(0, 2, 3, 1)).contiguous()
            if self.augment is not None:
                offsets, flips = self.augment.draw_on(self.device, len(x))
            shape = len(x), 3, *x.shape[1:3]
        else:
            x = x.to(dtype).contiguous(memory_format=torch.channels_last)
            shape = tuple(x.shape)
        if self.attack is not None:
            like = torch.empty(shape, dtype=dtype, device=self.device, memory_format=torch.channels_last)
            noise = self.attack.draw(like, self.generator)
        if self.method.replays_noise:
            epoch = torch.full((), self.steps // self.per_epoch + 1, device=self.device)
        return x, y, offsets, flips, noise, epoch

    def _check_first(self, x: Tensor, y: Tensor) -> None:
        """The mistakes that a loop makes in its first batch or never; it waits for the device."""
        if x.is_floating_point() and (x.min() < -1e-6 or x.max() > 1 + 1e-6):
            raise UsageError(
                f"x: got pixels from {float(x.min()):.3g} to {float(x.max()):.3g}, takes [0,1];"
                " normalisation belongs inside the model (fastafd.models.Normalize)"
            )
        linear = self.model.classifier if isinstance(self.model, SplitNet) else None
        if y.min() < 0 or (linear is not None and y.max() >= linear.out_features):
            classes = "" if linear is None else f" to {linear.out_features - 1}"
            raise UsageError(f"y: got labels from {int(y.min())} to {int(y.max())}, takes 0{classes}")

    def _run(
        self, inputs: Inputs, weight: float | Tensor, timer: PhaseTimer, probe: bool = False
    ) -> tuple[dict[str, Tensor], Seen]:
        """The step itself, on the device alone."""
        images, y, offsets, flips, noise, epoch = inputs
        with timer("augment"):
            x = self._pixels(images, offsets, flips)
        teacher_features = None
        if self.method.uses_teacher:
            with timer("teacher"):
                teacher_features = self.engine.teacher_features(x)
        x_adv = x
        if self.method.adversarial:
            with timer("attack"):
                x_adv = self._attacked(x, inputs)
        self.engine.join()  # from here on the teacher's features are read
        if noise is not None and epoch is not None:
            with timer("attack"):
                features, _ = self.engine.f1(x)
                x_adv = self.method.replay(Batch(x, x_adv, y, teacher_features), noise, features, epoch)
        probed: dict[str, Tensor] = {}
        if probe:
            with timer("probe"):
                probed = self._probe(y, x, x_adv, teacher_features)
        with timer("update"):
            out = self._update(Batch(x, x_adv, y, teacher_features))
        if self.ema is not None:
            with timer("ema"):
                self.engine.average(weight)
        accuracy = "adversarial_accuracy" if self.method.adversarial else "clean_accuracy"
        correct = (out.logits.argmax(1) == y).float().mean()
        return {"loss": out.total.detach(), **out.terms, accuracy: correct, **probed}, (x, x_adv, teacher_features)

    def _attacked(self, x: Tensor, inputs: Inputs) -> Tensor:
        """The attacked images in the place of x."""
        _, y, _, _, noise, _ = inputs
        return self.engine.perturb(x, noise, y)

    def _loss(self, batch: Batch) -> Loss:
        return self.engine.loss(batch)

    def _update(self, batch: Batch) -> Loss:
        out = self._loss(batch)
        self.model.zero_grad(set_to_none=True)
        self.scaler.scale(out.total).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return out

    def _pixels(self, images: Tensor, offsets: Tensor | None, flips: Tensor | None) -> Tensor:
        if images.dtype != torch.uint8:
            return images
        if self.augment is None or offsets is None or flips is None:
            x = to_unit(images)
        else:
            x = self.augment.apply(images, offsets, flips)
        return x.to(next(self.model.parameters()).dtype)

    def _probe(self, y: Tensor, x: Tensor, x_adv: Tensor, teacher_features: Tensor | None = None) -> dict[str, Tensor]:
        """Clean accuracy and the gap between f1 of x_adv and natural features (Fig. 1a): the teacher's, and f1 of x."""
        clean, logits = self.engine.f1(x)
        attacked, _ = self.engine.f1(x_adv)
        found = {"clean_accuracy": (logits.argmax(1) == y).float().mean(), **feature_gap(attacked, clean, "own_gap")}
        if teacher_features is None and self.taught:
            teacher_features = self.engine.teacher_features(x)
            self.engine.join()
        if teacher_features is not None:
            found |= feature_gap(attacked, teacher_features, "gap")
        return found

    # -- how it is launched ---------------------------------------------------------------------------------------

    def _launch(self, inputs: Inputs, weight: float, probe: bool) -> dict[str, Tensor]:
        with self.engine.launching():
            if self.graphs is None:
                return self._run(inputs, weight, self._phases, probe)[0]
            with self.timer("step"):
                self._set_scalars(weight)
                figures, *more = self.graphs(*inputs)
                metrics = dict(zip(self._names, figures.clone().unbind()))  # the next step overwrites them
                seen, grads = more[: self._seen], more[self._seen :]
                for parameter, grad in zip(self._trained, grads, strict=True):
                    parameter.grad = grad  # a replay writes into those of its recording
            if probe:  # the snapshot still has the weights before the update
                with self.timer("probe"):
                    metrics |= self._probe(inputs[1], *seen)
            return metrics

    def _compile(self, inputs: Inputs, weight: float, probe: bool) -> dict[str, Tensor]:
        """`_launch` for a batch of a shape not met before: the first call of each part compiles it."""
        shape = tuple(inputs[0].shape)
        folder = keep_compiled(self.device)
        self.console.line(
            f"compiling the step for batches of {shape}, a minute or two if {folder} does not have it yet"
        )
        began = time.perf_counter()
        usual, self._phases = self._phases, PhaseTimer(torch.device("cpu"))
        timer, self.timer = self.timer, PhaseTimer(self.device)  # off: what compiles counts as that alone
        self._phases.on = True
        try:
            with timer("compile"):
                metrics = self._launch(inputs, weight, probe)
        finally:
            spent, self._phases, self.timer = self._phases.collect(), usual, timer
        self._met.add(inputs[0].shape)
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in spent.items() if seconds >= 0.05)
        self.console.line(f"compiled in {time.perf_counter() - began:.1f} s ({parts})")
        return metrics

    def _replay(self, graphs: Graphs) -> None:
        """Launch every step from now on by `graphs`."""
        self.graphs = graphs
        self._weight = torch.zeros((), device=self.device)
        self._rates: list[Tensor] = []
        self._phases = PhaseTimer(torch.device("cpu"))  # on while compiling: a graph has no phases

    def _recorded(self, *inputs: Any) -> tuple[Tensor, ...]:
        """`_run` as a CUDA graph takes it."""
        metrics, seen = self._run(inputs, self._weight, self._phases)
        tensors = [t for t in seen if t is not None]
        self._names, self._seen = tuple(metrics), len(tensors)
        self._trained = [p for p in self.model.parameters() if p.grad is not None]
        grads = [p.grad for p in self._trained if p.grad is not None]
        return torch.stack([value.float() for value in metrics.values()]), *tensors, *grads

    def _set_scalars(self, weight: float) -> None:
        """What changes from step to step and is no input: a graph reads it from the device."""
        assert self.graphs is not None
        self._weight.fill_(weight)
        groups = self.optimizer.param_groups
        if self.optimizer.state is not self._state or len(groups) != len(self._rates):  # loaded, or a group added
            fuse(self.optimizer)
            self.graphs.clear()
            self._state, self._rates = self.optimizer.state, [torch.zeros((), device=self.device) for _ in groups]
        for group, held in zip(groups, self._rates, strict=True):
            if group["lr"] is not held:  # somebody has set it since
                held.fill_(group["lr"])
                group["lr"] = held


def feature_gap(u: Tensor, v: Tensor, name: str) -> dict[str, Tensor]:
    """Distances of (B,D) features per sample, then their mean: `name`_l1, _l2, _linf, and _cosine (1 - cos)."""
    difference = u.float() - v.float()
    gap = {f"{name}_{norm}": difference.norm(p=p, dim=1).mean() for norm, p in NORMS.items()}
    return {**gap, f"{name}_cosine": angular_distance(u.float(), v.float())}


NORMS = {"l1": 1.0, "l2": 2.0, "linf": float("inf")}


def _frozen_features(teacher: nn.Module, student: nn.Module, device: torch.device) -> nn.Module:
    whole = copy.deepcopy(teacher) if isinstance(teacher, SplitNet) else split(teacher)
    if isinstance(student, SplitNet) and whole.classifier.in_features != student.classifier.in_features:
        raise ValueError(
            f"the teacher has {whole.classifier.in_features} features, the model {student.classifier.in_features}"
        )
    return whole.backbone.to(device).eval().requires_grad_(False)
