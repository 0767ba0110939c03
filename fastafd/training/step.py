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
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastafd.attacks import (
    PGD,
    Ball,
    check_images,
    check_labels,
    check_logits,
    check_network,
    named_failure,
    overrides,
    weakness,
)
from fastafd.console import Console
from fastafd.data import Augment, Loader, to_unit
from fastafd.device import resolve_amp
from fastafd.kernels.afd_loss import angular_distance
from fastafd.methods import Batch, Loss, Method
from fastafd.models import Modes, SplitNet, check_copy, check_split, examined, split
from fastafd.settings import RunError, UsageError, choice, number
from fastafd.training.changes import Changes
from fastafd.training.ema import EMA, copied_now, named_tensors, tensors_held
from fastafd.training.engine import Engine, Fast, Reference, engine_of, keep_compiled
from fastafd.training.graphs import Graphs
from fastafd.training.optim import align_state, check_optimizer, fuse, needs_host, restore, to_channels_last
from fastafd.training.timing import PhaseTimer

# images, labels, crop offsets, flips, the attack's start noise, the number of the epoch
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Seen = tuple[Tensor, Tensor, Tensor | None]  # x, x_adv, the teacher's features of x: what a probe needs


class TrainStep:
    """One training step of a method. Call it with a batch: `metrics = step(x, y)`."""

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: Method,
        *,
        teacher: nn.Module | None = None,
        attack: Ball | None = None,
        attack_bn: str = "eval",
        ema_decay: float = 0.0,
        amp: str = "auto",
        engine: str = "auto",
        augment: Augment | None = None,
        seed: int = 0,
        loader: Loader | None = None,
        epochs: int = 0,
        console: Console | None = None,
    ):
        """Prepare the step; the model, the optimizer and the teacher are on the model's device afterwards.

        teacher: the natural classifier, of which a frozen copy is made. attack: a PGD, or only the ball for a method
        that makes its attacked images itself. attack_bn: BatchNorm's mode during the attack. loader, epochs: the run's
        loader and number of epochs, which only methods need that act by epoch (ARREST, ATAS).
        A layer of the model that is in eval mode stays in it, unless the whole model is: then the mode means nothing.
        Raises ValueError for a missing teacher or loader and for an optimizer that lacks trainable weights, UsageError
        for settings that do not go together.
        """
        if method.uses_teacher and teacher is None:
            raise ValueError(f"{type(method).__name__} needs a teacher")
        attack_bn = choice("eval", "train")(attack_bn, "attack_bn")
        ema_decay, seed = number(0, 1)(ema_decay, "ema_decay"), number(0, 2**32, whole=True)(seed, "seed")
        check_network(model, "model")
        check_copy(copied_now(model), model)  # the average, and the attack's snapshot, are copies
        self.model, self.optimizer, self.method = model, optimizer, method
        self.device = next(model.parameters()).device
        self.console = console or Console()
        self.modes = Modes(model)
        self._say([*check_optimizer(model, optimizer), self.modes.note()])
        self._trainable = self._flags()
        self.fast = engine_of(method, engine, self.device, self.console) == "fast"
        if self.fast and to_channels_last(model, optimizer):  # before anything refers to the model's tensors
            self.console.line("the network's weights are put into channels_last, the layout of the fast engine")
        self.attack: PGD | None = None
        if method.adversarial and method.uses_recipe_attack and attack is not None:
            self.attack = check_attack(attack, method)
        if attack is not None and (method.adversarial or method.held_out):
            self._say([weakness(attack, method.longest_step(attack.eps))])
        self.loader = loader
        if method.replays_noise and loader is None:
            raise ValueError(f"{type(method).__name__} needs loader, whose length is the number of steps in an epoch")
        if method.replays_noise and (self.attack is None or not self.attack.random_start):
            raise UsageError(f"attack.random_start: got false, takes true with {method.label}")
        frozen: nn.Module | None = None
        self._unproven: list[SplitNet] = []  # networks that the first batch is still to check
        if isinstance(model, SplitNet) and not model.proven:
            self._unproven.append(model)
        if teacher is not None:
            whole = _split_teacher(teacher, model, self.device)
            frozen = whole.backbone
            if not whole.proven:
                self._unproven.append(whole)
        self.has_teacher = frozen is not None
        self.ema = EMA(model, ema_decay) if ema_decay else None
        self.augment = augment
        amp = resolve_amp(amp, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**12, enabled=amp == "fp16")
        self.generator = torch.Generator(self.device).manual_seed(seed)  # draws the attack's starts
        self.timer = self._phases = PhaseTimer(self.device)
        self.steps = 0
        self._checked: set[torch.Size] = set()  # shapes of images that the networks took
        self._changes = Changes(model)
        self._changed: str | None = None  # by the forward of the last step

        self.graphs: Graphs | None = None
        self._state: Any = None  # the optimizer's state whose tensors the recordings use
        self.engine: Engine
        if not self.fast:
            self.engine = Reference(self.modes, method, frozen, self.attack, attack_bn, self.ema, amp)
            return
        if self.attack is not None and attack_bn != "eval":
            raise UsageError(f"attack_bn: got {attack_bn!r}, takes eval with engine fast; reference has both")
        self.engine = Fast(self.modes, method, frozen, self.attack, self.ema, amp, self.console)
        self._compiled_for: set[torch.Size] = set()  # shapes of batches
        fuse(self.optimizer)
        if self.device.type == "cuda":
            if reason := needs_host(optimizer, self.scaler.is_enabled()):
                self.console.line(f"no CUDA graph: {type(optimizer).__name__} {reason}")
            else:
                self._replay(Graphs(self._recorded, self.device, self.console))

    def __call__(self, x: Tensor, y: Tensor, probe: bool = False) -> dict[str, Tensor]:
        """Train on one batch; returns detached scalars on the device: `loss`, the method's terms, accuracies.

        x: uint8 (B,H,W,3) or (B,3,H,W), or float (B,3,H,W) in [0,1]; y: (B,) class numbers. `augment`, if the step has
        one, is applied to uint8 batches. probe: True also measures the clean accuracy and the feature gaps, in eval
        mode with the weights before the update; this takes two more forward passes.
        Raises UsageError for images and labels that are something else. Values are checked in the first batch of each
        shape of images, and in every batch that comes on the CPU. That first batch also checks the networks: ValueError
        if the split one computes another function than its source, RunError if an output is not finite.
        """
        if not torch.is_grad_enabled():
            raise UsageError("a training step needs gradients, and torch.no_grad or torch.inference_mode is on")
        first = not isinstance(x, Tensor) or x.shape[1:] not in self._checked
        self._check_batch(x, y, first)
        with self.timer("inputs"):
            inputs = self._inputs(x, y)
        if first:
            self._check_networks(inputs[0], inputs[1])
            self._checked.add(x.shape[1:])
            self._changes.first()  # the checks themselves may have made some
        elif self.fast:
            self._follow(inputs[0], inputs[1])
        if align_state(self.optimizer) and self.graphs is not None:
            self.graphs.clear()
        if (flags := self._flags()) != self._trainable:
            self._trainable = flags
            self._say(check_optimizer(self.model, self.optimizer))
        held = None if self.graphs is None else tensors_held(self.model)
        weight = 0.0 if self.ema is None else self.ema.advance()
        if self.fast and inputs[0].shape not in self._compiled_for:
            run = self._compile
        else:
            run = self._launch
        recorded, replays = (0, 0) if self.graphs is None else (len(self.graphs.recorded), self.graphs.replays)
        metrics = run(inputs, weight, probe and self.method.adversarial)
        self.steps += 1
        # A replay runs no forward, but making a recording does.
        if self.fast and (
            self.graphs is None or self.graphs.replays == replays or len(self.graphs.recorded) > recorded
        ):
            self._changed = self._changes.first()
            if self._changed and self.graphs is not None and tensors_held(self.model) != held:
                self.graphs.refuse(f"the forward replaces tensors: {self._changed}")
        return metrics

    @torch.inference_mode(False)
    def averaged(self) -> nn.Module:
        """The model to evaluate: a copy of the weight average, or of the model if `ema_decay` is 0, in eval mode.

        Its weights require gradients where the model's do, so that it can be trained further.
        """
        averaged = copied_now(self.model).eval()
        if self.ema is not None:
            self.ema.follow()
            tensors = named_tensors(averaged)
            with torch.no_grad():
                for name, mean in named_tensors(self.ema.module).items():
                    tensors[name].copy_(mean)
        return averaged

    @property
    def arms(self) -> dict[str, Any]:
        """The chosen forms of the attack's convolutions and the machine that timed them; empty if none were timed."""
        chosen = self.engine.choice if isinstance(self.engine, Fast) else None
        return {} if chosen is None else chosen.state()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, generators included. Both engines write and read the same state."""
        optimizer = self.optimizer.state_dict()
        optimizer["param_groups"] = [group | {"lr": float(group["lr"])} for group in optimizer["param_groups"]]
        state: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": optimizer}
        state |= {"generator": self.generator.get_state(), "steps": self.steps, "scaler": self.scaler.state_dict()}
        state["torch_rng"] = torch.get_rng_state()  # a network with dropout draws from it
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
        """Continue from a `state_dict()`.

        Raises UsageError for a CPU's state on a GPU and for a GPU's state on a CPU: their generators differ.
        """
        if ("cuda_rng" in state) != (self.device.type == "cuda"):
            saved_on = "a GPU" if "cuda_rng" in state else "a CPU"
            raise UsageError(f"device: got {self.device.type}, and the saved state is that of a step on {saved_on}")
        self.model.load_state_dict(state["model"])
        in_place = restore(self.optimizer, state["optimizer"])
        in_place &= not align_state(self.optimizer)
        if self.fast:
            fuse(self.optimizer)
        if in_place:
            self._state = self.optimizer.state  # the recordings still use its tensors
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

    def _flags(self) -> list[tuple[int, bool]]:
        """The identity of each weight of the model, and whether it requires a gradient."""
        return [(id(p), p.requires_grad) for p in self.model.parameters()]

    def _say(self, lines: Sequence[str | None]) -> None:
        for line in lines:
            if line is not None:
                self.console.line(line)

    # -- what a step is made of -----------------------------------------------------------------------------------

    def _inputs(self, x: Tensor, y: Tensor) -> Inputs:
        """The batch and all random draws for it, on the device."""
        x, y = (t.clone() if t.is_inference() else t for t in (x, y))  # autograd saves no inference tensor
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
            assert self.loader is not None
            epoch = torch.full((), self.steps // len(self.loader) + 1, device=self.device)
        return x, y, offsets, flips, noise, epoch

    def _check_batch(self, x: Tensor, y: Tensor, first: bool) -> None:
        """Raise UsageError for images or labels that the step does not take. Only the first batch waits for a GPU."""
        if isinstance(x, Tensor) and x.dtype == torch.uint8:
            if x.dim() != 4 or 3 not in (x.shape[-1], x.shape[1]):
                raise UsageError(f"x: got uint8 {tuple(x.shape)}, takes (B,H,W,3) or (B,3,H,W)")
        else:
            check_images(x, values=first or (isinstance(x, Tensor) and x.device.type == "cpu"))
        if not len(x):
            raise UsageError(f"x: got {tuple(x.shape)}, takes at least one image")
        classes = self.model.classifier.out_features if isinstance(self.model, SplitNet) else None
        check_labels(y, len(x), classes, values=first or (isinstance(y, Tensor) and y.device.type == "cpu"))

    def _check_networks(self, images: Tensor, y: Tensor) -> None:
        """Run the networks on the first batch, in eval mode, and check what they return. This waits for the device."""
        x = self._pixels(images, None, None)
        for net in self._unproven:
            check_split(net, x)
        self._unproven.clear()
        with torch.no_grad(), examined(self.model), named_failure(x, "model"):
            logits = self.model(x)
        check_logits(logits, len(x), "model", finite=False)
        if not logits.isfinite().all():
            raise RunError("model: its output is not finite for the first batch")
        self.engine.check(x, y)

    def _follow(self, images: Tensor, y: Tensor) -> None:
        """Act on what has changed in the model beside the values of its tensors.

        Between two steps: a recorded step would still use what was there before. In the last step's forward: the
        attack's snapshot may not have it.
        """
        change = self._changes.first()
        if change and self.graphs is not None and self.graphs.recorded:
            self.graphs.clear()
            self.console.line(f"the step is recorded anew: {change}")
        if change or self._changed:
            self.engine.check(self._pixels(images, None, None), y)
            self._changes.first()

    def _run(
        self, inputs: Inputs, weight: float | Tensor, timer: PhaseTimer, probe: bool = False
    ) -> tuple[dict[str, Tensor], Seen]:
        """The step itself. It runs on the device alone: nothing here waits for it."""
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
        self.engine.join()  # what follows reads the teacher's features
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
                self.ema.follow()
                self.engine.average(weight)
        accuracy = "adversarial_accuracy" if self.method.adversarial else "clean_accuracy"
        correct = (out.logits.argmax(1) == y).float().mean()
        return {"loss": out.total.detach(), **out.terms, accuracy: correct, **probed}, (x, x_adv, teacher_features)

    def _attacked(self, x: Tensor, inputs: Inputs) -> Tensor:
        """x_adv (B,3,H,W), made from the images x (B,3,H,W)."""
        _, y, _, _, noise, _ = inputs
        return self.engine.perturb(x, noise, y)

    def feed(self, loader: Loader) -> Loader:
        """The loader whose batches this step trains on, made from the run's loader."""
        return loader

    def _loss(self, batch: Batch) -> Loss:
        return self.engine.loss(batch)

    def _update(self, batch: Batch) -> Loss:
        """One backward pass and one step of the optimizer."""
        out = self._loss(batch)
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)  # weights of another network, if it has any, are not moved
        self.scaler.scale(out.total).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return out

    def _pixels(self, images: Tensor, offsets: Tensor | None, flips: Tensor | None) -> Tensor:
        """The images in [0,1] (B,3,H,W): uint8 ones augmented and scaled, float ones as they are."""
        if images.dtype != torch.uint8:
            return images
        if self.augment is None or offsets is None or flips is None:
            x = to_unit(images)
        else:
            x = self.augment.apply(images, offsets, flips)
        return x.to(next(self.model.parameters()).dtype)

    def _probe(self, y: Tensor, x: Tensor, x_adv: Tensor, teacher_features: Tensor | None = None) -> dict[str, Tensor]:
        """The clean accuracy, and the gaps between f1 of x_adv and two kinds of natural features (Fig. 1a).

        `gap`: the teacher's features of x. `own_gap`: the student's f1 of x.
        """
        clean, logits = self.engine.f1(x)
        attacked, _ = self.engine.f1(x_adv)
        metrics = {"clean_accuracy": (logits.argmax(1) == y).float().mean(), **feature_gap(attacked, clean, "own_gap")}
        if teacher_features is None and self.has_teacher:
            teacher_features = self.engine.teacher_features(x)
            self.engine.join()
        if teacher_features is not None:
            metrics |= feature_gap(attacked, teacher_features, "gap")
        return metrics

    # -- how it is launched ---------------------------------------------------------------------------------------

    def _launch(self, inputs: Inputs, weight: float, probe: bool) -> dict[str, Tensor]:
        """Run the step, from a CUDA graph if there are any; returns the metrics."""
        with self.engine.launching():
            if self.graphs is None:
                return self._run(inputs, weight, self._phases, probe)[0]
            with self.timer("step"):
                self._set_scalars(weight)
                values, *tensors = self.graphs(*inputs)
                metrics = dict(zip(self._names, values.clone().unbind()))  # the next step overwrites `values`
                seen, grads = tensors[: self._seen], tensors[self._seen :]
                for parameter, grad in zip(self._trained, grads, strict=True):
                    parameter.grad = grad  # a replay writes into the gradients of its recording
            if probe:  # the attack's snapshot still has the weights before the update
                with self.timer("probe"):
                    metrics |= self._probe(inputs[1], *seen)
            return metrics

    def _compile(self, inputs: Inputs, weight: float, probe: bool) -> dict[str, Tensor]:
        """`_launch` for the first batch of a shape: the first call of each part compiles it."""
        shape = tuple(inputs[0].shape)
        folder = keep_compiled(self.device)
        self.console.line(
            f"compiling the step for batches of {shape}, a minute or two if {folder} does not have it yet"
        )
        began = time.perf_counter()
        phases, self._phases = self._phases, PhaseTimer(torch.device("cpu"))
        timer, self.timer = self.timer, PhaseTimer(self.device)  # off: this step counts as the phase "compile" alone
        self._phases.on = True
        try:
            with timer("compile"):
                metrics = self._launch(inputs, weight, probe)
        finally:
            spent, self._phases, self.timer = self._phases.collect(), phases, timer
        self._compiled_for.add(inputs[0].shape)
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in spent.items() if seconds >= 0.05)
        self.console.line(f"compiled in {time.perf_counter() - began:.1f} s ({parts})")
        return metrics

    def _replay(self, graphs: Graphs) -> None:
        """From now on, launch every step through `graphs`."""
        self.graphs = graphs
        self._weight = torch.zeros((), device=self.device)
        self._rates: list[Tensor] = []
        self._phases = PhaseTimer(torch.device("cpu"))  # only on while compiling: a graph has no phases

    def _recorded(self, *inputs: Any) -> tuple[Tensor, ...]:
        """`_run` in the form that `Graphs` records: tensors in, a tuple of tensors out."""
        metrics, seen = self._run(inputs, self._weight, self._phases)
        tensors = [t for t in seen if t is not None]
        self._names, self._seen = tuple(metrics), len(tensors)
        self._trained = [p for p in self.model.parameters() if p.grad is not None]
        grads = [p.grad for p in self._trained if p.grad is not None]
        return torch.stack([value.float() for value in metrics.values()]), *tensors, *grads

    def _set_scalars(self, weight: float) -> None:
        """Copy the average's weight and the learning rates to the device, where the recorded graph reads them."""
        assert self.graphs is not None
        self._weight.fill_(weight)
        groups = self.optimizer.param_groups
        if self.optimizer.state is not self._state or len(groups) != len(self._rates):  # state loaded, group added
            fuse(self.optimizer)
            self.graphs.clear()
            self._state, self._rates = self.optimizer.state, [torch.zeros((), device=self.device) for _ in groups]
        for group, held in zip(groups, self._rates, strict=True):
            if group["lr"] is not held:  # set since the last step
                held.fill_(group["lr"])
                group["lr"] = held


def feature_gap(u: Tensor, v: Tensor, name: str) -> dict[str, Tensor]:
    """The mean distances between features u and v (B,D): `name`_l1, `name`_l2, `name`_linf, `name`_cosine (1 - cos)."""
    difference = u.float() - v.float()
    gap = {f"{name}_{norm}": difference.norm(p=p, dim=1).mean() for norm, p in NORMS.items()}
    return {**gap, f"{name}_cosine": angular_distance(u.float(), v.float())}


NORMS = {"l1": 1.0, "l2": 2.0, "linf": float("inf")}


def check_attack(attack: object, method: Method) -> PGD:
    """The attack, if the step can run it; UsageError, which names it, if not."""
    if not isinstance(attack, PGD):
        name = getattr(attack, "__name__", type(attack).__name__)
        raise UsageError(
            f"attack: got {name}, takes a fastafd.PGD with {method.label}; a subclass with its own `ascent` climbs"
            " another loss"
        )
    if type(attack).__call__ is not PGD.__call__ or overrides(attack, "perturb"):
        raise UsageError(
            f"attack: {type(attack).__name__} has its own __call__, which a step does not call; override `ascent` (the"
            " gradient to climb), `target`, `draw` (the start) or `climb` (the steps)"
        )
    return attack


def _split_teacher(teacher: nn.Module, student: nn.Module, device: torch.device) -> SplitNet:
    """A frozen copy of the teacher. ValueError if the width of its features differs from the student's."""
    if isinstance(teacher, SplitNet):
        whole = copy.deepcopy(teacher)
    else:
        name = student.linear_name if isinstance(student, SplitNet) else None
        try:
            whole = split(teacher, classifier=name)  # the layer that the user may have named for the student
        except ValueError:
            whole = split(teacher)
    if isinstance(student, SplitNet) and whole.classifier.in_features != student.classifier.in_features:
        raise ValueError(
            f"the teacher has {whole.classifier.in_features} features, the model {student.classifier.in_features}"
        )
    return whole.to(device).eval().requires_grad_(False)
