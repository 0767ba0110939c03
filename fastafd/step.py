"""The hot path: one training step, from a batch of images to updated weights and their average.

    images -> augment, [0,1] -> attack (PGD on the f1 path) -> teacher on x, student on x_adv -> loss terms
           -> one backward -> one SGD step -> EMA

Only this file knows arithmetic types and BatchNorm modes. Nothing in a step waits for the device.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastafd.attacks import PGD
from fastafd.config import TrainConfig
from fastafd.data.augment import Augment, to_unit
from fastafd.ema import EMA
from fastafd.kernels.afd_loss import angular_distance
from fastafd.methods import Method
from fastafd.models import Disentangled, disentangle
from fastafd.recipes import find_recipe
from fastafd.settings import UsageError, unknown
from fastafd.timing import PhaseTimer


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
        ema_decay: float | None = None,
        amp: str = "auto",
        augment: Augment | None = None,
        seed: int = 0,
    ):
        if method.uses_teacher and teacher is None:
            raise ValueError(f"{type(method).__name__} needs a teacher")
        self.model, self.optimizer, self.method = model, optimizer, method
        self.device = next(model.parameters()).device
        self.attack, self.attack_bn = attack, attack_bn
        self.teacher = None if teacher is None else _frozen_features(teacher, model, self.device)
        self.ema = None if ema_decay is None else EMA(model, ema_decay)
        self.augment = augment
        self.bf16 = resolve_amp(amp, self.device) == "bf16"
        self.generator = torch.Generator(self.device).manual_seed(seed)  # the attack's starts
        self.timer = PhaseTimer(self.device)
        self.steps = 0

    def __call__(self, x: Tensor, y: Tensor, probe: bool = False) -> dict[str, Tensor]:
        """Train on one batch; returns detached scalars on the device: `loss`, the method's terms, accuracies.

        x: uint8 (B,H,W,3) or (B,3,H,W), or float (B,3,H,W) in [0,1]; y: (B,) int64, on the model's device. A given
        `augment` is applied to uint8 batches. With `probe`, clean accuracy and feature gaps are measured as
        well, in eval mode before the update, at the price of two more forward passes.
        """
        with self.timer("augment"):
            x, y = self._to_pixels(x), y.to(self.device, torch.int64, non_blocking=True)
        if self.steps == 0:
            self._check_first(x, y)
        teacher_features = None
        if self.teacher is not None:
            with self.timer("teacher"), torch.no_grad(), self._autocast():
                teacher_features = self.teacher(x)
        with self.timer("attack"):
            x_adv = self._attacked(x, y)
        probed: dict[str, Tensor] = {}
        if probe and self.method.adversarial:
            with self.timer("probe"):
                probed = self._probe(x, x_adv, y, teacher_features)
        with self.timer("update"):
            self.model.train()
            with self._autocast():
                out = self.method.loss(self.model, x_adv, y, teacher_features)
            self.optimizer.zero_grad(set_to_none=True)
            out.total.backward()
            self.optimizer.step()
        if self.ema is not None:
            with self.timer("ema"):
                self.ema.update()
        self.steps += 1
        accuracy = "adversarial_accuracy" if self.method.adversarial else "clean_accuracy"
        correct = (out.logits.argmax(1) == y).float().mean()
        return {"loss": out.total.detach(), **out.terms, accuracy: correct, **probed}

    def averaged(self) -> nn.Module:
        """The model that is evaluated: the weight average, or without one the model itself."""
        return self.model if self.ema is None else self.ema.module

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, the generators included."""
        state: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"generator": self.generator.get_state(), "steps": self.steps}
        state["torch_rng"] = torch.get_rng_state()  # of a network with dropout, say
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        if self.augment is not None:
            state["augment"] = self.augment.generator.get_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.steps = state["steps"]
        torch.set_rng_state(state["torch_rng"])
        if "cuda_rng" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.augment is not None:
            self.augment.generator.set_state(state["augment"])

    def _to_pixels(self, x: Tensor) -> Tensor:
        x = x.to(self.device, non_blocking=True)
        if x.dtype == torch.uint8:
            x = x if x.shape[-1] == 3 else x.permute(0, 2, 3, 1)
            x = to_unit(x) if self.augment is None else self.augment(x)
        return x.to(next(self.model.parameters()).dtype).contiguous(memory_format=torch.channels_last)

    def _check_first(self, x: Tensor, y: Tensor) -> None:
        """The mistakes that a loop makes in its first batch or never: the one place that waits for the device."""
        if x.min() < -1e-6 or x.max() > 1 + 1e-6:
            raise UsageError(
                f"x: got pixels from {float(x.min()):.3g} to {float(x.max()):.3g}, takes [0,1];"
                " normalisation belongs inside the model (fastafd.models.Normalize)"
            )
        linear = self.model.classifier if isinstance(self.model, Disentangled) else None
        if y.min() < 0 or (linear is not None and y.max() >= linear.out_features):
            classes = "" if linear is None else f" to {linear.out_features - 1}"
            raise UsageError(f"y: got labels from {int(y.min())} to {int(y.max())}, takes 0{classes}")

    def _attacked(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.method.adversarial or self.attack is None:
            return x
        self.model.train(self.attack_bn == "train")
        with self._autocast():
            return self.attack(self.model, x, y, self.generator)

    @torch.no_grad()
    def _probe(self, x: Tensor, x_adv: Tensor, y: Tensor, teacher_features: Tensor | None) -> dict[str, Tensor]:
        """Clean accuracy and the gap between f1 of x_adv and natural features (Fig. 1a): the teacher's, and f1 of x."""
        self.model.eval()
        if not isinstance(self.model, Disentangled):
            with self._autocast():
                return {"clean_accuracy": (self.model(x).argmax(1) == y).float().mean()}
        with self._autocast():
            clean, attacked = (self.model.d1(self.model.features(image)) for image in (x, x_adv))
            logits = self.model.classifier(clean)
        found = {"clean_accuracy": (logits.argmax(1) == y).float().mean(), **feature_gap(attacked, clean, "own_gap")}
        if teacher_features is not None:
            found |= feature_gap(attacked, teacher_features, "gap")
        return found

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self.bf16:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


class AFDStep(TrainStep):
    """The AFD step for any loop: `metrics = AFDStep(model, teacher, optimizer)(x, y)`.

    model: `fastafd.disentangle(net)`; teacher: the natural classifier that `net` started from, frozen here as a copy;
    optimizer: over model.parameters(), D2 best in a group of its own (`fastafd.optim.make_sgd`).
    recipe: a name or a config; `attack` replaces its attack, and any field that a step has (alpha=, beta=, gamma=,
    classifier_alpha=, eps=, step_size=, steps=, random_start=, attack_bn=, ema_decay=, seed=) overrides it.
    amp: "auto" (bf16 on a GPU that has it, else fp32), "bf16" or "fp32".
    `averaged()` is the model to evaluate, `averaged().merge()` the plain classifier.
    Raises UsageError for an unknown recipe or field, ValueError for a model without a disentangler.
    """

    def __init__(
        self,
        model: Disentangled,
        teacher: nn.Module,
        optimizer: torch.optim.Optimizer,
        recipe: str | TrainConfig = "released",
        attack: PGD | None = None,
        amp: str = "auto",
        augment: Augment | None = None,
        **fields: Any,
    ):
        if not isinstance(model, Disentangled):
            raise ValueError(f"AFDStep takes fastafd.disentangle(net), not {type(model).__name__}")
        config = find_recipe(recipe) if isinstance(recipe, str) else recipe
        attack = attack or config.attack
        own: dict[str, Any] = {"attack_bn": config.attack_bn, "ema_decay": config.ema_decay, "seed": config.task.seed}
        of_method, of_attack = vars(config.method).keys(), vars(attack).keys()
        for name in fields:
            if name not in (*of_method, *of_attack, *own):
                raise unknown("AFDStep", name, [*of_method, *of_attack, *own])
        super().__init__(
            model,
            optimizer,
            replace(config.method, **{name: fields[name] for name in fields if name in of_method}),  # type: ignore[type-var]
            teacher=teacher,
            attack=replace(attack, **{name: fields[name] for name in fields if name in of_attack}),
            amp=amp,
            augment=augment,
            **own | {name: fields[name] for name in fields if name in own},
        )

    def averaged(self) -> Disentangled:
        """The weight average, to be evaluated or merged."""
        model = super().averaged()
        assert isinstance(model, Disentangled)
        return model


def feature_gap(u: Tensor, v: Tensor, name: str) -> dict[str, Tensor]:
    """Distances of (B,D) features per sample, then their mean: `name`_l1, _l2, _linf, and _cosine (1 - cos)."""
    difference = u.float() - v.float()
    gap = {f"{name}_{norm}": difference.norm(p=p, dim=1).mean() for norm, p in NORMS.items()}
    return {**gap, f"{name}_cosine": angular_distance(u.float(), v.float())}


NORMS = {"l1": 1.0, "l2": 2.0, "linf": float("inf")}


def resolve_device(name: str) -> torch.device:
    """The device of that name ("auto": a GPU if there is one). UsageError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"device: got {name!r}, takes auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise UsageError(f"device: got {name!r}, and this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events and kernel launches go to the current device
    return device


def resolve_amp(amp: str, device: torch.device) -> str:
    """ "bf16" or "fp32"; "auto" is bf16 where a GPU computes it."""
    if amp == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if amp not in ("bf16", "fp32"):
        raise UsageError(f"amp: got {amp!r}, takes auto, bf16 or fp32")
    return amp


def _frozen_features(teacher: nn.Module, student: nn.Module, device: torch.device) -> nn.Module:
    whole = copy.deepcopy(teacher) if isinstance(teacher, Disentangled) else disentangle(teacher)
    if isinstance(student, Disentangled) and whole.classifier.in_features != student.classifier.in_features:
        raise ValueError(
            f"the teacher has {whole.classifier.in_features} features, the model {student.classifier.in_features}"
        )
    return whole.backbone.to(device).eval().requires_grad_(False)
