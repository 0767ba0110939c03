"""Which form each convolution of a snapshot has: the plain one, unless another was timed on this device and won.

A convolution is timed with its input's gradient, compiled, in the plain form and in each that applies, in turn. A form
is taken where it needs at most 1 - MARGIN of the plain form's seconds; two that win are tried together, and taken so
where that wins as much again. One that fails, or whose results are further from the plain form's than BOUNDS, is
never taken. Timings are kept in the cache folder, a file for each PyTorch, CUDA, Triton and GPU; deleted, it is made
anew. After BUDGET_S seconds a run begins to time no further form, the convolutions of most arithmetic being first: what
is left stays plain, and the next run goes on. On a CPU nothing is timed.
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

MARGIN = 0.05  # of the plain form's seconds
BUDGET_S = 120.0  # seconds of timing, compilation included, after which a run begins no further form
SETS = 4  # inputs of a timed call, so that not all of it stays in the L2 cache
# How far a form's output and gradients may be from the plain form's, relative, in the norm. A ReLU whose input is near
# zero falls on either side in low precision, and a gradient passes or does not: one in 5,000 of them makes 0.02.
BOUNDS = (0.02, 0.1)
BOUNDS_FLOAT64 = (1e-9, 1e-9)

PASSING = (torch.OutOfMemoryError, torch.AcceleratorError)  # failures that are not the form's

Clock = Callable[[dict[str, Callable[[], Any]]], dict[str, float]]  # seconds of a call, measured in turn


class Case(NamedTuple):
    """A convolution of the network at one batch shape; x and residual on the meta device."""

    folded: Folded
    x: Tensor
    residual: Tensor | None

    @property
    def products(self) -> int:
        """How many multiplications it needs, but for its borders."""
        rows, columns = self.folded.conv.stride
        return self.x.shape[0] * self.x.shape[2:].numel() // (rows * columns) * self.folded.conv.weight.numel()

    @property
    def key(self) -> str:
        """All that its time depends on."""
        conv = self.folded.conv
        words = [sizes(self.x.shape), sizes(conv.weight.shape), f"stride {sizes(conv.stride)}"]
        words += [f"padding {conv.padding if isinstance(conv.padding, str) else sizes(conv.padding)}"]
        if self.residual is not None:
            of = self.residual
            words.append(f"residual {sizes(of.shape)} {of.dtype}" if isinstance(of, Tensor) else "residual")
        words += ["relu"] * self.folded.relu + ["other"] * (site_of(conv, self.folded.relu) is None)
        return ", ".join([*words, str(conv.weight.dtype)]).replace("torch.", "")

    def applies(self, name: str) -> bool:
        site = site_of(self.folded.conv, self.folded.relu)
        of_tensors = self.residual is None or isinstance(self.residual, Tensor)
        return site is not None and of_tensors and ARMS[name].applies(site, self.folded.conv.weight, *self[1:])


class Choice:
    """The forms of a snapshot's convolutions, chosen at the first batch of a shape.

    clock: what times, on CUDA by default a recording's replays, on a CPU none. compile: makes a function what is timed.
    `forced`: a form whose arms are taken wherever they apply, without timing.
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
        self.chosen: dict[str, str] = {}  # by case, what state() keeps
        self._kept: dict[str, str] = {}  # of the run that this one goes on with
        self._met: set[tuple[int, ...]] = set()
        self._left = BUDGET_S  # seconds
        self._untimed: set[str] = set()  # cases for which they were not enough

    def follow(self, other: Choice) -> None:
        """Take the forms that another snapshot of the same network has now, and time nothing."""
        self.clock = None
        modules = zip(self.snapshot.modules(), other.snapshot.modules(), strict=True)
        for ours, theirs in modules:
            if isinstance(ours, Folded) and isinstance(theirs, Folded):
                for shape, form in theirs.forms.items():
                    ours.take(shape, form)

    def choose(self, x: Tensor) -> None:
        """Give every convolution its form for images of x's shape (B,3,H,W), at the first call with it."""
        shape = tuple(x.shape)
        if shape in self._met or (self.clock is None and self.forced is None) or self.snapshot.reason is not None:
            return
        self._met.add(shape)
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
                    with suppress(RunError):  # a full disk costs the next run its time, not this one its life
                        save_text(path, as_json(timings) + "\n")
        self.chosen |= {key: self._kept[key] for key in by_key if key in self._kept}
        for case in cases:
            case.folded.take(tuple(case.x.shape), form_of(self.chosen[case.key]))
        counts = Counter(self.chosen[case.key] for case in cases)
        said = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        spent = f", timed in {time.perf_counter() - began:.0f} s" if new else ""
        if self._untimed:
            spent += f"; {len(self._untimed)} are left to the next run to time"
        self.console.line(f"forms of the attack's {len(cases)} convolutions: {said}{spent}")

    def state(self) -> dict[str, Any]:
        """What was chosen and on what; nothing where nothing was."""
        return {"machine": machine(self.device), "forms": dict(self.chosen)} if self.chosen else {}

    def keep(self, state: dict[str, Any]) -> None:
        """Choose as an earlier run of this machine did (its `state()`); where it was another, a line says so."""
        here = machine(self.device)
        if state["machine"] != here:
            self.console.line(
                f"the forms of convolutions are chosen anew: the run began on {state['machine']}, this is {here}"
            )
            return
        self._kept = {key: name for key, name in state["forms"].items() if all(arm in ARMS for arm in form_of(name))}
        if gone := sorted(set(state["forms"].values()) - set(self._kept.values())):
            self.console.line(f"the run began with forms that there are no longer, chosen anew: {', '.join(gone)}")

    # -- timing ---------------------------------------------------------------------------------------------------

    def _cases(self, x: Tensor) -> list[Case]:
        found: list[Case] = []

        def note(folded: Any, inputs: tuple[Any, ...]) -> None:
            images, *rest = (v.to("meta") if isinstance(v, Tensor) else v for v in inputs)
            found.append(Case(folded, images.to(folded.conv.weight.dtype), *(rest or [None])))

        hooks = [m.register_forward_pre_hook(note) for m in self.snapshot.modules() if isinstance(m, Folded)]
        with torch.no_grad():
            self.snapshot(x)
        for hook in hooks:
            hook.remove()
        return found

    def _best(self, case: Case, row: dict[str, Any]) -> Form:
        """The form for a case; what is timed for it is put into its row of the timings."""
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
        """Seconds of the form by those of the plain one beside it; infinite where it does not work."""
        name = name_of(form)
        if name not in row and self._left <= 0:
            self._untimed.add(tried.case.key)
            return float("inf")
        if name not in row:
            began = time.perf_counter()
            try:
                row[name] = self._measured(tried, form)
            except PASSING as error:  # another run may have more luck
                self.console.line(f"{name} is not timed for {tried.case.key}: {first_line(error)}")
                return float("inf")
            finally:
                self._left -= time.perf_counter() - began
            if isinstance(row[name], str):
                self.console.line(f"{name} is not used for {tried.case.key}: {row[name]}")
        return float("inf") if isinstance(row[name], str) else row[name]["us"] / row[name]["plain_us"]

    def _measured(self, tried: Trial, form: Form) -> dict[str, float] | str:
        """Microseconds of the form and of the plain one beside it, or why there are none."""
        assert self.clock is not None
        try:
            plain, other = tried.call(()), tried.call(form)
            wrong = difference(other()[0], plain()[0])
            if wrong:
                return wrong
            seconds = self.clock({"plain": plain, name_of(form): other})
        except PASSING:
            raise
        except Exception as error:  # whatever a compiler or a library has against it
            return f"{type(error).__name__}: {first_line(error)}"
        us = {name: 1e6 * value / SETS for name, value in seconds.items()}
        return {"us": round(us[name_of(form)], 3), "plain_us": round(us["plain"], 3)}


class Trial:
    """A case with inputs and weights of its own, as the attack would run it in one form or another."""

    def __init__(self, case: Case, device: torch.device, compile: Callable[..., Any]):
        self.case, self.compile = case, compile
        self.calls: dict[Form, Callable[[], list[tuple[Tensor, ...]]]] = {}
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)  # the device's own belongs to the run
        self.sets: list[tuple[Tensor, ...]] = []

    def call(self, form: Form) -> Callable[[], list[tuple[Tensor, ...]]]:
        """Run it on all input sets: of each the output, the input's gradient and the residual's if there is one."""
        if not self.sets:
            with torch.no_grad():
                like = self.case.folded.conv.weight, self.case.residual
                out = copy.deepcopy(self.case.folded).to("meta")(self.case.x, self.case.residual)
                inputs = [self.case.x, *([] if like[1] is None else [like[1]])]
            self.sets = [tuple(self._drawn(v) for v in (*inputs, out)) for _ in range(SETS)]
        if form not in self.calls:
            folded = copy.deepcopy(self.case.folded)
            folded.take(tuple(self.case.x.shape), form)

            def run(*given: Tensor) -> tuple[Tensor, ...]:
                *leaves, g = given
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
    """In what way an output and its gradients are not those of the plain form, or nothing."""
    for index, (result, of) in enumerate(zip(results, expected, strict=True)):
        bound = (BOUNDS_FLOAT64 if of.dtype == torch.float64 else BOUNDS)[min(index, 1)]
        off, norm = (result.double() - of.double()).norm().item(), of.double().norm().item()
        if result.shape != of.shape or result.dtype != of.dtype or not off <= bound * norm:
            what = "its output" if index == 0 else "a gradient"
            return f"wrong: {what} is off by {off / norm if norm else off:.1%} of the plain form's norm"
    return ""


def first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def machine(device: torch.device) -> str:
    """The software and the device that compiled code and timings hold for."""
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return f"torch {torch.__version__} cuda {torch.version.cuda} triton {triton} {where}"


def read_timings(path: Path) -> dict[str, dict[str, Any]]:
    """The timings in a file; none where there is none, or it is no such file."""
    try:
        found = json.loads(path.read_text())
        rows = {str(key): dict(row) for key, row in found.items()}
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
