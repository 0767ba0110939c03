"""Three loaders that deliver the same batches: with FFCV, from a copy on the device, or with PyTorch's DataLoader.

A batch is (images, uint8 (B,H,W,3); labels, int64 (B,)), both on the device. The order is a pure function of seed and
epoch, and no loader augments, so the choice of the loader changes the speed and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from queue import Empty
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastafd.data.beton import Report, ensure_beton, import_ffcv
from fastafd.data.splits import Split, first_line
from fastafd.settings import RunError, UsageError, number, unknown

LOADERS = ("ffcv", "resident", "torch")
Batches = Generator[tuple[Tensor, Tensor], None, None]


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `n` samples in an epoch, int64 (n,): a pure function of its arguments."""
    return np.random.default_rng((seed, epoch)).permutation(n)


class Loader:
    """Delivers the batches of a split in `epoch_order`. `len(loader)` is the number of batches in an epoch."""

    kind: str

    def __init__(self, n: int, batch_size: int, seed: int, drop_last: bool, device: torch.device) -> None:
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.batches = n // batch_size if drop_last else -(-n // batch_size)

    def __len__(self) -> int:
        return self.batches

    def epoch(self, epoch: int, start: int = 0) -> Batches:
        """The batches of an epoch from batch `start` on: uint8 (B,H,W,3), contiguous, and int64 (B,), on the device.

        Close the iterator to free its threads and buffers early. Raises ValueError for a start outside 0..len.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"start is {start}, takes 0..{len(self)}")
        order = epoch_order(self.n, self.seed, epoch)
        return self.deliver(order[start * self.batch_size : len(self) * self.batch_size])

    def deliver(self, order: np.ndarray) -> Batches:
        """The batches of the images with the indices `order`."""
        raise NotImplementedError


def make_loader(
    kind: str,
    split: Split,
    *,
    name: str,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    cache: Path,
    report: Report,
    drop_last: bool = True,
) -> Loader:
    """A loader of `split`: "ffcv" (a .beton called `name` in `cache`), "resident" (a copy on `device`) or "torch".

    If FFCV cannot be imported, the loader is resident, and `report` gets a line that says why. drop_last: False also
    delivers the last batch if it is smaller. Raises UsageError for an unknown kind and for a batch larger than the
    split, RunError if a .beton cannot be written or a copy does not fit on the device.
    """
    if kind not in LOADERS:
        raise unknown("loader", kind, LOADERS)
    batch_size = number(1, whole=True)(batch_size, "batch_size")
    if not len(split) or (drop_last and batch_size > len(split)):
        raise UsageError(f"batch_size: got {batch_size}, takes 1..{len(split)}, the number of images in {name}")
    shape = dict(n=len(split), batch_size=batch_size, seed=seed, drop_last=drop_last, device=torch.device(device))
    if kind == "ffcv":
        try:
            ffcv = import_ffcv()
        except Exception as error:  # ImportError, or OSError from one of the shared libraries it loads
            report(f"loader: ffcv cannot be imported ({first_line(error)}); taking resident, the batches are the same")
            kind = "resident"
        else:
            return FfcvLoader(ffcv, ensure_beton(split, name, cache, report), **shape)
    if kind == "resident":
        return ResidentLoader(split, **shape)
    return TorchLoader(split, **shape)


# ------------------------------------------------------------------------------------------------------- resident


class ResidentLoader(Loader):
    """Keeps the whole split on the device (150 MB for CIFAR-10); a batch is one index_select."""

    kind = "resident"

    def __init__(self, split: Split, **shape: Any) -> None:
        super().__init__(**shape)
        try:
            self.x = torch.from_numpy(split.images()).to(self.device)
            self.y = torch.from_numpy(split.labels).to(self.device)
        except torch.OutOfMemoryError as error:
            gib = 3 * split.image_size**2 * len(split) / 2**30
            raise RunError(
                f"loader: {gib:.1f} GiB of images do not fit on {self.device}; take ffcv or torch"
            ) from error

    def deliver(self, order: np.ndarray) -> Batches:
        indices = torch.from_numpy(order).to(self.device)
        for i in range(0, len(order), self.batch_size):
            batch = indices[i : i + self.batch_size]
            yield self.x.index_select(0, batch), self.y.index_select(0, batch)


# ---------------------------------------------------------------------------------------------------------- torch


class BatchDataset(torch.utils.data.Dataset):
    """A split for DataLoader, which calls `__getitems__` with the indices of a whole batch."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        batch = np.asarray(indices)
        return torch.from_numpy(self.split.images(batch)), torch.from_numpy(self.split.labels[batch])


def unchanged(batch: Any) -> Any:
    """The collate function of a data set that returns whole batches."""
    return batch


class TorchLoader(Loader):
    """PyTorch's DataLoader without workers: a folder split decodes in threads, and errors keep their one line."""

    kind = "torch"

    def __init__(self, split: Split, **shape: Any) -> None:
        super().__init__(**shape)
        self.dataset = BatchDataset(split)

    def deliver(self, order: np.ndarray) -> Batches:
        loader = torch.utils.data.DataLoader(
            self.dataset,
            batch_sampler=[order[i : i + self.batch_size].tolist() for i in range(0, len(order), self.batch_size)],
            collate_fn=unchanged,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # without it, each epoch would draw from the global generator
        )
        for x, y in loader:
            yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


# ----------------------------------------------------------------------------------------------------------- ffcv


class FfcvLoader(Loader):
    """FFCV, which reads raw uint8 images from a memory-mapped .beton in a thread ahead of the training.

    FFCV's Loader compiles the pipeline. The iterator of an epoch is made here, in `epoch_order`, because the Loader's
    iterator leaks a thread if an epoch is stopped early (libffcv/ffcv#345).
    """

    kind = "ffcv"

    def __init__(self, ffcv: ModuleType, beton: Path, **shape: Any) -> None:
        super().__init__(**shape)
        from ffcv.fields.basics import IntDecoder
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.transforms import ToTensor

        self.iterator = closing_iterator()
        self.loader = ffcv.Loader(
            str(beton),
            batch_size=self.batch_size,
            # One thread is enough to copy raw images. More threads need numba's parallel back ends, which fail after
            # a fork or with two loaders at once.
            num_workers=1,
            os_cache=True,  # use the page cache, which all processes on the machine share
            seed=0,  # not used; None would draw from numpy's global generator
            drop_last=False,
            pipelines={"image": [SimpleRGBImageDecoder(), ToTensor()], "label": [IntDecoder(), ToTensor()]},
        )

    def deliver(self, order: np.ndarray) -> Batches:
        if not len(order):
            return
        iterator = self.iterator(self.loader, order.astype(np.uint64))
        try:
            for x, y in iterator:
                yield self.copied(x), self.copied(y.view(-1))
            if iterator.error is not None:
                raise RunError(f"loader: ffcv failed ({first_line(iterator.error)}); take resident") from iterator.error
        finally:
            iterator.stop()

    def copied(self, buffer: Tensor) -> Tensor:
        """A copy on the device of one of FFCV's buffers, which later batches overwrite."""
        if self.device.type != "cuda":
            return buffer.clone().to(self.device)
        # Copy through torch's pinned memory, which is not reused before the asynchronous copy is done.
        return torch.empty_like(buffer, pin_memory=True).copy_(buffer).to(self.device, non_blocking=True)


def closing_iterator() -> Callable[..., Any]:
    """A subclass of FFCV's EpochIterator, a thread, that also ends if it is stopped early or if its pipeline fails."""
    from ffcv.loader.epoch_iterator import EpochIterator

    class ClosingIterator(EpochIterator):
        error: BaseException | None = None

        def run(self) -> None:
            try:
                super().run()
            except BaseException as error:  # the None ends the consumer's wait
                self.error = error
                self.output_queue.put(None)

        def stop(self) -> None:
            """End the thread: give it nothing more to read, and take the batches that it is waiting to hand over."""
            self.iter_ixes = iter(())
            self.close()
            while self.is_alive():
                try:
                    self.output_queue.get_nowait()
                except Empty:
                    self.join(0.002)

    return ClosingIterator
