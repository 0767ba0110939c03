"""python -m fastafd.verify: is the fast step the step? Against plain PyTorch in float64, on this machine.

    python -m fastafd.verify                                # ResNet-18, in the arithmetic of a run on this machine
    python -m fastafd.verify --arch wrn34_10 --amp bf16 --out certificate.json

The step of recipe `released` is done three times from each of a few common states: in float64 by the reference engine,
and in the run's arithmetic by the reference engine ("eager") and by the fast one.

- Attack: from one start each climbs on its own. The sign of a tiny gradient decides a pixel, so the attacked images are
  compared by their mean cross-entropy (of the float64 model) and by the share of pixels other than float64's.
- Update: on the same attacked images. Every loss term, gradient, BatchNorm buffer, weight and averaged weight has a
  distance from float64's (Euclidean, relative; of terms below 1 absolute). The largest of the fast step's may be twice
  the largest of eager's, plus 2^-22.
- On CUDA also the whole step, attack included, launched as a graph and kernel by kernel: no farther from each other.

The certificate is JSON: versions, device, and a line for every quantity. Exit code 1 where one is too far.
"""

from __future__ import annotations

import copy
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastafd import cli
from fastafd.afd_step import AFDStep
from fastafd.console import Console
from fastafd.data import Dataset, load_dataset, make_loader, to_unit
from fastafd.engine import resolve_amp, resolve_device
from fastafd.evaluate import provenance
from fastafd.files import as_json, save_text
from fastafd.graphs import WARM_UPS
from fastafd.methods import Natural
from fastafd.models import build_model, check_model, disentangle
from fastafd.optim import make_sgd
from fastafd.recipes import released
from fastafd.settings import RunError, cache_dir, check, choice, number, path, setting, text
from fastafd.step import TrainStep

FLOOR = 2.0**-22  # what a distance may exceed twice eager's by: a few roundings in fp32
NATURAL, BEFORE = 20, 5  # steps of natural training, then of AFD, before the first comparison
Batch = tuple[Tensor, Tensor]
Distances = defaultdict[str, list[float]]  # by quantity, one for each comparison


@dataclass(frozen=True)
class VerifyConfig:
    """What `python -m fastafd.verify` takes."""

    arch: str = setting("resnet18", "classifier: any name that fastafd.train takes", text)
    normalize: str = setting("none", "normalisation layer inside the model: none, cifar10, cifar100 or imagenet", text)
    dataset: str = setting("digits", "whose images: cifar10, cifar100, tiny-imagenet, imagefolder or digits", text)
    data_dir: Path = setting(Path("data"), "folder that holds the data set, or an image tree of its classes", path)
    amp: str = setting(
        "auto", "arithmetic that is verified; auto as in training", choice("auto", "bf16", "fp16", "fp32")
    )
    device: str = setting("auto", "cpu, cuda, cuda:N, or auto: a GPU if there is one", text)
    batch_size: int = setting(32, "images a step", number(1, whole=True))
    comparisons: int = setting(8, "common states from which a step is compared", number(1, whole=True))
    seed: int = setting(0, "seed of the weights, the batches and the attack's starts", number(0, 2**32, whole=True))
    out: Path = setting(Path("verify.json"), "the certificate", path)

    def __post_init__(self) -> None:
        check(self)


def main(argv: list[str]) -> None:
    config = cli.parse(VerifyConfig(), argv, prog="fastafd.verify", about=__doc__)
    console = Console()
    check_model(config.arch, config.normalize)
    device = resolve_device(config.device)
    amp = resolve_amp(config.amp, device)
    dataset = load_dataset(config.dataset, config.data_dir)
    verdict = verify(config, amp, dataset, device, console)
    certificate = {
        "arch": config.arch,
        "normalize": config.normalize,
        "amp": amp,
        "dataset": dataset.name,
        "batch_size": config.batch_size,
        "comparisons": config.comparisons,
        "seed": config.seed,
        **provenance(device),
        **verdict,
    }
    save_text(config.out, as_json(certificate))
    show(verdict, console, f"{config.arch} in {amp} on {certificate['device']}: distance from float64, relative")
    if not verdict["verified"]:
        far = [row["quantity"] for row in verdict["rows"] if not row["ok"]]
        raise RunError(f"verify: {len(far)} quantities too far, first {far[0]}; all are in {config.out}")
    console.line(f"verified; the certificate: {config.out}")


def verify(config: VerifyConfig, amp: str, dataset: Dataset, device: torch.device, console: Console) -> dict[str, Any]:
    """`verified`, and `rows`: group, quantity, distance of eager and of fast, ok."""
    batches = list(islice(batches_of(dataset, config, device), NATURAL + BEFORE + config.comparisons))
    natural = trained_naturally(config, len(dataset.classes), batches[:NATURAL])
    exact, eager, fast = (
        prepared(natural, config, engine, precision, dtype, console)
        for engine, precision, dtype in (
            ("reference", "fp32", torch.float64),
            ("reference", amp, torch.float32),
            ("fast", amp, torch.float32),
        )
    )
    for batch in batches[:WARM_UPS]:
        fast(*batch)  # compiles
    for x, y in batches[NATURAL : NATURAL + BEFORE]:
        exact(x.double(), y)

    generator = torch.Generator(device).manual_seed(config.seed)
    of_eager, of_fast, of_graph = Distances(list), Distances(list), Distances(list)
    recorded = True
    attacks = []
    for x, y in batches[NATURAL + BEFORE :]:
        state = copy.deepcopy(exact.state_dict())
        if fast.graphs is not None:  # the whole step, its attack included, launched in both ways
            launched = []
            for as_graph in (False, True):
                fast.graphs.works = as_graph
                fast.load_state_dict(copy.deepcopy(state))
                launched.append(values_after(fast, x, y))
            measure(of_graph, launched[1], launched[0])
            recorded &= fast.graphs.works and len(fast.graphs.recorded) > 0
        for step in (eager, fast):
            step.load_state_dict(copy.deepcopy(state))
        images, compared = attacked((exact, eager, fast), x, y, generator)
        attacks.append(compared)
        after = values_after(exact, x.double(), y, images)
        measure(of_eager, values_after(eager, x, y, images.float()), after)
        measure(of_fast, values_after(fast, x, y, images.float()), after)

    rows = attack_rows(attacks) + update_rows(of_eager, of_fast)
    rows += [row | {"group": f"{row['group']}, graph"} for row in update_rows(of_eager, of_graph)]
    if fast.graphs is not None:
        none = {"eager": 0.0, "fast": 0.0 if recorded else 1.0, "limit": 0.5}
        rows.append({"group": "recording", "quantity": "steps without a graph", **none, "ok": recorded})
    return {"verified": all(row["ok"] for row in rows), "rows": rows}


# -- the three steps ----------------------------------------------------------------------------------------------


def batches_of(dataset: Dataset, config: VerifyConfig, device: torch.device) -> Iterator[Batch]:
    """Batches of training images, float32 in [0,1], epoch after epoch."""
    loader = make_loader(
        "torch",
        dataset.train,
        name=dataset.name,
        batch_size=config.batch_size,
        seed=config.seed,
        device=device,
        cache=cache_dir(),
        report=print,
    )
    for epoch in count():
        for x, y in loader.epoch(epoch):
            yield to_unit(x), y


def trained_naturally(config: VerifyConfig, classes: int, batches: list[Batch]) -> nn.Module:
    """A classifier that is no longer at its initial weights and statistics."""
    torch.manual_seed(config.seed)
    net = build_model(config.arch, classes, config.normalize).to(batches[0][0].device)
    step = TrainStep(net, make_sgd(net, 0.05, 0.9, 5e-4), Natural(), amp="fp32", engine="reference")
    for batch in batches:
        step(*batch)
    return net.eval()


def prepared(
    natural: nn.Module, config: VerifyConfig, engine: str, amp: str, dtype: torch.dtype, console: Console
) -> AFDStep:
    """A step of recipe `released` from the natural classifier."""
    recipe = released()
    net = copy.deepcopy(natural).to(dtype)
    model = disentangle(net)
    optimizer = make_sgd(model, recipe.sgd.lr, recipe.sgd.momentum, recipe.sgd.weight_decay, recipe.d2_weight_decay)
    return AFDStep(model, net, optimizer, recipe, amp=amp, engine=engine, console=console)


def attacked(
    steps: tuple[AFDStep, AFDStep, AFDStep], x: Tensor, y: Tensor, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """The float64 attack's images, and how those of eager and of fast compare; all three climb from one start."""
    exact = steps[0]
    assert exact.attack is not None
    noise = exact.attack.draw(x, generator)
    images = []
    for step in steps:
        dtype = next(step.model.parameters()).dtype
        climbed = step.engine.perturb(x.to(dtype), None if noise is None else noise.to(dtype), y)
        images.append(climbed.double())
    found = {}
    for name, x_adv in zip(("clean", "exact", "eager", "fast"), (x.double(), *images), strict=True):
        _, logits = exact.engine.f1(x_adv)
        found[f"{name} loss"] = float(F.cross_entropy(logits, y))
        found[f"{name} other"] = float(((x_adv - images[0]).abs() > 1e-5).double().mean())
    return images[0], found


def values_after(step: AFDStep, x: Tensor, y: Tensor, x_adv: Tensor | None = None) -> dict[str, Tensor]:
    """What a step on x leaves behind, in float64: terms, gradients, statistics, weights, averages.

    x_adv: in place of the attack's images.
    """
    perturb = step.engine.perturb
    if x_adv is not None:
        step.engine.perturb = lambda *_: x_adv  # type: ignore[method-assign]
    terms = step(x, y)
    step.engine.perturb = perturb  # type: ignore[method-assign]
    found = {
        f"loss terms: {name}": terms[name] for name in ("loss", "confused", "exclusion", "cross_entropy", "alignment")
    }
    for name, parameter in step.model.named_parameters():
        assert parameter.grad is not None
        found[f"gradients: {name}"] = parameter.grad
        found[f"weights: {name}"] = parameter
    for group, model in (("BatchNorm buffers", step.model), ("averages", step.averaged())):
        found |= {f"{group}: {name}": value for name, value in model.named_buffers() if "running" in name}
    found |= {f"averages: {name}": value for name, value in step.averaged().named_parameters()}
    return {name: value.detach().to(torch.float64, copy=True) for name, value in found.items()}


# -- the distances ------------------------------------------------------------------------------------------------


def measure(distances: Distances, found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    for name, value in found.items():
        length = float(exact[name].norm())
        # Terms are means of logarithms and cosines, whose errors are those of numbers near 1.
        scale = max(length, 1.0) if name.startswith("loss terms") else length or 1.0
        distances[name].append(float((value - exact[name]).norm()) / scale)


def update_rows(eager: Distances, fast: Distances) -> list[dict[str, Any]]:
    rows = []
    for name, distances in fast.items():
        group, quantity = name.split(": ")
        limit = 2 * max(eager[name]) + FLOOR
        of_both = {"eager": max(eager[name]), "fast": max(distances)}
        rows.append(
            {"group": group, "quantity": quantity, **of_both, "limit": limit, "ok": all(d <= limit for d in distances)}
        )
    return rows


def attack_rows(attacks: list[dict[str, float]]) -> list[dict[str, Any]]:
    """The mean loss that the attack reaches, relative to what float64's gains, and the share of other pixels."""
    mean = {name: sum(found[name] for found in attacks) / len(attacks) for name in attacks[0]}
    gain = abs(mean["exact loss"] - mean["clean loss"]) or 1.0
    rows = []
    for quantity, floor in (("loss", 0.01), ("other", 0.001)):
        unit, exact = (gain, mean["exact loss"]) if quantity == "loss" else (1.0, 0.0)
        of_both = {name: abs(mean[f"{name} {quantity}"] - exact) / unit for name in ("eager", "fast")}
        limit = 2 * of_both["eager"] + floor
        called = {"loss": "mean cross-entropy", "other": "share of other pixels"}[quantity]
        rows.append({"group": "attack", "quantity": called, **of_both, "limit": limit, "ok": of_both["fast"] <= limit})
    return rows


def show(verdict: dict[str, Any], console: Console, title: str) -> None:
    """One row a group: its worst quantity, the one that comes nearest to its limit or goes farthest beyond it."""
    rows = []
    for group in dict.fromkeys(row["group"] for row in verdict["rows"]):
        of_group = [row for row in verdict["rows"] if row["group"] == group]
        worst = max(of_group, key=lambda row: row["fast"] / row["limit"] if row["fast"] == row["fast"] else math.inf)
        figures = [f"{worst[name]:.2e}" for name in ("eager", "fast", "limit")]
        rows.append([group, str(len(of_group)), worst["quantity"], *figures, "ok" if worst["ok"] else "TOO FAR"])
    console.table(title, ["group", "n", "worst", "eager", "fast", "limit", ""], rows)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
