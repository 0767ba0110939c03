"""python -m fastafd.verify: compare the fast step with plain PyTorch in float64, on this machine.

    python -m fastafd.verify                                # the arithmetic of a run on this machine
    python -m fastafd.verify --arch wrn34_10 --amp bf16 --out certificate.json
    python -m fastafd.verify --recipe trades                # any recipe that the fast engine runs

Four steps do the same work from a few common states, on augmented batches: plain PyTorch in float64 (the reference
engine), the fast engine in float64, plain PyTorch in the run's arithmetic ("eager"), and the fast engine in the run's
arithmetic ("fast").

1. float64: the attacked images agree, and on the same attacked images every loss term, gradient, BatchNorm buffer,
   weight and averaged weight agrees to 1e-9.
2. The run's arithmetic: the distances of the same quantities from float64's, as medians over comparisons
   (`verification/certificate.py` has the limits and the reasons), and the mean cross-entropy under each attack.
3. Kernels, on CUDA: each kernel that ran, with the operands of these steps, against its reference in float64.
4. CUDA graph: a replayed step against the same step launched kernel by kernel.

The certificate is JSON: versions, device, the kernels that ran, and a row for every quantity. The exit code is 1 if a
quantity is too far off.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastafd import cli
from fastafd.config import TrainConfig
from fastafd.console import Bar, Console
from fastafd.data import Augment, Dataset, Loader, load_dataset, make_loader
from fastafd.device import provenance, resolve_amp, resolve_device
from fastafd.files import as_json, save_text
from fastafd.methods import Natural
from fastafd.models import build_model, check_model
from fastafd.recipes import RECIPES, find_recipe
from fastafd.settings import RunError, UsageError, cache_dir, check, choice, number, optional, path, setting, text
from fastafd.training.build import build_step
from fastafd.training.engine import Fast
from fastafd.training.graphs import WARM_UPS
from fastafd.training.optim import make_sgd
from fastafd.training.step import Inputs, TrainStep
from fastafd.verification.certificate import (
    Distances,
    Row,
    Values,
    attack_rows,
    float64_rows,
    graph_rows,
    kernel_rows,
    limits,
    update_rows,
    values_of,
)
from fastafd.verification.kernel_checks import Watch, deviations

NATURAL, BEFORE = 20, 5  # steps of natural training, and of the recipe, before the first comparison
AUGMENTATION = 4, True  # padding of the crop, flip; the same for every data set
IN_FLOAT64 = 3  # comparisons in float64, where no chance is involved
ImagesAndLabels = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class VerifyConfig:
    """The settings of `python -m fastafd.verify`."""

    arch: str = setting(
        "auto", "classifier: any name that fastafd.train takes; auto: resnet18, on a CPU resnet8_half", text
    )
    normalize: str = setting("none", "normalisation layer inside the model: none, cifar10, cifar100 or imagenet", text)
    recipe: str = setting("released", "recipe whose step is verified: any that the fast engine runs", text)
    dataset: str = setting("digits", "whose images: cifar10, cifar100, tiny-imagenet, imagefolder or digits", text)
    data_dir: Path = setting(Path("data"), "folder that holds the data set, or an image tree of its classes", path)
    amp: str = setting(
        "auto", "arithmetic that is verified; auto as in training", choice("auto", "bf16", "fp16", "fp32")
    )
    device: str = setting("auto", "cpu, cuda, cuda:N, or auto: a GPU if there is one", text)
    batch_size: int | None = setting(
        None, "images a step; default 32, on a GPU 128 as in training", optional(number(1, whole=True))
    )
    comparisons: int = setting(9, "common states from which a step is compared; best odd", number(1, whole=True))
    seed: int = setting(0, "seed of the weights, the batches and the attack's starts", number(0, 2**32, whole=True))
    out: Path = setting(Path("verify.json"), "the certificate", path)

    def __post_init__(self) -> None:
        check(self)


def main(argv: list[str]) -> None:
    began = time.monotonic()
    config = cli.parse(VerifyConfig(), argv, prog="fastafd.verify", about=__doc__)
    console = Console()
    device = resolve_device(config.device)
    if config.arch == "auto":
        config = replace(config, arch="resnet18" if device.type == "cuda" else "resnet8_half")
    batch_size = config.batch_size or (128 if device.type == "cuda" else 32)
    config = replace(config, batch_size=batch_size)
    check_model(config.arch, config.normalize)
    recipe = recipe_of(config.recipe)
    amp = resolve_amp(config.amp, device)
    dataset = load_dataset(config.dataset, config.data_dir)
    if device.type == "cpu":
        console.line(
            f"verify: {config.arch} in {amp} on a CPU; resnet8_half takes about two minutes, others far longer"
        )
    verdict = verify(config, recipe, amp, dataset, device, console)
    certificate = {
        "arch": config.arch,
        "normalize": config.normalize,
        "recipe": config.recipe,
        "amp": amp,
        "dataset": dataset.name,
        "batch_size": config.batch_size,
        "comparisons": config.comparisons,
        "seed": config.seed,
        "seconds": round(time.monotonic() - began, 1),
        **provenance(device),
        **verdict,
    }
    save_text(config.out, as_json(certificate))
    show_verdict(verdict, console, f"{config.arch}, recipe {config.recipe}, in {amp} on {certificate['device']}")
    if not verdict["verified"]:
        far = [f"{row['group']}: {row['quantity']}" for row in verdict["rows"] if not row["ok"]]
        raise RunError(f"verify: {len(far)} quantities too far, first {far[0]}; all are in {config.out}")
    console.line(f"verified in {certificate['seconds']:.0f} s; the certificate: {config.out}")


def recipe_of(name: str) -> TrainConfig:
    """The recipe. UsageError if the fast engine does not run it, or if it has no attack to compare."""
    recipe = find_recipe(name)
    if not _is_verifiable(recipe):
        can = [other for other, build in RECIPES.items() if _is_verifiable(build())]
        raise UsageError(f"recipe: got {name!r}, takes one whose attack the fast engine runs: {', '.join(can)}")
    return recipe


def _is_verifiable(recipe: TrainConfig) -> bool:
    method = recipe.method
    return method.adversarial and method.uses_recipe_attack and not method.only_reference


def verify(
    config: VerifyConfig, recipe: TrainConfig, amp: str, dataset: Dataset, device: torch.device, console: Console
) -> dict[str, Any]:
    """Compare the steps; returns `verified` (True if all rows are ok), `kernels` (launches by name) and `rows`."""
    steps_in_all = NATURAL + WARM_UPS + BEFORE + config.comparisons
    with Bar(console, "verify", steps_in_all) as bar:
        loader = loader_of(config, dataset, device)
        batches = batches_of(loader, bar)
        natural = trained_naturally(config, dataset, list(islice(batches, NATURAL)))

        def prepared(engine: str, amp: str, dtype: torch.dtype) -> TrainStep:
            task = replace(recipe.task, amp=amp, engine=engine, seed=config.seed)
            augment = Augment(*AUGMENTATION, config.seed)
            start = copy.deepcopy(natural).to(dtype)
            return build_step(replace(recipe, task=task), start, loader, augment, console)

        exact = prepared("reference", "fp32", torch.float64)
        compiled = prepared("fast", "fp32", torch.float64)
        compiled.graphs = None  # whose rates and figures are fp32; in float64 the compiled code is what counts
        eager = prepared("reference", amp, torch.float32)
        fast = prepared("fast", amp, torch.float32)
        for batch in islice(batches, WARM_UPS):
            fast(*batch)  # the first compiles
        assert isinstance(fast.engine, Fast) and isinstance(compiled.engine, Fast)
        if compiled.engine.choice is not None and fast.engine.choice is not None:
            compiled.engine.choice.follow(fast.engine.choice)
        compiled(*batch)
        for batch in islice(batches, BEFORE):
            exact(*batch)

        of_compiled, of_eager, of_fast, of_graph, of_again = (Distances() for _ in range(5))
        attacks: list[dict[str, float]] = []
        attacks_float64: list[dict[str, float]] = []
        watch, kernels = Watch(), []
        for index, (x, y) in enumerate(islice(batches, config.comparisons)):
            state = copy.deepcopy(exact.state_dict())
            inputs = exact._inputs(x, y)
            rivals = {"eager": eager, "fast": fast}
            if index < IN_FLOAT64:
                rivals["compiled"] = compiled
            for rival in rivals.values():
                rival.load_state_dict(copy.deepcopy(state))
            if fast.graphs is not None:
                replayed, launched, again = launched_in_both_ways(fast, state, inputs, 0.5 if index else 1.0)
                of_graph.measure(replayed, launched)
                of_again.measure(again, launched)
                fast.load_state_dict(copy.deepcopy(state))
            watch.first.clear()
            with watch(), without_graphs(fast):
                images = {name: attacked(step, inputs) for name, step in {"exact": exact, **rivals}.items()}
                losses = compared(exact, images, inputs)
                after = {name: values_after(step, inputs, images["exact"][1]) for name, step in rivals.items()}
            kernels.append({name: deviations(name, launch) for name, launch in watch.first.items()})
            attacks.append(losses)
            after_exact = values_after(exact, inputs, images["exact"][1])
            of_eager.measure(after["eager"], after_exact)
            of_fast.measure(after["fast"], after_exact)
            if "compiled" in rivals:
                of_compiled.measure(after["compiled"], after_exact)
                attacks_float64.append(losses)

    rows = float64_rows(of_compiled, attacks_float64)
    allowed = limits(amp, device)
    rows += attack_rows(attacks, allowed) + update_rows(of_eager, of_fast, allowed)
    rows += kernel_rows(kernels)
    if fast.graphs is not None:
        rows += graph_rows(of_again, of_graph, amp, config.comparisons - fast.graphs.replays)
    return {"verified": all(row["ok"] for row in rows), "kernels": watch.counts, "rows": rows}


# -- the data of the steps -----------------------------------------------------------------------------------------


def loader_of(config: VerifyConfig, dataset: Dataset, device: torch.device) -> Loader:
    """The loader of the training images."""
    assert config.batch_size is not None
    return make_loader(
        "torch",
        dataset.train,
        name=dataset.name,
        batch_size=config.batch_size,
        seed=config.seed,
        device=device,
        cache=cache_dir(),
        report=print,
    )


def batches_of(loader: Loader, bar: Bar) -> Iterator[ImagesAndLabels]:
    """The batches of the loader, epoch after epoch; each one advances the bar."""
    for epoch in count():
        for batch in loader.epoch(epoch):
            yield batch
            bar.advance()


def trained_naturally(config: VerifyConfig, dataset: Dataset, batches: list[ImagesAndLabels]) -> nn.Module:
    """A classifier after some natural training, so that its weights and statistics are not the initial ones."""
    torch.manual_seed(config.seed)
    net = build_model(config.arch, len(dataset.classes), config.normalize).to(batches[0][0].device)
    augment = Augment(*AUGMENTATION, config.seed)
    step = TrainStep(net, make_sgd(net, 0.05, 0.9, 5e-4), Natural(), amp="fp32", engine="reference", augment=augment)
    for batch in batches:
        step(*batch)
    return net.eval()


# -- running a step ---------------------------------------------------------------------------------------


class Attacked(NamedTuple):
    """The augmented images and the attacked ones, (B,3,H,W) float64."""

    x: Tensor
    x_adv: Tensor


def attacked(step: TrainStep, inputs: Inputs) -> Attacked:
    """The augmented and the attacked images of the step, from the common draws."""
    images, y, offsets, flips, noise, _ = in_type_of(step, inputs)
    with step.engine.launching():
        x = step._pixels(images, offsets, flips)
        return Attacked(x.double(), step.engine.perturb(x, noise, y).double())


def compared(exact: TrainStep, images: dict[str, Attacked], inputs: Inputs) -> dict[str, float]:
    """The exact model's mean cross-entropy on the clean images and under each step's attack, and shares of pixels.

    The shares are those of pixels that differ from float64's, before the attack ("augmented") and after it
    ("attacked").
    """
    clean, x_adv = images["exact"]
    numbers = {}
    for name, image in (images | {"clean": Attacked(clean, clean)}).items():
        _, logits = exact.engine.f1(image.x_adv)
        numbers[f"{name} loss"] = float(F.cross_entropy(logits, inputs[1]))
        numbers[f"{name} augmented"] = float((image.x.float() != clean.float()).double().mean())
        numbers[f"{name} attacked"] = float(((image.x_adv - x_adv).abs() > 1e-5).double().mean())
    return numbers


def values_after(step: TrainStep, inputs: Inputs, x_adv: Tensor | None = None) -> Values:
    """The results of a step on these inputs. x_adv: used instead of the step's attacked images, unless None."""
    with mock.patch.object(step, "_inputs", lambda x, y: in_type_of(step, inputs)), ExitStack() as stack:
        if x_adv is not None:
            narrow = x_adv.to(next(step.model.parameters()).dtype)
            stack.enter_context(mock.patch.object(step.engine, "perturb", lambda x, noise, y: narrow))
        return values_of(step, step(inputs[0], inputs[1]))


def launched_in_both_ways(
    fast: TrainStep, state: dict[str, Any], inputs: Inputs, rate: float
) -> tuple[Values, Values, Values]:
    """The results of a whole step from `state`: replayed from a recording, launched kernel by kernel, and that again.

    rate: a factor on the learning rates that differs from the recording's, so that a recording that kept its rate
    shows.
    """
    state = copy.deepcopy(state)
    for group in state["optimizer"]["param_groups"]:
        group["lr"] *= rate
    results = []
    for as_graph in (True, False, False):
        fast.load_state_dict(copy.deepcopy(state))
        with nullcontext() if as_graph else without_graphs(fast):
            results.append(values_after(fast, inputs))
    replayed, launched, again = results
    return replayed, launched, again


@contextmanager
def without_graphs(step: TrainStep) -> Iterator[None]:
    """Inside this block the step is launched kernel by kernel."""
    if step.graphs is None:
        yield
        return
    works, step.graphs.works = step.graphs.works, False
    try:
        yield
    finally:
        step.graphs.works = works


def in_type_of(step: TrainStep, inputs: Inputs) -> Inputs:
    """The inputs with the start noise in the type of the step's weights; for every step it is rounded to float32."""
    *others, noise, epoch = inputs
    if noise is not None:
        noise = noise.float().to(next(step.model.parameters()).dtype)
    return *others, noise, epoch  # type: ignore[return-value]


def show_verdict(verdict: dict[str, Any], console: Console, title: str) -> None:
    """Print a row for each group: its worst quantity, the nearest to its limit or the farthest above it."""
    rows = []
    for group in dict.fromkeys(row["group"] for row in verdict["rows"]):
        of_group = [row for row in verdict["rows"] if row["group"] == group]
        worst = max(of_group, key=beyond)
        figures = ["" if worst[name] is None else f"{worst[name]:.2e}" for name in ("eager", "fast", "limit")]
        rows.append([group, str(len(of_group)), worst["quantity"], *figures, "ok" if worst["ok"] else "TOO FAR"])
    console.table(title, ["distance from float64", "n", "worst", "eager", "fast", "limit", ""], rows)
    counts = verdict["kernels"]
    ran = ", ".join(f"{name} {count}" for name, count in counts.items())
    console.line(
        f"launches of kernels: {ran}" if ran else "no kernel ran: on a CPU and without Triton the references do"
    )


def beyond(row: Row) -> float:
    """The row's distance as a share of its limit; above 1 it is too far off."""
    if not row["ok"]:
        return math.inf if math.isnan(row["fast"]) or not row["limit"] else row["fast"] / row["limit"]
    return row["fast"] / row["limit"] if row["limit"] else 0.0


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
