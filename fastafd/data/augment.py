"""Random crop and horizontal flip on the device that holds the batch, from draws of one seeded CPU generator.

The draws are made on the CPU so that they are the same whatever the device, the loader or the kernel that applies
them, and so that one small generator state makes a resumed run continue with the very same pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastafd.kernels import augment


def to_unit(x: Tensor) -> Tensor:
    """Images as the model takes them: uint8 (B,H,W,3) -> float32 (B,3,H,W) in [0,1], channels_last."""
    # (B,H,W,3) seen as (B,3,H,W) is channels_last already, and .to keeps the strides: no second copy.
    # By a tensor: CUDA would multiply by 1/255 were it a number, and the pixels be others than a CPU's.
    return x.permute(0, 3, 1, 2).to(torch.float32).div_(torch.full((), 255.0, device=x.device))


class Augment:
    """Random crop of zero-padded images, then a random horizontal flip: uint8 (B,H,W,3) -> float32 (B,3,H,W) in [0,1].

    `generator` is the CPU torch.Generator of all draws; saving and restoring its state makes a run resume step-exact.
    """

    def __init__(self, padding: int, flip: bool, seed: int) -> None:
        self.padding = padding
        self.flip = flip
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, batch: int) -> tuple[Tensor, Tensor]:
        """Crop offsets int64 (B,2) in 0..2*padding and flips bool (B,), on the CPU; what is off draws nothing."""
        offsets = torch.zeros(batch, 2, dtype=torch.int64)
        flips = torch.zeros(batch, dtype=torch.bool)
        if self.padding:
            offsets.random_(0, 2 * self.padding + 1, generator=self.generator)
        if self.flip:
            flips.random_(0, 2, generator=self.generator)
        return offsets, flips

    def draw_on(self, device: torch.device, batch: int) -> tuple[Tensor, Tensor]:
        """`draw`, copied to a device without making the host wait for it."""
        offsets, flips = self.draw(batch)
        if device.type == "cuda":
            offsets, flips = offsets.pin_memory(), flips.pin_memory()
        return offsets.to(device, non_blocking=True), flips.to(device, non_blocking=True)

    def apply(self, x: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
        """The images at these draws: uint8 (B,H,W,3) -> float32 (B,3,H,W) in [0,1], channels_last."""
        if not self.padding and not self.flip:
            return to_unit(x)
        return augment(x, offsets, flips, self.padding)

    def __call__(self, x: Tensor) -> Tensor:
        """Augment a batch on its own device: uint8 (B,H,W,3) -> float32 (B,3,H,W) in [0,1], channels_last."""
        return self.apply(x, *self.draw_on(x.device, len(x)))
