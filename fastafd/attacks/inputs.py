"""Checks of what a caller passes, images and labels, and of the logits of the caller's network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastafd.device import OUT_OF_MEMORY
from fastafd.settings import UsageError

TOLERANCE = 1e-6  # pixels may leave [0,1] by rounding
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_images(x: object, *, values: bool = True) -> None:
    """Raise UsageError unless x is a floating (B,C,H,W) tensor of finite pixels in [0,1].

    values: False checks type and shape alone, which does not wait for the device.
    """
    if not isinstance(x, Tensor):
        raise UsageError(f"x: got a {type(x).__name__}, takes a tensor of images (B,C,H,W) in [0,1]")
    check_storage(x, "x")
    if not x.is_floating_point():
        raise UsageError(
            f"x: got {kind_of(x)} {shape_of(x)}, takes floating pixels in [0,1]; fastafd.data.to_unit scales"
        )
    if x.dim() != 4 or not x[:1].numel() >= min(1, len(x)):
        raise UsageError(f"x: got {shape_of(x)}, takes images (B,C,H,W)")
    if x.shape[1] not in (1, 3, 4) and x.shape[-1] in (1, 3, 4):
        raise UsageError(f"x: got {shape_of(x)}, takes (B,C,H,W): the channels come before the rows")
    if not values or not len(x):
        return
    low, high = (float(v) for v in torch.aminmax(x.detach()))
    if low != low or high != high:
        raise UsageError(f"x: got NaN in {int(x.isnan().flatten(1).any(1).sum())} of {len(x)} images, takes [0,1]")
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        hint = "divide by 255" if low >= 0 and 16 < high <= 255 else "normalisation belongs inside the model"
        raise UsageError(f"x: got pixels from {low:.3g} to {high:.3g}, takes [0,1]; {hint}")


def check_labels(y: object, count: int, classes: int | None = None, *, values: bool = True) -> None:
    """Raise UsageError unless y is a tensor of `count` class numbers (B,), from 0 to classes - 1.

    classes: None if it is not known. values: False checks type and shape alone, which does not wait for the device.
    """
    if not isinstance(y, Tensor):
        raise UsageError(f"y: got a {type(y).__name__}, takes a tensor of class numbers (B,)")
    check_storage(y, "y")
    if y.dim() == 2 and y.shape[1] == 1 and len(y) == count:
        raise UsageError(f"y: got {shape_of(y)}, takes class numbers (B,); y.squeeze(1) has that shape")
    if y.dim() == 2 and len(y) == count:
        kind = "soft labels" if y.is_floating_point() else "one-hot labels"
        raise UsageError(f"y: got {shape_of(y)}, which look like {kind}, takes class numbers (B,), as y.argmax(1)")
    if y.dtype not in INTEGERS:
        raise UsageError(f"y: got {kind_of(y)} {shape_of(y)}, takes whole class numbers (B,) of type int64")
    if y.shape != (count,):
        raise UsageError(f"y: got {shape_of(y)} for {count} images, takes one class number for each, ({count},)")
    if not values or not count:
        return
    low, high = (int(v) for v in torch.aminmax(y))
    if low < 0 or (classes is not None and high >= classes):
        takes = f"0 to {classes - 1}" if classes is not None else "numbers from 0 on"
        raise UsageError(f"y: got labels from {low} to {high}, takes {takes}")


def check_logits(logits: object, count: int, name: str, *, finite: bool = True) -> None:
    """Raise UsageError, for the argument `name`, unless a network's output is logits (B,C).

    finite: False lets NaN pass.
    """
    if not isinstance(logits, Tensor):
        raise UsageError(f"{name}: returns a {type(logits).__name__}, takes a network that returns logits (B,C)")
    if logits.dim() != 2 or len(logits) != count or not logits.shape[1] or not logits.is_floating_point():
        got = f"{kind_of(logits)} {shape_of(logits)}"
        raise UsageError(f"{name}: returns {got} for {count} images, takes floating logits (B,C)")
    rounding = max(1e-3, 2 * torch.finfo(logits.dtype).eps)  # of a row's sum
    logits = logits.detach().float()
    if finite and logits.isnan().any():
        rows = int(logits.isnan().any(1).sum())
        raise UsageError(f"{name}: returns NaN for {rows} of {count} images")
    sums = logits.sum(1)
    if count and logits.shape[1] > 1 and bool((logits >= 0).all() & ((sums - 1).abs() < rounding).all()):
        raise UsageError(f"{name}: returns probabilities (each row sums to 1), takes logits; leave the softmax out")


def check_network(net: nn.Module, name: str) -> None:
    """Raise UsageError, for the argument `name`, for a network made in inference mode or without values."""
    if any(tensor.is_inference() for tensor in (*net.parameters(), *net.buffers())):
        raise UsageError(f"{name}: its weights are inference tensors; make or load it outside torch.inference_mode()")
    if any(tensor.is_meta for tensor in (*net.parameters(), *net.buffers())):
        raise UsageError(f"{name}: its weights are on the meta device, without values; load weights into it first")


@contextmanager
def named_failure(x: Tensor, name: str) -> Iterator[None]:
    """Turn PyTorch's error for a network that cannot take the images x into a UsageError for the argument `name`."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"{name}: fails for images {kind_of(x)} {shape_of(x)}: {reason}") from error


class FirstOutput:
    """A classifier whose first output is checked by `check`, which gets the logits and the number of images.

    All other attributes are the classifier's, for an attack that reads its features.
    """

    def __init__(self, classifier: Callable[[Tensor], Tensor], check: Callable[[object, int], None]):
        self.classifier, self.check = classifier, check
        self.checked = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.classifier, name)

    def __call__(self, x: Tensor) -> Tensor:
        if self.checked:
            return self.classifier(x)
        with named_failure(x, "classifier"):
            logits = self.classifier(x)
        self.check(logits, len(x))
        self.checked = True
        return logits


def recording() -> bool:
    """True while a CUDA graph is recorded, when nothing may wait for the device."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def check_storage(tensor: Tensor, name: str) -> None:
    """Raise UsageError, for the argument `name`, for a tensor without values in ordinary memory."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized or kind_of(tensor).startswith("float8"):
        form = "meta" if tensor.is_meta else f"{str(tensor.layout).removeprefix('torch.')} {kind_of(tensor)}"
        raise UsageError(f"{name}: got a {form} tensor {shape_of(tensor)}, takes a dense tensor with values")


def kind_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def shape_of(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
