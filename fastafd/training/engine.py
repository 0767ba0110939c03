"""The expensive parts of a step, in plain PyTorch (`Reference`) and compiled (`Fast`).

Both engines have the same parts, which the step calls in one order: the teacher's features, the attack, the loss, and
the features in eval mode that a probe measures.

The fast engine runs PGD on a snapshot of the student whose BatchNorms are folded into its convolutions. The snapshot is
refreshed once a step, and only the gradient of the input is computed; one PGD iteration, gradient included, is compiled
and called in a loop. The teacher is a snapshot that never changes. The update uses the model itself in train mode.
Attack and update are two compiled functions, and no module is switched between train and eval mode.

Both snapshots are compared with the networks themselves at the first batch of a shape. That of the student is compared
again when the student has changed something else than the values of its tensors (`fastafd.training.changes`). Where
they differ, the network itself takes the snapshot's place, and a line says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastafd.attacks import PGD, Choice, Snapshot, check_target, input_gradient, machine, overrides, weights_of
from fastafd.console import Console
from fastafd.device import AMP, algorithms_by_trial, autocast, true_fp32
from fastafd.kernels import linf_step
from fastafd.kernels.operation import references
from fastafd.methods import Batch, Loss, Method
from fastafd.models import Disentangled, Modes, SplitNet, eval_mode, examined, frozen
from fastafd.settings import cache_dir, unknown
from fastafd.training.ema import EMA

ENGINES = ("reference", "fast")
# Inductor's options for functions of many small kernels: kernels that do not depend on each other become one launch.
# Reductions are left alone; the limits are the defaults of newer versions of PyTorch.
COMBINED = {
    "combo_kernels": True,
    "combo_kernels_pointwise_only": True,
    "combo_kernel_foreach_dynamic_shapes": False,
    "combo_kernel_max_num_nodes": 64,
    "combo_kernel_peak_memory_pct_threshold": None,
}


class Engine(Protocol):
    """What a step needs from an engine. Shapes: x, x_adv, noise (B,3,H,W), in [0,1]; y (B,) int64; features (B,D)."""

    amp: torch.dtype | None  # autocast type of the forward passes; None: the weights' type, without autocast

    def launching(self) -> AbstractContextManager[None]:
        """The context of a whole step: it decides which kernels the step may launch."""
        ...

    def check(self, x: Tensor, y: Tensor) -> None:
        """Check on images x and labels y that the attack and the teacher see the networks as they are.

        UsageError for an attack whose `target` cannot be climbed away from.
        """
        ...

    def teacher_features(self, x: Tensor) -> Tensor:
        """The teacher's features of x (B,D). Call `join` before reading them."""
        ...

    def join(self) -> None:
        """Let later work wait for the teacher's features, if they were asked for."""
        ...

    def perturb(self, x: Tensor, noise: Tensor | None, y: Tensor) -> Tensor:
        """x_adv: the attack on the f1 path."""
        ...

    def loss(self, batch: Batch) -> Loss:
        """The method's loss, BatchNorm in train mode."""
        ...

    def average(self, weight: float | Tensor) -> None:
        """Move the weight average towards the model, if there is one."""
        ...

    def f1(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The features f1 (B,D) and their logits (B,C), in eval mode, with the weights before the update."""
        ...


class Reference:
    """The engine in plain PyTorch."""

    def __init__(
        self,
        modes: Modes,
        method: Method,
        teacher: nn.Module | None,
        attack: PGD | None,
        attack_bn: str,
        ema: EMA | None,
        amp: str,
    ):
        self.model, self.modes, self.method, self.teacher = modes.net, modes, method, teacher
        self.attack, self.attack_bn, self.ema = attack, attack_bn, ema
        self.device, self.amp = next(self.model.parameters()).device, AMP[amp]

    def launching(self) -> AbstractContextManager[None]:
        """Run the eager reference of every operation, on CUDA too: the fast engine is compared with plain PyTorch."""
        return references()

    def check(self, x: Tensor, y: Tensor) -> None:
        if self.attack is not None and self.method.adversarial and overrides(self.attack, "target"):
            with torch.no_grad(), examined(self.model), autocast(self.device, self.amp):
                check_own_target(self.attack, self.model(x), y)

    def teacher_features(self, x: Tensor) -> Tensor:
        assert self.teacher is not None
        with torch.no_grad(), autocast(self.device, self.amp):
            return self.teacher(x)

    def join(self) -> None:
        """Nothing to wait for: `teacher_features` runs on the current stream."""

    def perturb(self, x: Tensor, noise: Tensor | None, y: Tensor) -> Tensor:
        assert self.attack is not None
        if self.attack_bn == "train":
            self.modes.train()
        else:
            self.model.eval()
        with frozen(self.model), autocast(self.device, self.amp):
            return self.attack.climb(self.attack.ascent(self.model, x, y), x, noise)

    def loss(self, batch: Batch) -> Loss:
        self.modes.train()
        with autocast(self.device, self.amp):
            return self.method.loss(self.model, batch)

    def average(self, weight: float | Tensor) -> None:
        if self.ema is not None:
            self.ema.move(weight)

    @torch.no_grad()
    def f1(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.model, SplitNet)
        self.model.eval()
        with autocast(self.device, self.amp):
            f1 = self.model.f1(x)
            return f1, self.model.classifier(f1)


class Fast:
    """The engine whose parts are compiled; the teacher and the attack run on snapshots."""

    snapshot: Snapshot | None = None
    itself: Reference | None = None  # attacks the model itself, if the snapshot computes another function
    _attacked: Attacked | None = None  # the classifier of an attack that computes its own gradient
    _logits: Callable[[Tensor], Tensor] | None = None  # for an attack with a target of its own
    choice: Choice | None = None  # chooses the forms of the snapshot's convolutions
    side: torch.cuda.Stream | None = None  # the teacher's stream, on CUDA
    _teaching = False  # True while the side stream may have work that `join` must wait for

    def __init__(
        self,
        modes: Modes,
        method: Method,
        teacher: nn.Module | None,
        attack: PGD | None,
        ema: EMA | None,
        amp: str,
        console: Console,
    ):
        self.model = model = modes.net
        self.modes, self.method, self.attack, self.ema, self.console = modes, method, attack, ema, console
        first = next(model.parameters())
        self.device, self.weights, self.amp = first.device, first.dtype, AMP[amp]
        self._amp = amp
        keep_compiled(self.device)
        dtype = self.amp or first.dtype
        if method.adversarial and attack is not None:
            if not isinstance(model, SplitNet):
                raise ValueError(
                    f"the fast engine attacks fastafd.disentangle(net) or fastafd.models.split(net),"
                    f" not {type(model).__name__}"
                )
            d1 = model.d1 if isinstance(model, Disentangled) else None
            parts = model.classifier, d1, model.log_softmax
            self.snapshot = Snapshot(model.backbone, dtype, *parts)
            self._exact = Snapshot(model.backbone, self.weights, *parts)  # compared with the model
            self._layers = [*model.modules()]
            self.choice = Choice(self.snapshot, self.device, console)
            self.refresh = Compiled("the snapshot", self.snapshot.refresh, console, options=COMBINED)
            self._gradient: Callable[[Tensor, Tensor], Tensor] = self.snapshot.gradient
            if self.snapshot.reason is None:
                self._gradient = Compiled("the attack", self.snapshot.gradient, console, in_pieces=False)
            else:
                console.line(f"the attack sees BatchNorm in eval mode, not folded: {self.snapshot.reason}")
                self.snapshot.net = torch.compile(self.snapshot.net, dynamic=False)  # type: ignore[assignment]
            if overrides(attack, "ascent"):
                console.line(f"the attack {type(attack).__name__} has its own gradient: its loss runs uncompiled")
                self._attacked = Attacked(Compiled("the attacked network", self.snapshot.logits, console), model)
            elif overrides(attack, "target"):
                self._logits = Compiled("the attacked network", self.snapshot.logits, console)
        self.teacher = teacher
        self._taught: set[torch.Size] = set()  # shapes of images for which the teacher's snapshot was compared
        if teacher is not None:
            taught = Snapshot(teacher, dtype)
            taught.refresh()
            self._teacher: Callable[[Tensor], Tensor] = taught.features
            if method.uses_teacher:
                self._teacher = Compiled("the teacher", taught.features, console)
        self._f1: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
        if self.snapshot is not None:  # compiled if every step calls it, eager if only a probe does
            self._f1 = Compiled("f1", self.snapshot.f1, console) if method.replays_noise else self.snapshot.f1
        self._loss = Compiled("the update", self._forward, console, options=COMBINED)
        self._average: Callable[[float | Tensor], None] | None = None
        if ema is not None:  # on a CPU the eager average is one call already
            self._average = (
                Compiled("the average", ema.move, console, options=COMBINED) if self.device.type == "cuda" else ema.move
            )
        if self.device.type == "cuda":
            self.side = torch.cuda.Stream(self.device)

    def launching(self) -> AbstractContextManager[None]:
        return algorithms_by_trial()

    def check(self, x: Tensor, y: Tensor) -> None:
        x, y = x[:COMPARED].clone(), y[:COMPARED]
        if self.teacher is not None and x.shape not in self._taught:
            self._taught.add(x.shape)
            if self._teacher is not self.teacher and not teaches_the_same(self.teacher, x, self.weights):
                self.console.line("the teacher's features are computed by the network itself: its snapshot has others")
                self._teacher = self.teacher
        if self.snapshot is None or self.itself is not None:
            return
        assert isinstance(self.model, SplitNet) and self.attack is not None
        if overrides(self.attack, "target"):
            with torch.no_grad(), examined(self.model):
                check_own_target(self.attack, self.model(x), y)
        if difference := self._difference(x) or self._other_ascent(x, y):
            self.console.line(
                f"the attack runs uncompiled, on the model itself: a snapshot of it has other {difference}"
            )
            self.itself = Reference(self.modes, self.method, None, self.attack, "eval", self.ema, self._amp)
            self.snapshot = self.choice = None

    def _other_ascent(self, x: Tensor, y: Tensor) -> str | None:
        """A word if the attack's own `ascent` gets another gradient from the snapshot than from the model."""
        if self._attacked is None:
            return None
        assert self.attack is not None
        gradients = []
        with references(), true_fp32():
            for classifier in (self.model, Attacked(self._exact.logits, self.model)):
                with examined(self.model), frozen(self.model):
                    torch.manual_seed(0)
                    try:
                        gradient = self.attack.ascent(classifier, x, y)
                        gradients.append(gradient(x.clone().requires_grad_()).detach())
                    except Exception:
                        if classifier is self.model:
                            raise
                        return "attributes, which its ascent uses"
        return None if near(gradients[1], gradients[0], 30) else "gradients for its ascent"

    def _difference(self, x: Tensor) -> str | None:
        """What the snapshot computes otherwise than the model in eval mode on the images x; None if nothing."""
        assert isinstance(self.model, SplitNet)
        model, exact = self.model, self._exact
        if self._layers != [*model.modules()] or not exact.fits():
            return "layers"
        exact.refresh()
        with references(), true_fp32(), examined(model), frozen(model):
            with torch.no_grad():
                logits = model(x)
            target = logits.argmin(1)  # a network that is certain has no gradient at its own class
            gradient = input_gradient(model, x.clone().requires_grad_(), target)
            self.modes.train()  # as during the attack: a function that the snapshot kept may use the model itself
            with torch.no_grad():
                if not near(exact.logits(x), logits, 1):
                    return "logits"
            others = exact.gradient(x.clone().requires_grad_(), target)
        return None if near(others, gradient, 30) else "gradients"

    def teacher_features(self, x: Tensor) -> Tensor:
        """The teacher's features, on CUDA on a side stream, so that they are computed beside the attack."""
        if self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream(self.device))
            self._teaching = True
        with torch.cuda.stream(self.side), torch.no_grad(), autocast(self.device, self.amp):
            return self._teacher(x)

    def perturb(self, x: Tensor, noise: Tensor | None, y: Tensor) -> Tensor:
        if self.itself is not None:
            return self.itself.perturb(x, noise, y)
        attack, snapshot = self.attack, self.snapshot
        assert attack is not None and snapshot is not None and self.choice is not None
        with autocast(self.device, self.amp):
            self.choice.choose(x)
        self.refresh()
        leaf = snapshot.leaf or x.dtype
        # A `climb` of the attack's own takes what it is documented to take; the kernel belongs to PGD's.
        steps = () if overrides(attack, "climb") else (linf_step,)
        with autocast(self.device, self.amp):
            if self._attacked is not None:
                with self._attacked.open():
                    return attack.climb(attack.ascent(self._attacked, x, y), x, noise, *steps)
            target = y
            if self._logits is not None:
                logits = self._logits
                with torch.no_grad():
                    target = weights_of(attack.target(lambda: logits(x), y), len(snapshot.weight))

            def gradient(x_adv: Tensor) -> Tensor:
                return self._gradient(x_adv.detach().to(leaf).requires_grad_(), target)

            return attack.climb(gradient, x, noise, *steps)

    def loss(self, batch: Batch) -> Loss:
        self.modes.train()
        return self._loss(batch)

    def join(self) -> None:
        """Let the current stream wait for the teacher's stream."""
        if self.side is not None and self._teaching:
            torch.cuda.current_stream(self.device).wait_stream(self.side)
            self._teaching = False

    def average(self, weight: float | Tensor) -> None:
        if isinstance(self._average, Compiled) and not isinstance(weight, Tensor):
            # A Python number would make Dynamo compile anew in every step.
            weight = torch.full((), weight, dtype=self.weights, device=self.device)
        if self._average is not None:
            self._average(weight)

    @torch.no_grad()
    def f1(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.itself is not None:
            return self.itself.f1(x)
        assert self._f1 is not None
        with autocast(self.device, self.amp):
            return self._f1(x)

    def _forward(self, batch: Batch) -> Loss:
        with autocast(self.device, self.amp):
            return self.method.loss(self.model, batch)


COMPARED = 8  # images on which a snapshot is compared with its network


def near(result: Tensor, expected: Tensor, factor: float) -> bool:
    """True if the tensors differ, in the norm, by rounding alone.

    factor: what rounding errors may be multiplied by; a ReLU near zero may be active on one side alone.
    """
    bound = min(0.5, factor * {torch.float64: 1e-8, torch.float32: 1e-3}.get(expected.dtype, 0.1))
    if not expected.isfinite().all():  # the step itself says so
        return True
    difference = (result.double() - expected.double()).norm()
    return bool(difference <= bound * expected.double().norm() + torch.finfo(torch.float32).tiny)


def teaches_the_same(teacher: nn.Module, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a snapshot of the teacher has the teacher's features of the images x (B,3,H,W)."""
    snapshot = Snapshot(teacher, dtype)
    snapshot.refresh()
    with torch.no_grad(), true_fp32(), examined(teacher):
        return near(snapshot.features(x), teacher(x), 1)


def check_own_target(attack: PGD, logits: Tensor, y: Tensor) -> None:
    """Raise UsageError if the attack's own `target` returns something that the cross-entropy does not take."""
    target = attack.target(lambda: logits, y)
    check_target(target, len(y), logits.shape[1], type(attack).__name__)


class Attacked:
    """The network that an attack with a gradient of its own gets from the fast engine.

    Calling it runs the compiled snapshot. Everything else, such as its features, is that of the model, which is in eval
    mode while it is `open`.
    """

    def __init__(self, logits: Callable[[Tensor], Tensor], model: nn.Module):
        self._compiled, self._model = logits, model

    def __call__(self, x: Tensor) -> Tensor:
        return self._compiled(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @contextmanager
    def open(self) -> Iterator[None]:
        with eval_mode(self._model), frozen(self._model):
            yield


class Compiled:
    """A function that is compiled as one graph for each shape that it is called with.

    If that fails, one line says why. Then the function is compiled in pieces, or, with `in_pieces` False, runs eagerly.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        console: Console,
        in_pieces: bool = True,
        options: dict[str, Any] | None = None,
    ):
        """options: Inductor's options; those that this version of PyTorch does not have are left out."""
        self.name, self.original, self.console, self.in_pieces = name, function, console, in_pieces
        known = torch._inductor.list_options() if options else []
        self.options = options = {key: value for key, value in (options or {}).items() if key in known}
        self.function = torch.compile(function, fullgraph=True, dynamic=False, options=options)

    def __call__(self, *inputs: Any) -> Any:
        # Dynamo counts one cache entry per step object and shape; its default limit of 8 is too low.
        # Without its guards of hooks, a hook that is registered later would not run.
        with torch._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=64, skip_nnmodule_hook_guards=False):
            try:
                return self.function(*inputs)
            except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError) as error:
                how = "is compiled in pieces" if self.in_pieces else "runs uncompiled"
                self.console.line(f"{self.name} {how}: {str(error).strip().splitlines()[0]}")
                self.function = self.original
                if self.in_pieces:
                    self.function = torch.compile(self.original, dynamic=False, options=self.options)
                return self.function(*inputs)


def resolve_engine(engine: str, device: torch.device) -> str:
    """The engine, "fast" or "reference".

    "auto" is fast on CUDA and reference on a CPU, where compiling takes a minute.
    """
    if engine == "auto":
        return "fast" if device.type == "cuda" else "reference"
    if engine not in ENGINES:
        raise unknown("engine", engine, ["auto", *ENGINES])
    return engine


def engine_of(method: Method, engine: str, device: torch.device, console: Console) -> str:
    """`resolve_engine` for a method. If the method runs on the reference engine alone, a line says so."""
    resolved = resolve_engine(engine, device)
    if resolved == "fast" and method.only_reference:
        console.line(f"{method.label} runs uncompiled, on the reference engine: {method.only_reference}")
        return "reference"
    return resolved


def keep_compiled(device: torch.device) -> Path:
    """Let the compilers keep their results in the cache folder from one run to the next; returns that folder.

    Each combination of PyTorch, CUDA, Triton and GPU has its own folder. If the environment already names a folder
    (TORCHINDUCTOR_CACHE_DIR), that one is used.
    """
    folder = cache_dir() / "compiled" / re.sub(r"[^A-Za-z0-9.]+", "-", machine(device))
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
