"""The .beton cache: a split's uint8 images in FFCV's file format, written once and checked before each use.

FFCV's DatasetWriter writes the file, but in this process: if one of its worker processes fails (a full disk, a corrupt
image), the writer waits for ever. Copying raw pixels is fast enough without workers, and one writer makes the same
bytes each time.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np

from fastafd.console import Bar, Console
from fastafd.data.splits import Split
from fastafd.files import save_text
from fastafd.settings import RunError, user_path

Report = Callable[[str], None]
BLOCK = 256  # images decoded at a time while writing


def import_ffcv() -> ModuleType:
    """Import FFCV and prevent it from setting torch's thread count to 1, on import and again in its loader thread.

    Raises whatever the import raises: OSError or ImportError if a shared library is missing.
    """
    import torch

    threads = torch.get_num_threads()
    import ffcv
    import numba
    from ffcv.pipeline.compiler import Compiler

    torch.set_num_threads(threads)

    def set_num_threads(n: int) -> None:
        Compiler.num_threads = n if n > 0 else len(os.sched_getaffinity(0))
        numba.set_num_threads(Compiler.num_threads)

    Compiler.set_num_threads = set_num_threads
    return ffcv


def ensure_beton(split: Split, name: str, folder: Path, report: Report) -> Path:
    """The .beton file of `split` in `folder`, `<name>-<fingerprint>.beton`; it is written if it does not exist.

    If its size, header or content differs from its side file (.json), it is rebuilt, and one line says so.
    Raises RunError if the folder cannot be written (a full disk), UsageError if a source image cannot be read; neither
    leaves a file behind.
    """
    folder = user_path(folder, "folder")
    path = folder / f"{name}-{split.fingerprint[:12]}.beton"
    side = path.with_suffix(".json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fault = find_fault(path, side, split)
        if fault is None:
            return path
        others = sorted(other.name for other in folder.glob(f"{name}-{'[0-9a-f]' * 12}.beton") if other != path)
        if path.exists():
            report(f"{path.name}: {fault}; rebuilding it from its source")
        elif others:
            report(
                f"{path.name}: the source differs from that of {others[-1]} (other images or size); writing a new file"
            )
        write(split, path, side, report)
    except OSError as error:
        raise RunError(
            f"cache: cannot write {path} ({error.strerror or error}); make room, set FASTAFD_CACHE to another folder, "
            "or take the loader resident"
        ) from error
    return path


def find_fault(path: Path, side: Path, split: Split) -> str | None:
    """How a .beton file differs from its side file; None if it does not. Touching or copying the file is no fault."""
    if not path.exists():
        return "it does not exist"
    try:
        written = json.loads(side.read_text())
        described = describe(path, split)
    except (OSError, ValueError) as error:
        return f"it cannot be checked ({error})"
    if not isinstance(written, dict):
        return "its side file is not a JSON object"
    for key, value in described.items():
        if key != "mtime_ns" and written.get(key) != value:
            return f"{key} is {value}, was {written.get(key)} when written"
    if written.get("mtime_ns") != described["mtime_ns"]:
        # The file was copied, touched, or written by two processes at once, whose bytes are equal: compare the content.
        if sha256(path) != written.get("sha256"):
            return "its content changed since it was written"
        save_text(side, json.dumps(written | described, indent=1))
    return None


def describe(path: Path, split: Split) -> dict[str, int | str]:
    """The facts about a .beton file that need no reading of all of it.

    ValueError if it has no header of this version.
    """
    from ffcv.types import CURRENT_VERSION, HeaderType

    stat = path.stat()
    header = np.fromfile(path, dtype=HeaderType, count=1)
    if not len(header):
        raise ValueError(f"it has {stat.st_size} bytes, less than a header")
    if header[0]["version"] != CURRENT_VERSION:
        raise ValueError(f"its format version is {header[0]['version']}, this FFCV reads {CURRENT_VERSION}")
    return {
        "fingerprint": split.fingerprint,
        "images": len(split),
        "image_size": split.image_size,
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        **{field: int(header[0][field]) for field in HeaderType.names},
    }


def write(split: Split, path: Path, side: Path, report: Report) -> None:
    """Write the file and its side file under temporary names, then move both into place."""
    import_ffcv()
    from ffcv.fields import IntField, RGBImageField

    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    started = time.perf_counter()
    try:
        image_bytes = 3 * split.image_size**2
        # A page holds whole images: 8 MiB, FFCV's default, or the next power of two if an image is larger.
        page_size = max(1 << 23, 1 << (image_bytes - 1).bit_length())
        fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
        with Bar(Console(), f"writing {path.name}", len(split)) as bar:
            write_samples(temporary, fields, page_size, read_samples(split, bar), len(split))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        described = describe(temporary, split) | {"sha256": sha256(temporary)}
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    save_text(side, json.dumps(described, indent=1))
    seconds = time.perf_counter() - started
    report(f"{path.name}: wrote {len(split)} images, {path.stat().st_size / 2**20:.0f} MiB, in {seconds:.1f} s")


def write_samples(
    path: Path, fields: dict[str, object], page_size: int, samples: Iterator[tuple[np.ndarray, int]], count: int
) -> None:
    """Do the work of DatasetWriter.from_indexed_dataset with FFCV's parts, one after the other in this process."""
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.types import ALLOC_TABLE_TYPE
    from ffcv.writer import DatasetWriter, handle_sample

    writer = DatasetWriter(str(path), fields, page_size=page_size, num_workers=1)
    writer.num_samples = count
    writer.prepare()
    writer.metadata_sm.close()  # shared memory for workers, which do not exist here
    writer.metadata_sm.unlink()
    metadata = np.zeros(count, dtype=writer.metadata_type)
    allocator = MemoryAllocator(str(path), writer.data_region_start, page_size)
    allocator.__enter__()
    try:
        for i, sample in enumerate(samples):
            handle_sample(sample, i, metadata.dtype.names, metadata, allocator, fields)
        allocator.flush_page()
    finally:
        allocator.fp.close()  # __exit__ would write the page again after a failed write
    writer.metadata_sm = SimpleNamespace(buf=metadata.tobytes())
    writer.finalize(allocator.allocations)

    # FFCV does not check how many bytes a write took, so on a full disk a page may be cut short.
    expected = allocator.offset + allocator.next_page_written.value * page_size + count * ALLOC_TABLE_TYPE.itemsize
    if path.stat().st_size != expected:
        raise OSError(f"{path.stat().st_size} bytes of {expected} were written: the disk is probably full")


def read_samples(split: Split, bar: Bar) -> Iterator[tuple[np.ndarray, int]]:
    """The images, uint8 (H,W,3), with their labels, in order; the bar advances with each block."""
    for start in range(0, len(split), BLOCK):
        block = np.arange(start, min(start + BLOCK, len(split)))
        yield from zip(split.images(block), split.labels[block], strict=True)
        bar.advance(len(block))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
