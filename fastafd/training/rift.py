"""RiFT (Zhu et al., ICCV 2023, arXiv 2308.02533): make an adversarially trained model better on clean images.

    1. Compute the criticality of each module: how much the loss on fixed attacked images rises when only the weight of
       that module moves.
    2. Fine-tune the least critical module on clean images; all other modules are frozen.
    3. Mix the weights of both models: take the mixture with the most clean accuracy that loses almost no robustness.

Read from microsoft/robustlearn, RiFT/main.py and utils.py. Two differences: there the module and the mixture are chosen
on test images, here on training images that are kept out of the fine-tuning (the robust model may have seen them); and
here the fine-tuned model is that of the last epoch.
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
    """Split off n class-balanced training images: (the others, those n). UsageError if n is more than half of them."""
    if 2 * n > len(train):
        raise UsageError(f"held_out: got {n}, takes at most half of the {len(train)} training images")
    drawn = balanced_draw(train.labels, n, seed)
    rest = np.setdiff1d(np.arange(len(train)), drawn)
    others, held_out = (ArraySplit(train.images(indices), train.labels[indices]) for indices in (rest, drawn))
    return others, held_out


def criticality(
    net: nn.Module, x_adv: Tensor, y: Tensor, *, radius: float, climbs: int, batch_size: int, console: Console
) -> dict[str, float]:
    """The rise of the mean cross-entropy on x_adv (N,3,H,W) for each Conv2d and Linear, by name, in their order.

    The module's weight W takes one gradient step of rate 1 a batch, in eval mode. After each of `climbs` passes it is
    projected to within radius ||W||_F of its first value, and the loss is measured; the highest loss counts.
    """
    net = copy.deepcopy(net).eval().requires_grad_(False)
    origin = mean_loss(net, x_adv, y, batch_size)
    modules = [(name, module) for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    rises = {}
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
            rises[name] = most - origin
            bar.advance()
    return rises


@torch.no_grad()
def mean_loss(net: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> float:
    """The mean cross-entropy of the images x (N,3,H,W) with labels y (N,)."""
    losses = [F.cross_entropy(net(images), labels, reduction="sum") for images, labels in batches(x, y, batch_size)]
    return float(torch.stack(losses).sum()) / len(y)


def batches(x: Tensor, y: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The images and labels in order, `batch_size` at a time; the last batch may be smaller."""
    for first in range(0, len(y), batch_size):
        yield x[first : first + batch_size], y[first : first + batch_size]


def attacked_images(net: nn.Module, held_out: Split, attack: PGD, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """The attacked held-out images (N,3,H,W) and their labels (N,), on the network's device."""
    device = next(net.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    x, y = to_unit(torch.from_numpy(held_out.images())).to(device), torch.from_numpy(held_out.labels).to(device)
    net.eval()
    attacked = [attack.perturb(net, images, labels, generator) for images, labels in batches(x, y, batch_size)]
    return torch.cat(attacked), y


def mix(robust: dict[str, Tensor], tuned: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """The state dict (1 - share) robust + share tuned, BatchNorm's statistics included.

    Integers are those of `robust`.
    """
    return {
        name: torch.lerp(value, tuned[name], share) if value.is_floating_point() else value
        for name, value in robust.items()
    }


def choose_mixture(
    robust: nn.Module, tuned: nn.Module, held_out: Split, attack: PGD, drop: float, seed: int, console: Console
) -> tuple[nn.Module, list[dict[str, float]], float]:
    """The mixture with the most clean accuracy on the held-out images, among those that lose little under the attack.

    drop: how much accuracy under the attack it may lose, 0.01 being one percentage point. Returns the mixture, a row of
    accuracies for each mixture tried, and the mixture's share of `tuned`.
    """
    net = copy.deepcopy(robust)
    images, labels = torch.from_numpy(held_out.images()), torch.from_numpy(held_out.labels)
    rows = []
    for share in MIXTURES:
        net.load_state_dict(mix(robust.state_dict(), tuned.state_dict(), share))
        row = {"share": share}
        for name, by in (("clean", None), ("robust", attack)):
            correct = accuracy_under(net.eval(), images, labels, by, 250, seed, console, f"mixture {share} {name}")
            row[name] = float(correct.double().mean())
        rows.append(row)
    robust_enough = [row for row in rows if row["robust"] >= rows[0]["robust"] - drop - 1e-9]
    best = max(robust_enough, key=lambda row: (row["clean"], row["share"]))["share"]  # a tie goes to the larger share
    net.load_state_dict(mix(robust.state_dict(), tuned.state_dict(), best))
    return net, rows, best
