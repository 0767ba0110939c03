"""Where images come from: CIFAR through torchvision, Tiny-ImageNet as published, folder trees, scikit-learn's digits.

Every source ends in a `Dataset` of two `Split`s, whose labels follow the data set's published class order whatever
the layout on disk, so that a model trained from a folder tree is comparable with published weights.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, NoReturn

import numpy as np

from fastafd.console import Console
from fastafd.data.catalogue import examine, first_line, shown
from fastafd.data.splits import ArraySplit, FolderSplit, Split, unreadable, wrong_size
from fastafd.settings import UsageError, number, unknown, user_path

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")

CIFAR10_CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
CIFAR100_CLASSES = tuple(  # the fine labels
    """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm""".split()
)
TINY_IMAGENET_CLASSES = 200
DIGITS_SEED = 0  # of the train/test split; a constant, so that every user has the same test images
DIGITS_TEST_FRACTION = 0.2
SIDE = number(8, 1024, whole=True)  # in pixels, as --image-size
LISTED = 10  # bad images that are listed by name
DIGITS_SIZES = (8, 16, 32)  # in pixels; the first is that of the files, the last the default


@dataclass(frozen=True)
class Dataset:
    """A data set. padding: of the random crop, in pixels. flip: True if mirroring an image keeps its class."""

    name: str
    classes: tuple[str, ...]
    image_size: int
    padding: int
    flip: bool
    train: Split
    test: Split


def load_dataset(
    name: str,
    data_dir: Path,
    image_size: int | None = None,
    download: bool = True,
    skip_bad_images: bool = False,
) -> Dataset:
    """The data set `name` of DATASETS, from `data_dir`: its published layout, or a tree train/<class>,
    test|val/<class>.

    Labels follow the published class order in both layouts. image_size: for imagefolder, where the shorter side of each
    image is resized to so many pixels and the centre is cut out, and for digits. download: False never downloads.
    skip_bad_images: True lists the image files that cannot be read or have the wrong size and leaves them out. Raises
    UsageError for an unknown name, a failed download, a missing, unknown or empty class, a folder that cannot be read,
    and, unless they are skipped, for bad images. All image files are decoded once to find them; the cache
    remembers what was found.
    """
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    source = DATASETS[name]
    if image_size is not None and source.image_size not in (None, image_size):
        raise UsageError(f"image_size: got {image_size}, takes {source.image_size} for {name} (or leave it out)")
    if image_size is not None:
        image_size = SIDE(image_size, "image_size")
    place = Place(user_path(data_dir, "data_dir"), source.image_size or image_size, download, skip_bad_images)
    try:
        classes, train, test = source.load(place)
    except OSError as error:  # a folder without permission, a link that points to itself
        named = error.filename or place.data_dir
        raise UsageError(f"data_dir: cannot read {shown(os.fsdecode(named))} ({error.strerror or error})") from error
    if skip_bad_images and not isinstance(train, FolderSplit):
        raise UsageError(f"skip_bad_images: got true, and {name} here has no image files; leave it out")
    train.check_labels(len(classes))
    test.check_labels(len(classes))
    size = train.image_size
    return Dataset(name, tuple(classes), size, size // 8, source.flip, train, test)


# ---------------------------------------------------------------------------------------------- the named sources

Loaded = tuple[Sequence[str], Split, Split]


class Place(NamedTuple):
    """What a source is loaded from and how; see `load_dataset`."""

    data_dir: Path
    image_size: int | None
    download: bool
    skip_bad: bool


def load_cifar(classes: tuple[str, ...], place: Place) -> Loaded:
    """CIFAR-10 or CIFAR-100 (the number of classes decides), from a folder tree or else through torchvision."""
    data_dir, download = place.data_dir, place.download
    if (data_dir / "train").is_dir():
        return read_tree(place, classes)
    from torchvision import datasets

    kind = datasets.CIFAR10 if len(classes) == 10 else datasets.CIFAR100
    try:
        train, test = (kind(data_dir, train=part, download=download) for part in (True, False))
    except Exception as error:  # no network, a wrong checksum, a broken pickle: the remedy is the same
        reason = f"the download failed: {first_line(error)}" if download else "downloading is off"
        raise UsageError(
            f"data_dir: {data_dir} holds no readable {kind.__name__} ({reason}); it may hold {kind.base_folder}/ as "
            "published, or train/<class>/*.png and test/<class>/*.png"
        ) from error
    if tuple(train.classes) != classes:
        raise UsageError(f"data_dir: {data_dir}/{kind.base_folder} is not {kind.__name__}: its class names differ")
    return classes, ArraySplit(train.data, train.targets), ArraySplit(test.data, test.targets)


def load_tiny_imagenet(place: Place) -> Loaded:
    """Tiny-ImageNet as Stanford ships it, or a folder tree; wnids.txt names the classes if it exists."""
    data_dir, inner = place.data_dir, place.data_dir / "tiny-imagenet-200"
    root = inner if inner.is_dir() else data_dir
    place = place._replace(data_dir=root)
    if not (root / "train").is_dir():
        raise UsageError(
            f"data_dir: neither {data_dir} nor {inner} has a folder train; unpack tiny-imagenet-200.zip "
            "(http://cs231n.stanford.edu/tiny-imagenet-200.zip) there"
        )
    wnids = root / "wnids.txt"
    classes = sorted(set(read_names(wnids).split())) if wnids.is_file() else folder_names(root / "train")
    if not wnids.is_file() and len(classes) != TINY_IMAGENET_CLASSES:
        raise UsageError(
            f"data_dir: {root}/train has {len(classes)} class folders, takes {TINY_IMAGENET_CLASSES} "
            "(a wnids.txt beside train may name fewer)"
        )
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        return read_tree(place, classes)
    train = read_classes(root, "train", classes)
    test = read_annotations(root, annotations, classes)
    return classes, *folder_splits(place, classes, train, test, resize=False)


def load_imagefolder(place: Place) -> Loaded:
    """Any tree train/<class>, test|val/<class>; classes are sorted by name."""
    data_dir = place.data_dir
    if not (data_dir / "train").is_dir():
        raise UsageError(f"data_dir: {data_dir} has no folder train; takes train/<class>/* and test|val/<class>/*")
    classes = folder_names(data_dir / "train")
    if len(classes) == 1:
        raise UsageError(f"data_dir: {data_dir / 'train'} has one class ({shown(classes[0])}), takes two or more")
    return read_tree(place, classes, resize=place.image_size is not None)


def load_digits(place: Place) -> Loaded:
    """scikit-learn's 8x8 digits as RGB images of a size in DIGITS_SIZES; a fixed draw of 20 % of each class is the test
    split.
    """
    image_size = place.image_size
    if image_size not in (None, *DIGITS_SIZES):
        raise UsageError(f"image_size: got {image_size}, takes {', '.join(map(str, DIGITS_SIZES))} for digits")
    image_size = image_size or DIGITS_SIZES[-1]
    place = place._replace(image_size=image_size)
    classes = tuple("0123456789")
    train_folder = place.data_dir / "train"
    if train_folder.is_dir() and set(classes) & set(folder_names(train_folder)):
        return read_tree(place, classes)  # only a tree of digits, not any tree in the default folder
    import torch

    try:
        from sklearn import datasets
    except ImportError as error:  # an offline bundle does not contain it
        raise UsageError(
            f"dataset: digits comes with scikit-learn, which cannot be imported ({first_line(error)}); add it, take "
            "another data set, or name a tree of digits with --data-dir"
        ) from error

    digits = datasets.load_digits()
    small = torch.from_numpy(digits.images).float()[:, None]  # (N,1,8,8) in 0..16
    large = torch.nn.functional.interpolate(small, size=image_size, mode="bilinear", align_corners=False)
    # The interpolation is exact in fp32 (its weights are multiples of 1/8), so the pixels agree on every machine.
    pixels = (large * 255 / 16).round().to(torch.uint8)
    images = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
    rng = np.random.default_rng(DIGITS_SEED)
    is_test = np.zeros(len(images), dtype=bool)
    for c in range(len(classes)):
        members = rng.permutation(np.flatnonzero(digits.target == c))
        is_test[members[: round(DIGITS_TEST_FRACTION * len(members))]] = True
    train, test = (ArraySplit(images[part], digits.target[part]) for part in (~is_test, is_test))
    return classes, train, test


@dataclass(frozen=True)
class Source:
    """How a named data set is loaded. image_size: in pixels; None takes that of the images. flip: see `Dataset`."""

    load: Callable[[Place], Loaded]
    image_size: int | None
    flip: bool = True


DATASETS = MappingProxyType(
    {
        "cifar10": Source(functools.partial(load_cifar, CIFAR10_CLASSES), 32),
        "cifar100": Source(functools.partial(load_cifar, CIFAR100_CLASSES), 32),
        "tiny-imagenet": Source(load_tiny_imagenet, 64),
        "imagefolder": Source(load_imagefolder, None),
        "digits": Source(load_digits, None, flip=False),  # a mirrored digit is not that digit
    }
)


# ---------------------------------------------------------------------------------------------- folders of images

Members = tuple[list[str], list[int]]  # paths relative to the root, labels


def read_tree(place: Place, classes: Sequence[str], resize: bool = False) -> Loaded:
    """The splits of a tree train/<class>, test|val/<class>; labels follow the order of `classes`."""
    root = place.data_dir
    tests = [name for name in ("test", "val") if (root / name).is_dir()]
    if not tests:
        raise UsageError(f"data_dir: {root} has no folder test or val beside train")
    # ImageNet and Tiny-ImageNet have a test folder of unlabelled images; take the folder that contains classes.
    test = next((name for name in tests if set(classes) & set(folder_names(root / name))), tests[0])
    members = read_classes(root, "train", classes), read_classes(root, test, classes)
    return classes, *folder_splits(place, classes, *members, resize)


def read_classes(root: Path, part: str, classes: Sequence[str]) -> Members:
    """The image files of root/part/<class>, class by class, each class sorted by path."""
    folders = folder_names(root / part)
    missing = [name for name in classes if name not in folders]
    stray = [name for name in folders if name not in set(classes)]
    if missing:
        raise UsageError(
            f"data_dir: {shown(root / part)} has no folder for the class {missing[0]!r}{and_more(missing)}"
        )
    if stray:
        raise UsageError(f"data_dir: {shown(root / part / stray[0])} is not a class of this data set{and_more(stray)}")
    if not classes:
        raise UsageError(f"data_dir: {shown(root / part)} has no class folders")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = image_files(root, root / part / name)
        if not files:
            raise UsageError(f"data_dir: {shown(root / part / name)} holds no images ({' '.join(EXTENSIONS)})")
        paths += files
        labels += [label] * len(files)
    return paths, labels


def read_annotations(root: Path, annotations: Path, classes: Sequence[str]) -> Members:
    """The validation images of Tiny-ImageNet: lines `file <tab> wnid <tab> box`, files in val/images."""
    index = {name: label for label, name in enumerate(classes)}
    folder = annotations.parent / "images"
    present = set(os.listdir(folder)) if folder.is_dir() else set()
    paths: list[str] = []
    labels: list[int] = []
    for row, line in enumerate(read_names(annotations).splitlines(), start=1):
        if not line.strip():
            continue
        file, wnid, *_ = [*line.split("\t"), ""]
        if wnid not in index:
            raise UsageError(f"data_dir: {annotations} line {row}: {wnid!r} is not in wnids.txt")
        if file not in present:
            raise UsageError(f"data_dir: {annotations} line {row}: there is no {shown(folder / file)}")
        paths.append(f"val/images/{file}")
        labels.append(index[wnid])
    without = sorted(set(range(len(classes))) - set(labels))
    if without:
        name = classes[without[0]]
        raise UsageError(f"data_dir: {annotations} has no image of the class {name!r}{and_more(without)}")
    return paths, labels


def folder_splits(
    place: Place, classes: Sequence[str], train: Members, test: Members, resize: bool
) -> tuple[FolderSplit, FolderSplit]:
    """Two splits of the same image size: that of the place, or the most common one, which must be square.

    All images are decoded now, once, so that a bad one ends the run before the training.
    """
    root, image_size = place.data_dir, place.image_size
    paths = train[0] + test[0]
    facts = examine(root, paths)
    if image_size is None:
        sizes = [(fact.width, fact.height) for fact in facts]
        good = Counter(size for size, fact in zip(sizes, facts, strict=True) if not fact.fault)
        ((width, height), _), *_ = good.most_common(1) or [((0, 0), 0)]
        if width != height:
            like = shown(root / paths[sizes.index((width, height))])
            raise UsageError(
                f"data_dir: {like} is {width}x{height} pixels, the most common size, takes square images; "
                "--image-size N resizes and crops"
            )
        image_size = width
    faults = {}
    for path, fact in zip(paths, facts, strict=True):
        if fact.fault:
            faults[path] = unreadable(root / path, fact.fault)
        elif not resize and (fact.width, fact.height) != (image_size, image_size):
            faults[path] = wrong_size(root / path, fact.width, fact.height, image_size)
    if faults and not place.skip_bad:
        others = and_more([*faults])
        raise UsageError(f"data_dir: {next(iter(faults.values()))}{others}; --skip-bad-images true leaves bad ones out")
    if faults:
        list_faults(faults)
    parts = []
    for members, of_part in ((train, facts[: len(train[0])]), (test, facts[len(train[0]) :])):
        rows = [
            (path, label, fact.content)
            for path, label, fact in zip(*members, of_part, strict=True)
            if path not in faults
        ]
        emptied = sorted(set(members[1]) - {label for _, label, _ in rows})
        if emptied:
            raise UsageError(f"data_dir: all images of the class {classes[emptied[0]]!r} are bad{and_more(emptied)}")
        files, labels, contents = zip(*rows, strict=True)
        parts.append(FolderSplit(root, files, labels, contents, classes, image_size, resize))
    return parts[0], parts[1]


def list_faults(faults: dict[str, str]) -> None:
    """Write a line for each of the first bad images, and how many there are."""
    console = Console()
    for fault in [*faults.values()][:LISTED]:
        console.line(f"left out: {fault}")
    more = f", of which {LISTED} are listed" if len(faults) > LISTED else ""
    console.line(f"{len(faults)} bad images are left out{more}")


def read_names(file: Path) -> str:
    """A text file of names; those that are not UTF-8 stay the names of their files."""
    return file.read_text(encoding="utf-8", errors="surrogateescape")


def folder_names(folder: Path) -> list[str]:
    """The sorted names of the folders in a folder, without hidden ones."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def image_files(root: Path, folder: Path) -> list[str]:
    """The image files at any depth below `folder`, as sorted paths relative to `root`.

    Hidden files and folders do not count. Links to folders are followed, each folder once, so a loop of links ends.
    OSError for a folder that cannot be read.
    """
    paths = []
    visited = {inode(parent) for parent in (root, folder.parent)}
    for base, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        here = inode(base)
        if here in visited:
            folders.clear()
            continue
        visited.add(here)
        folders[:] = [name for name in folders if not name.startswith(".")]
        folders.sort(key=lambda name: (os.path.islink(os.path.join(base, name)), name))  # links come last
        place = Path(base).relative_to(root).as_posix()
        paths += [f"{place}/{f}" for f in files if f.lower().endswith(EXTENSIONS) and not f.startswith(".")]
    return sorted(paths)


def fail(error: OSError) -> NoReturn:
    """Raise an error that os.walk would pass over."""
    raise error


def inode(folder: str | Path) -> tuple[int, int]:
    """The same for all paths to a folder."""
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def and_more(items: Sequence[object]) -> str:
    """The end of a message that names the first of several items."""
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""
