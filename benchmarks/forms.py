"""The forms of a step that benchmarks.epoch_time compares, the steps of other methods, and the FLOPs of one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastafd.attacks.snapshot
import fastafd.data.augment
import fastafd.methods.afd
import fastafd.training.engine
from benchmarks import plain
from fastafd.attacks import input_gradient
from fastafd.config import TrainConfig
from fastafd.console import Console
from fastafd.data import Augment, Loader
from fastafd.kernels.afd_loss import AFDLoss
from fastafd.kernels.attack_head import attack_head_reference
from fastafd.methods import ATAS, Natural, RiFT
from fastafd.models import build_model, disentangle
from fastafd.recipes import AFD_ATTACK, afkd, arrest, atas, fgsm_ga, free_at, pgd_at, released, rift, trades, vaft
from fastafd.training.afd_step import AFDStep
from fastafd.training.build import build_step
from fastafd.training.optim import make_sgd
from fastafd.training.step import TrainStep

Step = Callable[[Tensor, Tensor], Any]
# The methods of the paper's Table 5, with its names and in its order
STANDARD = replace(vaft(), recipe="natural", method=Natural(), sgd=vaft().pretrain)
OTHERS = (pgd_at(), trades(), free_at(), fgsm_ga(), atas(), vaft(), rift(), afkd(), arrest(), released())
METHODS = {"Standard": STANDARD} | {config.method.label: config for config in OTHERS}


def our_step(net: nn.Module, task: str, amp: str, engine: str) -> TrainStep:
    """fastafd's step of recipe `released`, or of natural training."""
    net = copy.deepcopy(net)
    if task == "natural":
        optimizer = make_sgd(net, 1e-3, 0.9, 5e-4)
        return TrainStep(net, optimizer, Natural(), amp=amp, engine=engine, augment=Augment(4, True, 0))
    model, recipe = disentangle(net), released()
    optimizer = make_sgd(model, 1e-3, 0.9, recipe.sgd.weight_decay, recipe.d2_weight_decay)
    return AFDStep(model, net, optimizer, recipe, amp=amp, engine=engine, augment=Augment(4, True, 0))


def method_step(net: nn.Module, config: TrainConfig, loader: Loader, amp: str) -> TrainStep:
    """The step of a recipe as fastafd.train builds it, on the fast engine if the method has it.

    RiFT's step trains the middle convolution. ATAS's step starts in the first epoch of adaptive step sizes.
    """
    if isinstance(config.method, Natural):
        return our_step(net, "natural", amp, "fast")
    task, sgd = replace(config.task, amp=amp, engine="fast"), replace(config.sgd, lr=1e-3)
    module = ""
    if isinstance(config.method, RiFT):
        convolutions = [name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d)]
        module = convolutions[(len(convolutions) - 1) // 2]  # layer2.1.conv2 of a ResNet-18
    step = build_step(replace(config, task=task, sgd=sgd), net, loader, Augment(4, True, 0), Console(), module)
    if isinstance(config.method, ATAS):
        step.steps = config.method.warm_up * len(loader)
    return step


def plain_step(net: nn.Module, task: str, **form: Any) -> plain.PlainStep:
    steps = AFD_ATTACK.steps if task == "afd" else 0
    return plain.PlainStep(disentangle(net), disentangle(net).backbone, steps, **form)


def step_forms(net: nn.Module, task: str, amp: str, kernels: list[str]) -> dict[str, Callable[[], Step]]:
    """The builders of every form of a step, by name.

    Task: "afd" or "natural". kernels: each is left out in one form.
    """
    low = torch.bfloat16 if amp == "bf16" else None
    last: dict[str, Any] = {"layout": torch.channels_last, "amp": low}
    builders: dict[str, Callable[[], Step]] = {}
    if task == "afd":
        builders["naive"] = lambda: plain_step(net, task, naive=True)
    builders["paper-style"] = lambda: plain_step(net, task)
    builders["strong"] = lambda: plain_step(net, task, **last)
    builders["compiled"] = lambda: plain_step(net, task, **last, compiled=True)
    builders["fast"] = lambda: our_step(net, task, amp, "fast")
    for kernel in kernels if task == "afd" else []:
        builders[f"fast, without {kernel}"] = lambda kernel=kernel: without(kernel, our_step(net, task, amp, "fast"))  # type: ignore[misc]
    return builders


def plain_afd_loss(g: Tensor, t: Tensor, y: Tensor, *weights: Tensor, classifier_alpha: float, **of: float) -> AFDLoss:
    d1, d2, w, b = (v.to(g.dtype) for v in weights)
    total, logits, wrong = plain.afd_loss(g, t, y, d1, d2, w, b, **of)
    names = ("confused", "exclusion", "cross_entropy", "alignment")
    return AFDLoss(total, {name: total.detach() for name in names}, logits.detach(), wrong)


def step_in_place(x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, step_size: float) -> Tensor:
    return x_adv.copy_(plain.linf_step(x_adv, grad, x, eps, step_size))


# For each kernel: the module in which its caller finds it, and plain PyTorch to use instead. A function that is called
# outside the compiled parts is compiled alone; the others are compiled together with their callers.
INSTEAD: dict[str, tuple[Any, Callable[..., Any]]] = {
    "augment": (fastafd.data.augment, torch.compile(plain.augment, dynamic=False)),
    "linf_step": (fastafd.training.engine, torch.compile(step_in_place, dynamic=False)),
    "attack_head": (fastafd.attacks.snapshot, attack_head_reference),
    "afd_loss": (fastafd.methods.afd, plain_afd_loss),
}


def without(kernel: str, step: Step) -> Step:
    """The step with plain PyTorch instead of the kernel."""
    module, instead = INSTEAD[kernel]

    def run(x: Tensor, y: Tensor) -> Any:
        with mock.patch.object(module, kernel, instead):
            return step(x, y)

    return run


def random_batches(batch: int, count: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randint(0, 256, (batch, 32, 32, 3), dtype=torch.uint8, generator=generator).to(device),
            torch.randint(0, 10, (batch,), generator=generator).to(device),
        )
        for _ in range(count)
    ]


def counted_flops(arch: str, task: str) -> int:
    """The FLOPs of a step for one image, counted on the meta device: attack, teacher, update with all gradients."""
    with torch.device("meta"):
        net = build_model(arch, 10)
        model, x, y = disentangle(net), torch.empty(1, 3, 32, 32), torch.empty(1, dtype=torch.int64)

    def gradient() -> None:
        model.eval().requires_grad_(False)
        input_gradient(model, x.detach().requires_grad_() * 1, y)  # the counter does not accept a leaf
        model.train().requires_grad_()

    def update() -> None:
        if task == "natural":
            torch.nn.functional.cross_entropy(model.classifier(model.features(x)), y).backward()
            return
        weights = (model.d1.weight, model.d2.weight, model.classifier.weight, model.classifier.bias)
        features = model.features(x)
        total, *_ = plain.afd_loss(features, torch.empty_like(features), y, *weights, alpha=1, beta=1, gamma=1)
        total.backward()

    def count(call: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    if task == "natural":
        return count(update)
    with torch.no_grad():
        teacher = count(lambda: model.features(x))
    return AFD_ATTACK.steps * count(gradient) + teacher + count(update)
