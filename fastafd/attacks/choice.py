"""Choosing the form of each convolution of a snapshot: the plain one, unless another was faster on this device.

Each convolution is timed together with its input's gradient, compiled, in the plain form and in turn in every form that
applies. A form is taken if it needs at most 1 - MARGIN of the plain form's seconds. Two such forms are tried together,
and taken together if that is faster by the same margin again. A form that fails, or whose results differ from the plain
form's by more than BOUNDS, is never taken.
Timings are kept in the cache folder, in a file for each PyTorch, CUDA, Triton and GPU; if the file is deleted, they are
made anew. The convolutions with most arithmetic come first. After BUDGET_S seconds a run starts no further timing: the
remaining convolutions stay plain, and the next run continues. On a CPU nothing is timed.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastafd.attacks.arms import ARMS, Form, goes_together, site_of
from fastafd.attacks.folded import Folded
from fastafd.attacks.snapshot import Snapshot
from fastafd.capture import interleaved_seconds
from fastafd.console import Console
from fastafd.files import as_json, save_text
from fastafd.settings import RunError, cache_dir

MARGIN = 0.05  # share of the plain form's seconds that a form must save
BUDGET_S = 120.0  # seconds, compilation included, after which a run starts no further timing
SETS = 4  # input sets of a timed call, so that not all of them stay in the L2 cache
# The largest relative distance, in the norm, of a form's output and gradients from the plain form's. In low precision a
# ReLU whose input is near zero may be active in one form and not in the other: one in 5,000 of them makes 0.02.
BOUNDS = (0.02, 0.1)
BOUNDS_FLOAT64 = (1e-9, 1e-9)

TEMPORARY = (torch.OutOfMemoryError, torch.AcceleratorError)  # failures that are not the form's fault

Clock = Callable[[dict[str, Callable[[], Any]]], dict[str, float]]  # measures the calls in turn: the seconds of each


class Case(NamedTuple):
    """A convolution of the network at one batch shape; x and residual are on the meta device."""

    folded: Folded
    x: Tensor
    residual: Tensor | None

    @property
    def products(self) -> int:
        """The number of its multiplications, without corrections for the borders."""
        rows, columns = self.folded.conv.stride
        return self.x.shape[0] * self.x.shape[2:].numel() // (rows * columns) * self.folded.conv.weight.numel()

    @property
    def key(self) -> str:
        """Everything that its time depends on, as text."""
        conv = self.folded.conv
        words = [sizes(self.x.shape), sizes(conv.weight.shape), f"stride {sizes(conv.stride)}"]
        words += [f"padding {conv.padding if isinstance(conv.padding, str) else sizes(conv.padding)}"]
        if self.residual is not None:
            other = self.residual
            words.append(f"residual {sizes(other.shape)} {other.dtype}" if isinstance(other, Tensor) else "residual")
        words += ["relu"] * self.folded.relu + ["other"] * (site_of(conv, self.folded.relu) is None)
        return ", ".join([*words, str(conv.weight.dtype)]).replace("torch.", "")

    def applies(self, name: str) -> bool:
        """True if the arm of that name applies to this convolution."""
        site = site_of(self.folded.conv, self.folded.relu)
        of_tensors = self.residual is None or isinstance(self.residual, Tensor)
        return site is not None and of_tensors and ARMS[name].applies(site, self.folded.conv.weight, *self[1:])


class Choice:
    """The forms of a snapshot's convolutions, chosen at the first batch of a shape.

    clock: times the forms; by default replays of CUDA graphs on CUDA, and None, which times nothing, on a CPU.
    compile: compiles a function before it is timed. `forced`: a form whose arms are taken wherever they apply, without
    timing.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        device: torch.device,
        console: Console,
        clock: Clock | None = None,
        compile: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    ):
        self.snapshot, self.device, self.console = snapshot, device, console
        self.clock = clock
        if clock is None and device.type == "cuda":
            self.clock = lambda calls: interleaved_seconds(calls, device)
        self.compile = compile or (lambda function: torch.compile(function, fullgraph=True, dynamic=False))
        self.forced: Form | None = None
        self.chosen: dict[str, str] = {}  # name of the form by key of the case
        self._kept: dict[str, str] = {}  # the same, from the run that this one continues
        self._shapes: set[tuple[int, ...]] = set()  # of the batches that forms were chosen for
        self._left = BUDGET_S  # remaining seconds
        self._untimed: set[str] = set()  # keys of cases that no time was left for

    def follow(self, other: Choice) -> None:
        """Take the current forms of another snapshot of the same network, and time nothing from now on."""
        self.clock = None
        modules = zip(self.snapshot.modules(), other.snapshot.modules(), strict=True)
        for ours, theirs in modules:
            if isinstance(ours, Folded) and isinstance(theirs, Folded):
                for shape, form in theirs.forms.items():
                    ours.take(shape, form)

    def choose(self, x: Tensor) -> None:
        """Give every convolution its form for images of x's shape (B,3,H,W), if that shape is new."""
        shape = tuple(x.shape)
        if shape in self._shapes or (self.clock is None and self.forced is None) or self.snapshot.reason is not None:
            return
        self._shapes.add(shape)
        self.snapshot.refresh()
        cases = self._cases(x)
        if self.forced is not None:
            for case in cases:
                case.folded.take(tuple(case.x.shape), tuple(name for name in self.forced if case.applies(name)))
            return
        began, new = time.perf_counter(), False
        by_key, keys = {case.key: case for case in cases}, Counter(case.key for case in cases)
        missing = [key for key in by_key if key not in self._kept]
        if missing:
            path = cache_dir() / "arms" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', machine(self.device))}.json"
            timings = read_timings(path)
            if any(key not in timings for key in missing):
                self.console.line(
                    f"timing forms of {len(missing)} convolutions, once for this GPU and batch size, about"
                    f" {self._left:.0f} s at most"
                )
            for key in sorted(missing, key=lambda key: -keys[key] * by_key[key].products):
                before = as_json(timings)
                self.chosen[key] = name_of(self._best(by_key[key], timings.setdefault(key, {})))
                if as_json(timings) != before:
                    new = True
                    with suppress(RunError):  # if the disk is full, the next run times again
                        save_text(path, as_json(timings) + "\n")
        self.chosen |= {key: self._kept[key] for key in by_key if key in self._kept}
        for case in cases:
            case.folded.take(tuple(case.x.shape), form_of(self.chosen[case.key]))
        counts = Counter(self.chosen[case.key] for case in cases)
        forms = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        spent = f", timed in {time.perf_counter() - began:.0f} s" if new else ""
        if self._untimed:
            spent += f"; {len(self._untimed)} are left to the next run to time"
        self.console.line(f"forms of the attack's {len(cases)} convolutions: {forms}{spent}")

    def state(self) -> dict[str, Any]:
        """The chosen forms and the machine that they were chosen on; empty if none were chosen."""
        return {"machine": machine(self.device), "forms": dict(self.chosen)} if self.chosen else {}

    def keep(self, state: dict[str, Any]) -> None:
        """Choose the forms of an earlier run, from its `state()`. If that ran on another machine, a line says so."""
        here = machine(self.device)
        if state["machine"] != here:
            self.console.line(
                f"the forms of convolutions are chosen anew: the run started on {state['machine']}, this is {here}"
            )
            return
        self._kept = {key: name for key, name in state["forms"].items() if all(arm in ARMS for arm in form_of(name))}
        if gone := sorted(set(state["forms"].values()) - set(self._kept.values())):
            self.console.line(
                f"the run started with forms that no longer exist; they are chosen anew: {', '.join(gone)}"
            )

    # -- timing ---------------------------------------------------------------------------------------------------

    def _cases(self, x: Tensor) -> list[Case]:
        """The convolutions of the snapshot, in the order of their calls for the images x."""
        cases: list[Case] = []

        def note(folded: Any, inputs: tuple[Any, ...]) -> None:
            images, *rest = (v.to("meta") if isinstance(v, Tensor) else v for v in inputs)
            cases.append(Case(folded, images.to(folded.conv.weight.dtype), *(rest or [None])))

        hooks = [m.register_forward_pre_hook(note) for m in self.snapshot.modules() if isinstance(m, Folded)]
        with torch.no_grad():
            self.snapshot(x)
        for hook in hooks:
            hook.remove()
        return cases

    def _best(self, case: Case, row: dict[str, Any]) -> Form:
        """The best form of a case; new timings are added to its row."""
        tried = Trial(case, self.device, self.compile)
        ratios = {name: self._ratio(tried, (name,), row) for name in ARMS if case.applies(name)}
        winners = sorted((ratio, name) for name, ratio in ratios.items() if ratio < 1 - MARGIN)
        best, form = 1.0, ()  # type: tuple[float, Form]
        for ratio, name in winners:
            if not goes_together((*form, name)):
                continue
            ratio = self._ratio(tried, (*form, name), row) if form else ratio
            if ratio < (1 - MARGIN) * best:
                best, form = ratio, (*form, name)
        return form

    def _ratio(self, tried: Trial, form: Form, row: dict[str, Any]) -> float:
        """The seconds of the form divided by those of the plain form; infinite if the form does not work."""
        name = name_of(form)
        if name not in row and self._left <= 0:
            self._untimed.add(tried.case.key)
            return float("inf")
        if name not in row:
            began = time.perf_counter()
            try:
                row[name] = self._measured(tried, form)
            except TEMPORARY as error:  # another run may succeed
                self.console.line(f"{name} is not timed for {tried.case.key}: {first_line(error)}")
                return float("inf")
            finally:
                self._left -= time.perf_counter() - began
            if isinstance(row[name], str):
                self.console.line(f"{name} is not used for {tried.case.key}: {row[name]}")
        return float("inf") if isinstance(row[name], str) else row[name]["us"] / row[name]["plain_us"]

    def _measured(self, tried: Trial, form: Form) -> dict[str, float] | str:
        """The microseconds of the form and of the plain form, or the reason why they cannot be measured."""
        assert self.clock is not None
        try:
            plain, other = tried.call(()), tried.call(form)
            wrong = difference(other()[0], plain()[0])
            if wrong:
                return wrong
            seconds = self.clock({"plain": plain, name_of(form): other})
        except TEMPORARY:
            raise
        except Exception as error:  # a compiler or a library may raise anything
            return f"{type(error).__name__}: {first_line(error)}"
        us = {name: 1e6 * value / SETS for name, value in seconds.items()}
        return {"us": round(us[name_of(form)], 3), "plain_us": round(us["plain"], 3)}


class Trial:
    """A case with random inputs, run as the attack runs it, in any form."""

    def __init__(self, case: Case, device: torch.device, compile: Callable[..., Any]):
        self.case, self.compile = case, compile
        self.calls: dict[Form, Callable[[], list[tuple[Tensor, ...]]]] = {}
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)  # the device's default generator belongs to the run
        self.sets: list[tuple[Tensor, ...]] = []

    def call(self, form: Form) -> Callable[[], list[tuple[Tensor, ...]]]:
        """A function that runs the form on all input sets: outputs, gradients of the inputs and of the residuals."""
        if not self.sets:
            with torch.no_grad():
                like = self.case.folded.conv.weight, self.case.residual
                out = copy.deepcopy(self.case.folded).to("meta")(self.case.x, self.case.residual)
                inputs = [self.case.x, *([] if like[1] is None else [like[1]])]
            self.sets = [tuple(self._drawn(v) for v in (*inputs, out)) for _ in range(SETS)]
        if form not in self.calls:
            folded = copy.deepcopy(self.case.folded)
            folded.take(tuple(self.case.x.shape), form)

            def run(*operands: Tensor) -> tuple[Tensor, ...]:
                *leaves, g = operands
                out = folded(*leaves)
                return out.detach(), *torch.autograd.grad(out, leaves, g)

            compiled = self.compile(run)

            def all_sets() -> list[tuple[Tensor, ...]]:
                patch = torch._dynamo.config.patch
                with patch(trace_autograd_ops=True, recompile_limit=4096, accumulated_recompile_limit=4096):
                    return [compiled(*(v.detach().requires_grad_() for v in leaves), g) for *leaves, g in self.sets]

            self.calls[form] = all_sets
        return self.calls[form]

    def _drawn(self, like: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, device=self.device, generator=self.generator).to(like.dtype)
        return drawn.contiguous(memory_format=torch.channels_last)


def difference(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str:
    """How an output and its gradients differ from the plain form's; empty if they do not differ too much."""
    for index, (result, plain) in enumerate(zip(results, expected, strict=True)):
        bound = (BOUNDS_FLOAT64 if plain.dtype == torch.float64 else BOUNDS)[min(index, 1)]
        off, norm = (result.double() - plain.double()).norm().item(), plain.double().norm().item()
        if result.shape != plain.shape or result.dtype != plain.dtype or not off <= bound * norm:
            what = "its output" if index == 0 else "a gradient"
            return f"wrong: {what} is off by {off / norm if norm else off:.1%} of the plain form's norm"
    return ""


def first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def machine(device: torch.device) -> str:
    """The versions and the device that compiled code and timings are valid for, as text."""
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return f"torch {torch.__version__} cuda {torch.version.cuda} triton {triton} {where}"


def read_timings(path: Path) -> dict[str, dict[str, Any]]:
    """The timings in a file; empty if the file does not exist or holds something else."""
    try:
        rows = {str(key): dict(row) for key, row in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    timed = all(isinstance(v, str) or {"us", "plain_us"} <= set(v) for row in rows.values() for v in row.values())
    return rows if timed else {}


def name_of(form: Form) -> str:
    return "+".join(form) or "plain"


def form_of(name: str) -> Form:
    return () if name == "plain" else tuple(name.split("+"))


def sizes(of: Any) -> str:
    return "x".join(str(n) for n in of)
