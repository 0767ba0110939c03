"""RiFT (Zhu et al., ICCV 2023, arXiv 2308.02533): an adversarially trained model made better on clean images.

    1. criticality of each module: how much the loss on fixed attacked images rises when its weight alone is moved
    2. fine-tuning of the least critical module on clean images, everything else held still
    3. a mixture of both models' weights: the most clean accuracy that costs no robustness to speak of

Read from microsoft/robustlearn, RiFT/main.py and utils.py. There module and mixture are chosen on test images; here on
training images that are held out of the fine-tuning (the robust model may have seen them), and the fine-tuned model is
that of the last epoch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastafd.attacks import PGD
from fastafd.console import Bar, Console
from fastafd.data import ArraySplit, Split, balanced_draw, to_unit
from fastafd.evaluation import accuracy_under
from fastafd.settings import UsageError

MIXTURES = tuple(round(0.1 * i, 1) for i in range(11))  # shares of the fine-tuned weights


def hold_out(train: Split, n: int, seed: int) -> tuple[Split, Split]:
    """The training images without `n` class-balanced ones, and these. UsageError where not half are left."""
    if 2 * n > len(train):
        raise UsageError(f"held_out: got {n}, takes at most half of the {len(train)} training images")
    chosen = balanced_draw(train.labels, n, seed)
    rest = np.setdiff1d(np.arange(len(train)), chosen)
    kept, held = (ArraySplit(train.images(indices), train.labels[indices]) for indices in (rest, chosen))
    return kept, held


def criticality(
    net: nn.Module, x_adv: Tensor, y: Tensor, *, radius: float, climbs: int, batch_size: int, console: Console
) -> dict[str, float]:
    """How much the mean cross-entropy on x_adv (N,3,H,W) rises, by name of each Conv2d and Linear in order.

    The weight climbs by plain gradient steps of length 1 a batch, in eval mode; after each of `climbs` passes it is
    brought back to within radius ||W||_F of where it was, and the loss taken; the highest of these counts.
    """
    net = copy.deepcopy(net).eval().requires_grad_(False)
    origin = mean_loss(net, x_adv, y, batch_size)
    modules = [(name, module) for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    found = {}
    with Bar(console, "criticality", len(modules)) as bar:
        for name, module in modules:
            first, most = module.weight.detach().clone(), 0.0
            module.weight.requires_grad_()
            for _ in range(climbs):
                for images, labels in batches(x_adv, y, batch_size):
                    (grad,) = torch.autograd.grad(F.cross_entropy(net(images), labels), module.weight)
                    module.weight.data += grad
                change = module.weight.data - first
                ratio = change.norm() / first.norm()
                if ratio > radius:
                    module.weight.data = first + change / ratio * radius
                most = max(most, mean_loss(net, x_adv, y, batch_size))
            module.weight.requires_grad_(False)
            module.weight.data = first
            found[name] = most - origin
            bar.advance()
    return found


@torch.no_grad()
def mean_loss(net: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> float:
    losses = [F.cross_entropy(net(images), labels, reduction="sum") for images, labels in batches(x, y, batch_size)]
    return float(torch.stack(losses).sum()) / len(y)


def batches(x: Tensor, y: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for first in range(0, len(y), batch_size):
        yield x[first : first + batch_size], y[first : first + batch_size]


def attacked_images(net: nn.Module, held: Split, attack: PGD, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """The held-out images under the attack, with their labels, on the network's device."""
    device = next(net.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    x, y = to_unit(torch.from_numpy(held.images())).to(device), torch.from_numpy(held.labels).to(device)
    net.eval()
    return torch.cat([attack(net, images, labels, generator) for images, labels in batches(x, y, batch_size)]), y


def mix(robust: dict[str, Tensor], tuned: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """State dicts: (1 - share) robust + share tuned, BatchNorm's statistics included; counters are `robust`'s."""
    return {
        name: torch.lerp(value, tuned[name], share) if value.is_floating_point() else value
        for name, value in robust.items()
    }


def choose_mixture(
    robust: nn.Module, tuned: nn.Module, held: Split, attack: PGD, drop: float, seed: int, console: Console
) -> tuple[nn.Module, list[dict[str, float]], float]:
    """The mixture of most clean accuracy on the held-out images among those that lose little under the attack.

    drop: the share of 1 that it may lose. Returns it, a row for each mixture, and its share of `tuned`.
    """
    net = copy.deepcopy(robust)
    images, labels = torch.from_numpy(held.images()), torch.from_numpy(held.labels)
    rows = []
    for share in MIXTURES:
        net.load_state_dict(mix(robust.state_dict(), tuned.state_dict(), share))
        found = {"share": share}
        for name, by in (("clean", None), ("robust", attack)):
            correct = accuracy_under(net.eval(), images, labels, by, 250, seed, console, f"mixture {share} {name}")
            found[name] = float(correct.double().mean())
        rows.append(found)
    fit = [row for row in rows if row["robust"] >= rows[0]["robust"] - drop - 1e-9]
    best = max(fit, key=lambda row: (row["clean"], row["share"]))["share"]  # of equals the one that is tuned most
    net.load_state_dict(mix(robust.state_dict(), tuned.state_dict(), best))
    return net, rows, best
