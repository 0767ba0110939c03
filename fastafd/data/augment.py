"""Random crop and horizontal flip on the batch's device, with draws of one seeded CPU generator.

The draws are made on the CPU, so that they are the same for every device, loader and kernel, and so that saving one
small generator state is enough to resume a run with exactly the same pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastafd.kernels import augment


def to_unit(x: Tensor) -> Tensor:
    """Turn uint8 images (B,H,W,3) into the float32 images (B,3,H,W) in [0,1] that a model takes, channels_last."""
    # The permuted view is channels_last already, and .to keeps the strides, so there is no second copy.
    # The divisor is a tensor: with a number CUDA would multiply by 1/255, and the pixels would differ from a CPU's.
    return x.permute(0, 3, 1, 2).to(torch.float32).div_(torch.full((), 255.0, device=x.device))


class Augment:
    """Random crop of zero-padded images, then a random horizontal flip: uint8 (B,H,W,3) to float32 (B,3,H,W) in [0,1].

    padding: pixels on each side, 0 for no crop. flip: False for no flip. `generator` is the CPU generator of all draws;
    restore its state to resume exactly.
    """

    def __init__(self, padding: int, flip: bool, seed: int) -> None:
        self.padding = padding
        self.flip = flip
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, batch: int) -> tuple[Tensor, Tensor]:
        """Draw crop offsets, int64 (B,2) in 0..2*padding, and flips, bool (B,), on the CPU.

        A part that is off draws nothing.
        """
        offsets = torch.zeros(batch, 2, dtype=torch.int64)
        flips = torch.zeros(batch, dtype=torch.bool)
        if self.padding:
            offsets.random_(0, 2 * self.padding + 1, generator=self.generator)
        if self.flip:
            flips.random_(0, 2, generator=self.generator)
        return offsets, flips

    def draw_on(self, device: torch.device, batch: int) -> tuple[Tensor, Tensor]:
        """`draw`, copied to the device without waiting for it."""
        offsets, flips = self.draw(batch)
        if device.type == "cuda":
            offsets, flips = offsets.pin_memory(), flips.pin_memory()
        return offsets.to(device, non_blocking=True), flips.to(device, non_blocking=True)

    def apply(self, x: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
        """The images with these draws: uint8 (B,H,W,3) to float32 (B,3,H,W) in [0,1], channels_last."""
        if not self.padding and not self.flip:
            return to_unit(x)
        return augment(x, offsets, flips, self.padding)

    def __call__(self, x: Tensor) -> Tensor:
        """Augment a batch on its device: uint8 (B,H,W,3) to float32 (B,3,H,W) in [0,1], channels_last."""
        return self.apply(x, *self.draw_on(x.device, len(x)))
