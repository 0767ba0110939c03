"""Loaders and the .beton cache: the same order and pixels from all three loaders, no leaks, damaged files rebuilt."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from errno import ENOSPC
from pathlib import Path

import numpy as np
import pytest
import torch

from fastafd.data import LOADERS, ArraySplit, Augment, ensure_beton, epoch_order, load_dataset, make_loader
from fastafd.data.beton import find_fault, import_ffcv
from fastafd.settings import RunError, UsageError

UNPACK = Path(__file__).resolve().parents[2] / "shared" / "data" / "unpack.py"

try:
    import_ffcv()
    WHY_NO_FFCV = ""
except Exception as error:
    WHY_NO_FFCV = f"ffcv cannot be imported: {error}"
needs_ffcv = pytest.mark.skipif(bool(WHY_NO_FFCV), reason=WHY_NO_FFCV or "ffcv is there")
KINDS = [pytest.param(kind, marks=needs_ffcv) if kind == "ffcv" else kind for kind in LOADERS]


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    return load_dataset("digits", tmp_path_factory.mktemp("empty"))


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory):
    if not UNPACK.exists():
        pytest.skip("no CIFAR-10 images beside the repository (../shared/data/unpack.py)")
    folder = tmp_path_factory.mktemp("cifar10")
    command = [sys.executable, str(UNPACK), "cifar10", str(folder), "--per-class", "20"]
    subprocess.run(command, check=True, capture_output=True)
    return load_dataset("cifar10", folder)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def split(digits):
    """A small split for tests that write .beton files."""
    return ArraySplit(digits.test.images()[:300], digits.test.labels[:300])


def loader_of(kind, split, cache, name="digits", **kwargs):
    kwargs = {"batch_size": 96, "seed": 0, "device": "cpu", "report": print} | kwargs
    return make_loader(kind, split, name=name, cache=cache, **kwargs)


def assert_same(batches, expected):
    batches, expected = list(batches), list(expected)
    assert len(batches) == len(expected)
    for (x, y), (other_x, other_y) in zip(batches, expected, strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)


# ----------------------------------------------------------------------------------------------------------- order


def test_order_is_a_permutation_of_seed_and_epoch_alone():
    order = epoch_order(1000, seed=1, epoch=2)
    assert order.dtype == np.int64 and sorted(order) == list(range(1000))
    np.random.seed(0)
    torch.manual_seed(0)
    np.testing.assert_array_equal(epoch_order(1000, 1, 2), order)
    others = [epoch_order(1000, 1, 3), epoch_order(1000, 2, 2), epoch_order(1000, 2, 1)]
    assert all((other != order).mean() > 0.9 for other in others)


# --------------------------------------------------------------------------------------------------------- loaders


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["digits", "cifar10"])
@pytest.mark.parametrize("drop_last", [True, False])
def test_batches_are_the_split_in_order(kind, name, drop_last, cache, request):
    """Every loader compared with the split: two epochs, the last partial batch, later starts, augmented pixels."""
    split = request.getfixturevalue(name).train
    images = torch.from_numpy(split.images())
    labels = torch.from_numpy(split.labels)
    loader = loader_of(kind, split, cache, f"{name}-train", batch_size=96, seed=7, drop_last=drop_last)
    assert loader.kind == kind
    assert len(loader) == len(split) // 96 + (not drop_last)
    augment, reference = Augment(4, True, seed=2), Augment(4, True, seed=2)
    for epoch in range(2):
        chunks = torch.from_numpy(epoch_order(len(split), 7, epoch)).split(96)[: len(loader)]
        expected = [(images[chunk], labels[chunk]) for chunk in chunks]
        assert len(expected[-1][0]) == (96 if drop_last else len(split) % 96)
        batches = list(loader.epoch(epoch))  # all batches are kept, so a reused buffer would show
        assert_same(batches, expected)
        for x, y in batches:
            assert x.dtype == torch.uint8 and x.is_contiguous() and x.shape[1:] == (32, 32, 3)
            assert y.dtype == torch.int64 and y.ndim == 1
        for (x, _), (expected_x, _) in zip(batches, expected, strict=True):
            assert torch.equal(augment(x), reference(expected_x))
        for start in (1, len(loader) - 1, len(loader)):
            assert_same(loader.epoch(epoch, start), expected[start:])


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_and_seeds_differ(kind, split, cache):
    loaders = [loader_of(kind, split, cache, "small", seed=seed, drop_last=False) for seed in (0, 1)]

    def labels(seed, epoch):
        return torch.cat([y for _, y in loaders[seed].epoch(epoch)])

    first = labels(0, 0)
    assert torch.equal(labels(0, 0), first)
    assert not torch.equal(labels(0, 1), first) and not torch.equal(labels(1, 0), first)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_leaves_torch_and_its_generators_alone(kind, split, cache, two_threads):
    torch.manual_seed(0)
    np.random.seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(loader_of(kind, split, cache, "small").epoch(0))
    assert torch.get_num_threads() == 2
    # New threads start with the count that any thread set last.
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_breaking_off_leaks_no_thread(kind, split, cache):
    loader = loader_of(kind, split, cache, "small", batch_size=16)
    before = set(threading.enumerate())
    for epoch in range(5):
        batches = loader.epoch(epoch)
        for _ in range(epoch):  # 0: closed before the first batch
            next(batches)
        batches.close()
        assert set(threading.enumerate()) == before
    for _ in loader.epoch(9):
        break
    assert set(threading.enumerate()) == before  # nothing refers to the generator any more
    list(loader.epoch(10))
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("kind", KINDS)
def test_two_epochs_at_once(kind, split, cache):
    loader = loader_of(kind, split, cache, "small")
    expected = list(loader.epoch(0)), list(loader.epoch(1))
    pairs = list(zip(loader.epoch(0), loader.epoch(1), strict=True))
    assert_same([a for a, _ in pairs], expected[0])
    assert_same([b for _, b in pairs], expected[1])


def test_folder_trees_give_the_same_batches(cifar10, cache):
    """CIFAR-10 is a folder tree here; the torch loader decodes it in threads, batch by batch."""
    kinds = ["resident", "torch"] + ([] if WHY_NO_FFCV else ["ffcv"])
    loaders = [loader_of(kind, cifar10.test, cache, "cifar10-test", drop_last=False) for kind in kinds]
    expected = list(loaders[0].epoch(3))
    for loader in loaders[1:]:
        assert_same(loader.epoch(3), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_batches_on_a_gpu_are_those_of_the_cpu(kind, digits, cache):
    loader = loader_of(kind, digits.train, cache, "digits-train", device="cuda", drop_last=False)
    expected = list(loader_of("resident", digits.train, cache, drop_last=False).epoch(1))
    batches = list(loader.epoch(1))
    assert all(x.is_cuda and y.is_cuda and x.is_contiguous() for x, y in batches)
    assert_same([(x.cpu(), y.cpu()) for x, y in batches], expected)
    augment, reference = Augment(4, True, seed=0), Augment(4, True, seed=0)
    for (x, _), (expected_x, _) in zip(batches, expected, strict=True):
        torch.testing.assert_close(
            augment(x).cpu(), reference(expected_x), rtol=0, atol=1e-7
        )  # x/255 against x*(1/255)


def test_usage_errors_of_loaders(split, cache):
    with pytest.raises(UsageError, match="did you mean ffcv"):
        loader_of("fcv", split, cache)
    for kind in LOADERS:
        with pytest.raises(UsageError, match=r"batch_size: got 301, takes 1\.\.300"):
            loader_of(kind, split, cache, batch_size=301)
    loader = loader_of("resident", split, cache, batch_size=301, drop_last=False)
    assert len(loader) == 1 and len(next(loader.epoch(0))[0]) == 300
    with pytest.raises(ValueError):
        loader.epoch(0, start=2)


def test_without_ffcv_one_line_and_resident(split, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv", None)  # makes `import ffcv` fail
    lines: list[str] = []
    loader = loader_of("ffcv", split, tmp_path, report=lines.append)
    assert loader.kind == "resident"
    assert len(lines) == 1 and "\n" not in lines[0] and "ffcv cannot be imported" in lines[0] and "resident" in lines[0]
    assert not list(tmp_path.iterdir())
    assert_same(loader.epoch(0), loader_of("resident", split, tmp_path).epoch(0))


@needs_ffcv
def test_a_failing_pipeline_is_an_error_and_no_endless_wait(split, cache):
    loader = loader_of("ffcv", split, cache, "small")

    def broken(**kwargs):
        raise OSError("Input/output error")

    loader.loader.code = ([(broken, [])], [])
    before = set(threading.enumerate())
    with pytest.raises(RunError, match="ffcv failed"):
        list(loader.epoch(0))
    assert set(threading.enumerate()) == before


# ----------------------------------------------------------------------------------------------------------- beton


@needs_ffcv
def test_beton_is_reused(split, tmp_path):
    lines: list[str] = []
    path = ensure_beton(split, "digits-train", tmp_path, lines.append)
    assert path.name == f"digits-train-{split.fingerprint[:12]}.beton"
    assert len(lines) == 1 and "300 images" in lines[0]
    side = json.loads(path.with_suffix(".json").read_text())
    assert (side["fingerprint"], side["images"], side["image_size"]) == (split.fingerprint, 300, 32)
    assert (side["bytes"], side["mtime_ns"]) == (path.stat().st_size, path.stat().st_mtime_ns)
    assert ensure_beton(split, "digits-train", tmp_path, lines.append) == path
    assert path.stat().st_mtime_ns == side["mtime_ns"] and len(lines) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([path.name, path.with_suffix(".json").name])


def truncate(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def cut_to_nothing(path):
    path.write_bytes(b"")


def change(offset):
    def change_bytes(path):
        """The size is equal, and for the header the time too: only the bytes differ."""
        stat = path.stat()
        with open(path, "r+b") as file:
            file.seek(offset)
            old = file.read(1)
            file.seek(offset)
            file.write(bytes([old[0] ^ 0x55]))
        if offset < 24:
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    return change_bytes


def lose_side_file(path):
    path.with_suffix(".json").unlink()


def spoil_side_file(path):
    path.with_suffix(".json").write_text('{"fingerprint": ')


DAMAGES = {
    "truncated": truncate,
    "empty": cut_to_nothing,
    "version": change(0),
    "num_fields": change(2),
    "page_size": change(5),
    "num_samples": change(8),
    "alloc_table_ptr": change(16),
    "pixels": change(3_000_000),
    "no side file": lose_side_file,
    "spoilt side file": spoil_side_file,
}


@needs_ffcv
@pytest.mark.parametrize("damage", DAMAGES)
def test_beton_is_rebuilt_when_damaged(damage, split, tmp_path):
    path = ensure_beton(split, "digits", tmp_path, print)
    good = path.read_bytes()
    DAMAGES[damage](path)
    lines: list[str] = []
    assert ensure_beton(split, "digits", tmp_path, lines.append) == path
    assert "rebuilding it from its source" in lines[0] and len(lines) == 2 and "\n" not in lines[0]
    assert path.read_bytes() == good
    assert find_fault(path, path.with_suffix(".json"), split) is None


@needs_ffcv
def test_a_touched_or_copied_beton_is_kept(split, tmp_path):
    path = ensure_beton(split, "digits", tmp_path, print)
    os.utime(path)
    touched = path.stat().st_mtime_ns
    lines: list[str] = []
    ensure_beton(split, "digits", tmp_path, lines.append)
    assert not lines and path.stat().st_mtime_ns == touched
    assert json.loads(path.with_suffix(".json").read_text())["mtime_ns"] == touched


@needs_ffcv
def test_a_changed_source_gets_a_new_beton(split, tmp_path):
    lines: list[str] = []
    path = ensure_beton(split, "digits", tmp_path, lines.append)
    images = split.images().copy()
    images[0, 0, 0, 0] ^= 1
    new = ensure_beton(ArraySplit(images, split.labels), "digits", tmp_path, lines.append)
    assert new != path and "the source differs from that of" in lines[1] and path.name in lines[1]


@needs_ffcv
def test_a_full_disk_leaves_nothing(split, tmp_path, monkeypatch):
    def full(self):
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    monkeypatch.setattr("ffcv.memory_allocator.MemoryAllocator.flush_page", full)
    with pytest.raises(RunError, match="No space left on device") as caught:
        ensure_beton(split, "digits", tmp_path, print)
    assert "\n" not in str(caught.value) and "FASTAFD_CACHE" in str(caught.value)
    assert not list(tmp_path.iterdir())


@needs_ffcv
@pytest.mark.parametrize("limit", [100_000, 9_000_000, 16_777_216, 16_778_000])
def test_a_write_cut_short_leaves_nothing(limit, split, tmp_path):
    """A file size limit cuts writes short like a full disk: in a page, at its end, in the table."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(RunError, match="cannot write"):
            ensure_beton(split, "digits", tmp_path, print)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    ensure_beton(split, "digits", tmp_path, print)


@needs_ffcv
def test_a_page_cut_short_unnoticed_leaves_nothing(split, tmp_path, monkeypatch):
    """If space is freed after a short write, FFCV goes on, and its table would point to wrong places."""
    from ffcv.memory_allocator import MemoryAllocator

    whole = MemoryAllocator.flush_page

    def cut_short(self):
        whole(self)
        self.fp.truncate(self.fp.tell() - 1000)

    monkeypatch.setattr(MemoryAllocator, "flush_page", cut_short)
    with pytest.raises(RunError, match="bytes of"):
        ensure_beton(split, "digits", tmp_path, print)
    assert not list(tmp_path.iterdir())


@needs_ffcv
def test_an_interrupted_write_leaves_the_old_file(split, tmp_path, monkeypatch):
    path = ensure_beton(split, "digits", tmp_path, print)
    truncate(path)
    half = path.read_bytes()

    def interrupted(indices=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(split, "images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_beton(split, "digits", tmp_path, print)
    assert path.read_bytes() == half and len(list(tmp_path.iterdir())) == 2


@needs_ffcv
def test_a_corrupt_source_image_is_named(digits, tmp_path):
    from PIL import Image

    for part in ("train", "test"):
        for c in digits.classes:
            (tmp_path / part / c).mkdir(parents=True)
            for i in range(2):
                Image.fromarray(digits.train.images()[i]).save(tmp_path / part / c / f"{i}.png")
    tree = load_dataset("digits", tmp_path)
    bad = tmp_path / "train" / "6" / "1.png"
    bad.write_bytes(b"no image")  # after the images were checked
    with pytest.raises(UsageError, match=str(bad)):
        ensure_beton(tree.train, "digits", tmp_path / "cache", print)
    assert not list((tmp_path / "cache").iterdir())


@needs_ffcv
def test_two_writers_at_once(split, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: ensure_beton(split, "digits", tmp_path, print), range(4)))
    assert len(set(paths)) == 1 and len(list(tmp_path.iterdir())) == 2
    lines: list[str] = []
    ensure_beton(split, "digits", tmp_path, lines.append)
    assert not lines


@needs_ffcv
def test_a_cache_folder_that_cannot_be_made(split, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        ensure_beton(split, "digits", tmp_path / "file" / "cache", print)
