"""Projected gradient descent on the cross-entropy (Madry et al., arXiv 1706.06083): Eq. 2 of the AFD paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastafd.attacks.inputs import (
    FirstOutput,
    check_images,
    check_labels,
    check_logits,
    kind_of,
    recording,
    shape_of,
)
from fastafd.attacks.threat import Ball, linf_noise
from fastafd.kernels.linf_step import linf_step_reference
from fastafd.settings import UsageError, in_255ths, number, pixels, setting, switch

NO_CLASS = -100  # the label of an image that F.cross_entropy leaves out


@dataclass(frozen=True)
class PGD(Ball):
    """An l-infinity PGD attack; call it with a classifier and a batch. `eps` and `step_size` also take "8/255"."""

    step_size: float = setting(2 / 255, "length of one step, in pixels of [0,1]; a fraction such as 2/255 too", pixels)
    steps: int = setting(10, "number of gradient steps", number(0, whole=True))
    random_start: bool = setting(True, "start at a random point of the ball rather than at the image", switch)

    def __call__(
        self,
        classifier: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Attack the images; returns x_adv (B,3,H,W), inside the eps-ball around x and inside [0,1].

        - classifier: maps (B,C,H,W) to logits (B,K); the caller sets its train or eval mode.
        - x: (B,C,H,W) in [0,1]. y: (B,) class numbers.
        - generator: draws the start; it is on x's device.

        Only the gradient of the input is computed, none of a weight. The attack is plain PyTorch, on CUDA too: no
        kernel of fastafd runs. It works under `torch.no_grad` and `torch.inference_mode`.
        Raises UsageError for images outside [0,1], for labels that are no class numbers, and for a classifier that
        returns something else than logits. The checks wait for the device once.
        """
        if not callable(classifier):
            raise UsageError(
                f"classifier: got a {type(classifier).__name__}, takes a network that returns logits (B,C)"
            )
        if generator is not None and not isinstance(generator, torch.Generator):
            raise UsageError(f"generator: got a {type(generator).__name__}, takes a torch.Generator or None")
        values = not recording()
        check_images(x, values=values)
        check_labels(y, len(x), values=values)
        if not len(x):
            return x.clone()

        def check(logits: object, count: int) -> None:
            if values:
                check_logits(logits, count, "classifier")
                check_labels(y, count, logits.shape[1])  # type: ignore[attr-defined]

        return self.perturb(FirstOutput(classifier, check), x, y.long(), generator)

    @torch.inference_mode(False)
    def perturb(
        self,
        classifier: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The attack itself, without the checks of a call."""
        x, y = (t.clone() if t.is_inference() else t for t in (x, y))  # autograd saves no inference tensor
        return self.climb(self.ascent(classifier, x, y), x, self.draw(x, generator))

    def ascent(self, classifier: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        """A function that gives the gradient to climb at x_adv, a leaf that requires grad.

        That of the cross-entropy with `target`. A subclass may climb anything else; then the fast engine calls this
        method too, with the attack's network compiled and its loss uncompiled.
        """
        target = self.target(lambda: classifier(x), y)
        return lambda x_adv: input_gradient(classifier, x_adv, target)

    def target(self, logits: Callable[[], Tensor], y: Tensor) -> Tensor:
        """The target of the cross-entropy: the labels (B,), or probabilities (B,K). A label of -100 leaves its image.

        logits(): those of the clean images (B,K).
        """
        return y

    def draw(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor | None:
        """The start noise, with the shape, type, memory format and device of `like`; None without a random start."""
        return linf_noise(like, self.eps, generator) if self.random_start else None

    def climb(
        self,
        gradient: Callable[[Tensor], Tensor],
        x: Tensor,
        noise: Tensor | None,
        step: Callable[[Tensor, Tensor, Tensor, float, float], object] = linf_step_reference,
    ) -> Tensor:
        """x_adv after all steps from the start x + noise (from x if noise is None).

        gradient: maps x_adv, a leaf that requires grad, to the direction to climb, (B,3,H,W). step: `linf_step`; in
        plain PyTorch unless the caller passes the operation with the kernel.
        """
        x = x.detach()
        x_adv = x.clone() if noise is None else x + noise  # not clipped to [0,1], as in the released code
        for _ in range(self.steps):
            grad = gradient(x_adv.requires_grad_())
            x_adv = x_adv.detach()
            step(x_adv, grad, x, self.eps, self.step_size)
        return x_adv if self.steps else x_adv.clamp(0.0, 1.0)  # a step ends inside [0,1]


def overrides(attack: PGD, name: str) -> bool:
    """True if the attack has a method of that name other than PGD's: from its class, or set on the attack itself."""
    return getattr(getattr(attack, name), "__func__", None) is not getattr(PGD, name)


def check_target(target: object, count: int, classes: int, name: str) -> None:
    """Raise UsageError, for the attack of that name, unless its `target` returns what the cross-entropy takes.

    That is class numbers (B,) from 0 to classes - 1, -100 for images that have none, or weights of the classes (B,C).
    """
    takes = f"takes class numbers ({count},) from 0 to {classes - 1}, or weights of the classes ({count},{classes})"
    if not isinstance(target, Tensor):
        raise UsageError(f"attack: target of {name} returns a {type(target).__name__}, {takes}")
    shape = (count, classes) if target.is_floating_point() else (count,)
    if target.shape != shape or (target.dtype not in (torch.int64, torch.uint8) and not target.is_floating_point()):
        raise UsageError(f"attack: target of {name} returns {kind_of(target)} {shape_of(target)}, {takes}")
    if target.is_floating_point():
        if not target.isfinite().all():
            raise UsageError(f"attack: target of {name} returns values that are not finite, {takes}")
        return
    labels = target[target != NO_CLASS]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UsageError(f"attack: target of {name} returns labels {int(labels.min())} to {int(labels.max())}, {takes}")


def weights_of(target: Tensor, classes: int) -> Tensor:
    """The target as weights of the classes (B,C); an image without a class has none."""
    if target.is_floating_point():
        return target
    return (target[:, None] == torch.arange(classes, device=target.device)).float()


def weakness(attack: Ball, step: float | None = None) -> str | None:
    """A line about an attack whose steps do not reach the border of its ball; None if they do.

    step: the longest step, in pixels of [0,1], of a method that takes one and makes its attacked images itself; None
    for one that always steps as far as eps.
    """
    if not attack.eps:
        return "no attack: with eps 0 the attacked images are the clean ones, so that no robustness is trained"
    if isinstance(attack, PGD):
        steps, step = attack.steps, attack.step_size
    else:
        steps, step = 1, attack.eps if step is None else step
    if steps * step >= attack.eps * (1 - 1e-6):
        return None
    steps_reach = f"{steps} steps of {in_255ths(step)} reach" if steps > 1 else "the longest step reaches"
    reach, eps = in_255ths(steps * step), in_255ths(attack.eps)
    return (
        f"a weak attack: {steps_reach} {reach}, less than eps {eps}; a robustness measured or trained with it may not"
        " be there"
    )


def input_gradient(classifier: Callable[[Tensor], Tensor], x_adv: Tensor, target: Tensor) -> Tensor:
    """The gradient of the summed cross-entropy with respect to the leaf x_adv. Only its signs count, so no mean.

    target: labels (B,) or probabilities (B,K).
    """
    with torch.enable_grad():
        logits = classifier(x_adv)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not logits.requires_grad:
            raise UsageError("classifier: its output has no gradient; an attack needs one, so nothing may detach it")
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, target, reduction="sum"), x_adv)
    return grad
