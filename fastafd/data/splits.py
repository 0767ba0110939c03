"""Labelled images: a split in memory, and a split that decodes files on demand and names a file that has changed."""

from __future__ import annotations

import functools
import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastafd.data.catalogue import DECODING, first_line, forget, no_warnings, open_rgb, shown
from fastafd.settings import UsageError


class Split:
    """Labelled square images of one size. labels: int64 (N,). image_size: in pixels."""

    labels: np.ndarray
    image_size: int

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> np.ndarray:
        """Image `i`, uint8 (H,W,3). UsageError if its file cannot be read or has changed since its check."""
        raise NotImplementedError

    def images(self, indices: np.ndarray | None = None) -> np.ndarray:
        """The images at `indices` (all if None), uint8 (N,H,W,3). UsageError as for `image`."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """A hex SHA-256 of the labels, the pixels and their order. A copy of the files has the same.

        Caches are named after it, and a run may be resumed with data of the same fingerprint.
        """
        raise NotImplementedError

    def check_labels(self, classes: int) -> None:
        """Raise UsageError for the first label outside 0..classes-1."""
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= classes))
        if len(wrong):
            first = wrong[0]
            raise UsageError(f"label out of range: image {first} has {self.labels[first]}, takes 0..{classes - 1}")


class ArraySplit(Split):
    """A split in memory. images: uint8 (N,H,W,3), square. labels: whole numbers (N,). UsageError for anything else."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | Sequence[int]) -> None:
        self.array, classes = np.ascontiguousarray(images), np.asarray(labels)
        shape = self.array.shape
        if self.array.dtype != np.uint8:
            raise UsageError(f"images: got {self.array.dtype} {shape}, takes uint8 pixels from 0 to 255 (N,H,W,3)")
        if len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or not shape[1]:
            raise UsageError(f"images: got {shape}, takes square RGB images (N,H,W,3)")
        if classes.shape != shape[:1] or not (np.issubdtype(classes.dtype, np.integer) or not len(classes)):
            got = f"{classes.dtype} {classes.shape}"
            raise UsageError(f"labels: got {got} for {shape[0]} images, takes one whole class number for each")
        if len(classes) and not 0 <= classes.min() <= classes.max() < 2**31:
            raise UsageError(f"labels: got {classes.min()} to {classes.max()}, takes class numbers from 0 on")
        self.labels = classes.astype(np.int64)
        self.image_size = self.array.shape[1]

    def image(self, i: int) -> np.ndarray:
        return self.array[i]

    def images(self, indices: np.ndarray | None = None) -> np.ndarray:
        return self.array if indices is None else self.array[indices]

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.array.shape).encode())
        digest.update(self.labels.tobytes())
        digest.update(self.array.data)
        return digest.hexdigest()


class FolderSplit(Split):
    """A split that decodes files on demand.

    paths: relative to root, in the order of the labels. contents: the SHA-256 of each file; what is named after them,
    such as a .beton, never gets other pixels. resize: whether images may have another size, and are resized.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        labels: Sequence[int],
        contents: Sequence[bytes],
        classes: Sequence[str],
        image_size: int,
        resize: bool,
    ) -> None:
        self.root = root
        self.paths = list(paths)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.contents = list(contents)
        self.classes = tuple(classes)
        self.image_size = image_size
        self.resize = resize

    def image(self, i: int) -> np.ndarray:
        path = self.root / self.paths[i]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UsageError(f"data_dir: {unreadable(path, error.strerror or first_line(error))}") from error
        if hashlib.sha256(content).digest() != self.contents[i]:
            forget(self.root)  # or a change that left the file's times as they were would be found again and again
            raise UsageError(f"data_dir: {shown(path)} has changed since the images were checked; start again")
        return decoded(content, self.image_size)

    def images(self, indices: np.ndarray | None = None) -> np.ndarray:
        indices = np.arange(len(self)) if indices is None else np.asarray(indices)
        out = np.empty((len(indices), self.image_size, self.image_size, 3), np.uint8)

        def decode(start: int) -> None:
            for place in range(start, min(start + 64, len(indices))):
                out[place] = self.image(indices[place])

        # Threads are enough: Pillow releases the interpreter lock while it decodes.
        with no_warnings(), ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
            try:
                list(pool.map(decode, range(0, len(indices), 64)))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # without it, the error would wait for all queued images
                raise
        return out

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((DECODING, self.classes, self.image_size, self.resize)).encode())
        for label, content in zip(self.labels.tolist(), self.contents, strict=True):
            digest.update(b"%d\0" % label + content)
        return digest.hexdigest()


def decoded(content: bytes, size: int) -> np.ndarray:
    """The content of an image file as uint8 (size,size,3): its shorter side is resized, its centre cut out."""
    from PIL import Image

    image = open_rgb(io.BytesIO(content))
    if image.size == (size, size):
        return np.asarray(image)
    # Only the centre is resized: the whole of a long, thin image would not fit into memory.
    scale = size / min(image.size)
    spans = []
    for side in image.size:
        whole = max(size, int(side * scale))
        start = (whole - size) // 2
        spans.append((start * side / whole, (start + size) * side / whole))
    (left, right), (top, bottom) = spans
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, right, bottom)))


def unreadable(path: Path, fault: str) -> str:
    """The sentence about an image that cannot be read or decoded."""
    return f"cannot read the image {shown(path)} ({fault})"


def wrong_size(path: Path, width: int, height: int, size: int) -> str:
    """The sentence about an image of another size than the data set's."""
    return (
        f"{shown(path)} is {width}x{height} pixels, takes {size}x{size}"
        " (--dataset imagefolder with --image-size N resizes and crops)"
    )


def balanced_draw(labels: np.ndarray, n: int | None, seed: int) -> np.ndarray:
    """The sorted indices of `n` random images (all if n is None or too large), with classes of sizes as equal as
    possible.

    A smaller draw of the same seed is part of a larger one. Taking the first n images would not do: image trees are
    sorted by class.
    """
    if n is None or n >= len(labels):
        return np.arange(len(labels))
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(labels))
    rank = np.empty(len(labels), dtype=np.int64)  # an image's position within its class, in shuffled order
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        rank[members] = np.arange(len(members))
    by_rank = shuffled[np.argsort(rank[shuffled], kind="stable")]
    return np.sort(by_rank[:n])
