"""What is known of the image files of a tree: the hash of their content, their size, and whether they can be decoded.

Every file is read, hashed and decoded once. The facts are kept in the cache folder, in one file a tree, and hold as
long as a file's size, times and inode stay: touching or moving a file costs a second reading, no more.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastafd.console import Bar, Console
from fastafd.files import write_atomic
from fastafd.settings import RunError, cache_dir

DECODING = 3  # raised when the same file becomes other pixels; 3: the centre is cut out before it is resized
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF")  # Pillow's names; of others it starts a program, Ghostscript
AT_ONCE = 32  # files that a thread reads in a row
SAID = 20_000  # files from which on a line says that they are read once


class Facts(NamedTuple):
    """content: SHA-256 (32 bytes), empty if there are no bytes to read.

    width, height: in pixels, turned as the EXIF data say; 0 if the image has a fault.

    fault: why it cannot be taken; empty if it can.
    """

    content: bytes
    width: int
    height: int
    fault: str


Stamp = tuple[int, int, int, int]  # size in bytes, time of the content, time of the inode, inode


def open_rgb(source: Any) -> Any:
    """The first picture of an image file as RGB, turned as its EXIF data say: a PIL image.

    source: a path or an open file. Raises ValueError with a sentence for pixels of more than 8 bits, and whatever
    Pillow's decoders raise for a file that they cannot read.
    """
    from PIL import Image, ImageOps

    with Image.open(source, formats=FORMATS) as file:
        if file.mode.startswith("I") or file.mode == "F":  # Pillow would clip their pixels to white
            raise ValueError(f"it has pixels of more than 8 bits (mode {file.mode}), takes 8-bit images")
        return ImageOps.exif_transpose(file).convert("RGB")


@contextmanager
def no_warnings() -> Iterator[None]:
    """Silence what Pillow says of images that it reads: damaged EXIF data, many pixels, a transparent palette.

    Filters belong to the process, so this stands around the threads that read, not in them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def examine(root: Path, paths: Sequence[str]) -> list[Facts]:
    """The facts of each file, read again where nothing is remembered of it as it is now.

    paths: relative to root.
    """
    root = root.absolute()
    file = memory_of(root)
    known = remembered(file)
    stamps = [stamp(root / path) for path in paths]
    facts: list[Facts | None] = []
    for path, now in zip(paths, stamps, strict=True):
        then, fact = known.get(path, (None, None))
        facts.append(fact if then == now else None)
    missing = [index for index, fact in enumerate(facts) if fact is None]
    if missing:
        console = Console()
        if len(missing) >= SAID:
            size = sum(now[0] for index in missing if (now := stamps[index])) / 2**20
            console.line(f"{shown(root)}: reading and decoding {len(missing)} images once, {size:.0f} MiB")
        with Bar(console, f"checking the images of {shown(root.name)}", len(missing)) as bar:
            for index, fact in zip(missing, read_all(root, [paths[index] for index in missing], bar), strict=True):
                facts[index] = fact
    complete = [fact for fact in facts if fact is not None]
    if missing:
        with suppress(RunError):  # if the disk is full, the next run reads them again
            remember(file, paths, stamps, complete)
    return complete


def memory_of(root: Path) -> Path:
    """The file in the cache that keeps the facts of a tree."""
    return cache_dir() / "images" / f"{hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:16]}.npz"


def forget(root: Path) -> None:
    """Let the next run read all files of a tree again."""
    with suppress(OSError):
        memory_of(root).unlink()


def stamp(path: Path) -> Stamp | None:
    """What changes when a file changes; None if nothing can be said of it."""
    try:
        now = path.stat()
    except OSError:
        return None
    return now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino


def read_all(root: Path, paths: Sequence[str], bar: Bar) -> list[Facts]:
    """The facts of files that are read now, by several threads: Pillow releases the interpreter lock."""

    def read(start: int) -> list[Facts]:
        return [read_facts(root / path) for path in paths[start : start + AT_ONCE]]

    facts: list[Facts] = []
    with no_warnings(), ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
        try:
            for block in pool.map(read, range(0, len(paths), AT_ONCE)):
                facts += block
                bar.advance(len(block))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # without it, the error would wait for all queued files
            raise
    return facts


def read_facts(path: Path) -> Facts:
    """The facts of one file. A pipe, a socket or a device is not opened: reading it may never end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return Facts(b"", 0, 0, "no regular file")
        content = path.read_bytes()
    except OSError as error:
        return Facts(b"", 0, 0, error.strerror or first_line(error))
    digest = hashlib.sha256(content).digest()
    try:
        image = open_rgb(io.BytesIO(content))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error …
        # Pillow's own words name the memory address of the file; they differ from run to run.
        return Facts(digest, 0, 0, "no image file of a known kind" if "BytesIO" in str(error) else first_line(error))
    return Facts(digest, image.width, image.height, "")


def first_line(error: BaseException) -> str:
    """The first line of the error's message, or its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shown(path: str | Path) -> str:
    """A path or name as a line shows it: control characters, such as a line break, are escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(path))


# -- the file of a tree: arrays of all paths, stamps and facts ----------------------------------------------------


def remembered(file: Path) -> dict[str, tuple[Stamp | None, Facts | None]]:
    """The stamps and facts by path; {} if the file is missing, damaged, or of another decoding."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            decoding = int(arrays["decoding"])
            stamps, contents, sizes = (arrays[name] for name in ("stamps", "contents", "sizes"))
            paths, faults = (arrays[name].tobytes().split(b"\0") for name in ("paths", "faults"))
        kept = {len(stamps), len(contents), len(sizes), len(paths), len(faults)}
        if decoding != DECODING or len(kept) != 1 or contents.shape[1:] != (32,):
            return {}
        rows = zip(paths, stamps.tolist(), contents, sizes.tolist(), faults, strict=True)
        return {
            os.fsdecode(path): (tuple(now), Facts(content.tobytes(), width, height, fault.decode()))
            for path, now, content, (width, height), fault in rows
        }
    except Exception:  # what a damaged file raises depends on the damage; the images are read again
        return {}


def remember(file: Path, paths: Sequence[str], stamps: Sequence[Stamp | None], facts: Sequence[Facts]) -> None:
    """Write the file of a tree, without the files that had no bytes to read. RunError if that fails."""
    rows = [row for row in zip(paths, stamps, facts, strict=True) if row[1] is not None and row[2].content]
    arrays: dict[str, Any] = {
        "decoding": np.int64(DECODING),
        "paths": joined([os.fsencode(path) for path, _, _ in rows]),
        "stamps": np.array([now for _, now, _ in rows], np.int64).reshape(-1, 4),
        "contents": np.frombuffer(b"".join(fact.content for _, _, fact in rows), np.uint8).reshape(-1, 32),
        "sizes": np.array([fact[1:3] for _, _, fact in rows], np.int32).reshape(-1, 2),
        "faults": joined([fact.fault.replace("\0", " ").encode(errors="replace") for _, _, fact in rows]),
    }

    def write(temporary: Path) -> None:
        with temporary.open("wb") as opened:
            np.savez(opened, **arrays)

    write_atomic(file, write)


def joined(texts: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"\0".join(texts), np.uint8)
