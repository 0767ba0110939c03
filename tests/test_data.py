"""Data sources and augmentation: class order, splits, one-line errors, and pixels compared with a naive reference."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from fastafd.data import DATASETS, ArraySplit, Augment, load_dataset, to_unit
from fastafd.data.sources import CIFAR10_CLASSES, CIFAR100_CLASSES
from fastafd.data.splits import decoded
from fastafd.kernels import augment as crop_flip
from fastafd.settings import UsageError

UNPACK = Path(__file__).resolve().parents[2] / "shared" / "data" / "unpack.py"
PER_CLASS = 20


@pytest.fixture(scope="session")
def cifar10_tree(tmp_path_factory):
    if not UNPACK.exists():
        pytest.skip("no CIFAR-10 images beside the repository (../shared/data/unpack.py)")
    folder = tmp_path_factory.mktemp("cifar10")
    command = [sys.executable, str(UNPACK), "cifar10", str(folder), "--per-class", str(PER_CLASS)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    return load_dataset("digits", tmp_path_factory.mktemp("empty"))


def save_tree(root: Path, images: np.ndarray, labels: np.ndarray, classes, parts=("train", "test"), size=32) -> Path:
    """A tree with two real images for each class and split."""
    for part in parts:
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i, image in enumerate(images[labels == label][:2]):
                Image.fromarray(image).resize((size, size)).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture
def digits_tree(tmp_path, digits):
    return save_tree(tmp_path / "tree", digits.train.images(), digits.train.labels, digits.classes)


def message(name: str, data_dir: Path, **kwargs) -> str:
    """The message of the UsageError when everything is loaded and decoded; it must be one line."""
    with pytest.raises(UsageError) as caught:
        dataset = load_dataset(name, data_dir, **kwargs)
        dataset.train.images()
        dataset.test.images()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------- digits


def test_digits_split_is_disjoint_stratified_and_fixed(digits, tmp_path):
    from sklearn.datasets import load_digits

    again = load_dataset("digits", tmp_path)
    assert (again.train.fingerprint, again.test.fingerprint) == (digits.train.fingerprint, digits.test.fingerprint)
    assert digits.train.fingerprint != digits.test.fingerprint
    target = load_digits().target
    assert len(digits.train) + len(digits.test) == len(target)
    for c in range(10):
        assert (digits.test.labels == c).sum() == round(0.2 * (target == c).sum())
        assert (digits.train.labels == c).sum() + (digits.test.labels == c).sum() == (target == c).sum()
    train = {image.tobytes() for image in digits.train.images()}
    assert not train & {image.tobytes() for image in digits.test.images()}


def test_digits_are_upscaled_bilinearly(digits):
    from sklearn.datasets import load_digits

    assert (digits.image_size, digits.padding, digits.flip) == (32, 4, False)
    images = digits.train.images()
    assert images.dtype == np.uint8 and images.shape == (len(digits.train), 32, 32, 3)
    assert images.min() == 0 and images.max() == 255
    assert (images[..., 0] == images[..., 1]).all() and (images[..., 0] == images[..., 2]).all()
    np.testing.assert_array_equal(digits.train.image(7), images[7])
    # Half-pixel bilinear by a factor of 4: output pixel 5 lies at (5.5/4 - 0.5) = 0.875 of the input.
    small = load_digits().images * 255 / 16
    corner = small[:, 0, 0] * 0.125**2 + (small[:, 0, 1] + small[:, 1, 0]) * 0.125 * 0.875 + small[:, 1, 1] * 0.875**2
    got = np.concatenate([images[:, 5, 5, 0], digits.test.images()[:, 5, 5, 0]])
    np.testing.assert_allclose(np.sort(got), np.sort(corner), atol=0.5)


# -------------------------------------------------------------------------------------------------- folder trees


def test_cifar10_tree_has_the_canonical_class_order(cifar10_tree):
    dataset = load_dataset("cifar10", cifar10_tree)
    assert dataset.classes == CIFAR10_CLASSES
    assert (dataset.image_size, dataset.padding, dataset.flip) == (32, 4, True)
    assert len(dataset.train) == len(dataset.test) == 10 * PER_CLASS
    assert dataset.train.labels.dtype == np.int64
    for i in (0, 57, 199):
        folder = cifar10_tree / "train" / CIFAR10_CLASSES[dataset.train.labels[i]]
        expected = np.asarray(Image.open(folder / f"{i % PER_CLASS:05d}.png"))
        np.testing.assert_array_equal(dataset.train.image(i), expected)
    np.testing.assert_array_equal(dataset.train.images()[57], dataset.train.image(57))
    np.testing.assert_array_equal(dataset.train.images(np.array([57, 3]))[0], dataset.train.image(57))


def test_the_published_order_wins_over_the_alphabet(tmp_path, digits):
    """A named data set keeps its class order even if it is not alphabetical."""
    from fastafd.data.sources import Place, read_tree

    names = ["zero", "one", "two"]
    save_tree(tmp_path, digits.train.images(), digits.train.labels, names)
    classes, train, _ = read_tree(Place(tmp_path, 32, download=False, skip_bad=False), names)
    assert list(classes) == names and train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert train.paths[0].startswith("train/zero/")
    assert load_dataset("imagefolder", tmp_path).classes == ("one", "two", "zero")


def test_cifar100_names():
    assert len(set(CIFAR100_CLASSES)) == 100 and list(CIFAR100_CLASSES) == sorted(CIFAR100_CLASSES)


def test_missing_stray_and_empty_classes_are_named(digits_tree):
    stray = digits_tree / "test" / "eleven"
    stray.mkdir()
    assert "eleven" in message("digits", digits_tree)
    stray.rmdir()
    for file in (digits_tree / "train" / "3").iterdir():
        file.unlink()
    assert str(digits_tree / "train" / "3") + " holds no images" in message("digits", digits_tree)
    (digits_tree / "train" / "3").rmdir()
    assert "class '3'" in message("digits", digits_tree)


def test_hidden_files_and_folders_are_no_images(digits_tree):
    (digits_tree / "train" / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints", ".thumbnails", ".Trash-1000/files"):
        shutil.copytree(digits_tree / "train" / "1", digits_tree / "train" / "0" / name)
    (digits_tree / "train" / "0" / "._0.png").write_bytes(b"resource fork")
    (digits_tree / "train" / "0" / "notes.txt").write_text("not an image")
    assert len(load_dataset("digits", digits_tree).train) == 20


@pytest.mark.parametrize(
    "file", ["0.png", "1.png"]
)  # the first image of a class is opened at loading, the others at decoding
def test_a_corrupt_image_is_named(digits_tree, file):
    path = digits_tree / "train" / "4" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert str(path) in message("digits", digits_tree)
    path.write_bytes(b"no image at all")
    assert str(path) in message("digits", digits_tree)


@pytest.mark.parametrize("file", ["0.png", "1.png"])
def test_a_wrong_size_is_named(digits_tree, file):
    path = digits_tree / "test" / "4" / file
    Image.open(path).resize((40, 36)).save(path)
    error = message("digits", digits_tree)
    assert str(path) in error and "40x36" in error and "32x32" in error
    error = message("imagefolder", digits_tree)
    assert str(path) in error and "--image-size" in error


def test_other_colour_modes_become_rgb(digits_tree):
    folder = digits_tree / "train" / "5"
    before = load_dataset("digits", digits_tree).train.images()
    for i, mode in enumerate(["L", "P"]):
        Image.open(folder / f"{i}.png").convert("L").convert(mode).save(folder / f"{i}.png")
    np.testing.assert_array_equal(load_dataset("digits", digits_tree).train.images(), before)  # digits are grey


def test_a_tree_without_a_test_folder(digits_tree):
    shutil.rmtree(digits_tree / "test")
    assert "no folder test or val" in message("digits", digits_tree)
    (digits_tree / "train").rename(digits_tree / "tarin")
    assert "train" in message("imagefolder", digits_tree)


def test_val_serves_where_test_has_no_classes(digits_tree):
    (digits_tree / "test").rename(digits_tree / "val")
    (digits_tree / "test" / "images").mkdir(parents=True)  # unlabelled, as in ImageNet and Tiny-ImageNet
    assert load_dataset("digits", digits_tree).test.paths[0].startswith("val/")


def test_imagefolder_resizes_the_shorter_side_and_crops_the_centre(tmp_path, digits):
    tree = save_tree(tmp_path, digits.train.images(), digits.train.labels, ["a", "b"])
    path = tree / "train" / "a" / "0.png"
    stripes = np.zeros((20, 60, 3), np.uint8)  # a wide image, of which the middle third remains
    stripes[:, 20:40] = 255
    Image.fromarray(stripes).save(path)
    assert "60x20" in message("imagefolder", tree)
    dataset = load_dataset("imagefolder", tree, image_size=24)
    assert (dataset.image_size, dataset.padding, dataset.flip) == (24, 3, True)
    image = dataset.train.image(0)
    assert image.shape == (24, 24, 3) and (image[:, 2:-2] == 255).all()
    assert dataset.test.images().shape == (4, 24, 24, 3)


@pytest.mark.parametrize("width,height,size", [(61, 40, 24), (40, 97, 32), (13, 20, 16), (300, 200, 64)])
def test_cutting_before_resizing_gives_the_pixels_of_resizing_first(width, height, size, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    noise.save(tmp_path / "noise.png")
    scale = size / min(width, height)
    whole = [max(size, int(side * scale)) for side in (width, height)]
    left, top = ((side - size) // 2 for side in whole)
    expected = noise.resize(whole, Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    got = decoded((tmp_path / "noise.png").read_bytes(), size)
    np.testing.assert_allclose(got.astype(int), np.asarray(expected).astype(int), atol=1)


def test_a_long_thin_image_takes_little_memory(tmp_path, monkeypatch):
    largest = []
    original = Image.Image.resize

    def noted(self, size, *args, **kwargs):
        largest.append(size[0] * size[1])
        return original(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", noted)
    Image.new("1", (1, 100_000)).save(tmp_path / "thin.bmp")
    assert decoded((tmp_path / "thin.bmp").read_bytes(), 64).shape == (64, 64, 3)
    assert largest == [64 * 64]


def test_imagefolder_takes_the_size_that_all_images_share(tmp_path, digits):
    tree = save_tree(tmp_path, digits.train.images(), digits.train.labels, ["a", "b"], size=48)
    dataset = load_dataset("imagefolder", tree)
    assert (dataset.image_size, dataset.padding, dataset.classes) == (48, 6, ("a", "b"))


def test_the_fingerprint_of_a_tree_follows_its_files(digits_tree):
    def fingerprint(name="digits", **kwargs):
        return load_dataset(name, digits_tree, **kwargs).train.fingerprint

    first = fingerprint()
    assert fingerprint() == first and len(first) == 64
    assert fingerprint("imagefolder", image_size=24) != fingerprint("imagefolder", image_size=28)
    path = digits_tree / "train" / "0" / "0.png"
    path.touch()
    assert fingerprint() == first  # the content counts, not the time
    path.rename(path.with_name("9.png"))
    assert fingerprint() != first  # the order of the images has changed


# ------------------------------------------------------------------------------------------------- tiny-imagenet

WNIDS = ["n02124075", "n01443537", "n04067472"]  # not sorted; the labels follow the sorted order


@pytest.fixture
def tiny(tmp_path, digits):
    """Stanford's layout with three classes; the images of class k show the digit k."""
    root = tmp_path / "tiny-imagenet-200"
    images, labels = digits.train.images(), digits.train.labels
    (root / "val" / "images").mkdir(parents=True)
    (root / "test" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    lines = []
    for k, wnid in enumerate(sorted(WNIDS)):
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        for i, image in enumerate(images[labels == k][:3]):
            large = Image.fromarray(image).resize((64, 64))
            large.save(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", quality=95)
            name = f"val_{3 * i + k}.JPEG"
            large.save(root / "val" / "images" / name, quality=95)
            lines.append(f"{name}\t{wnid}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(sorted(lines)))
    return root


def test_tiny_imagenet_as_stanford_ships_it(tiny):
    for data_dir in (tiny, tiny.parent):
        dataset = load_dataset("tiny-imagenet", data_dir)
        assert dataset.classes == tuple(sorted(WNIDS))
        assert (dataset.image_size, dataset.padding, dataset.flip) == (64, 8, True)
        assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert dataset.test.labels.tolist() == [0, 1, 2] * 3
        # The same images are on both sides: training image i of class k is validation image 3 * i + k.
        train, test = dataset.train.images(), dataset.test.images()
        for k in range(3):
            np.testing.assert_array_equal(train[dataset.train.labels == k], test[dataset.test.labels == k])


def test_tiny_imagenet_as_a_tree(tiny):
    expected = load_dataset("tiny-imagenet", tiny).test.images()
    for line in (tiny / "val" / "val_annotations.txt").read_text().splitlines():
        name, wnid = line.split("\t")[:2]
        (tiny / "val" / wnid).mkdir(exist_ok=True)
        (tiny / "val" / "images" / name).rename(tiny / "val" / wnid / name)
    (tiny / "val" / "images").rmdir()
    (tiny / "val" / "val_annotations.txt").unlink()
    dataset = load_dataset("tiny-imagenet", tiny)
    assert dataset.test.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    by_class = expected.reshape(3, 3, 64, 64, 3).swapaxes(0, 1).reshape(9, 64, 64, 3)
    np.testing.assert_array_equal(dataset.test.images(), by_class)
    (tiny / "wnids.txt").unlink()
    assert "has 3 class folders, takes 200" in message("tiny-imagenet", tiny)


def test_tiny_imagenet_messages(tiny, tmp_path):
    assert "tiny-imagenet-200.zip" in message("tiny-imagenet", tmp_path / "nowhere")
    annotations = tiny / "val" / "val_annotations.txt"
    good = annotations.read_text()
    annotations.write_text(good + "val_0.JPEG\tn99999999\t0\t0\t1\t1\n")
    assert "n99999999" in message("tiny-imagenet", tiny)
    annotations.write_text(good + f"val_77.JPEG\t{WNIDS[0]}\n")
    assert "val_77.JPEG" in message("tiny-imagenet", tiny)
    annotations.write_text("".join(line for line in good.splitlines(True) if WNIDS[0] not in line))
    assert WNIDS[0] in message("tiny-imagenet", tiny)
    (tiny / "wnids.txt").write_text("\n".join([*WNIDS, "n00000001"]))
    assert "n00000001" in message("tiny-imagenet", tiny)


# ------------------------------------------------------------------------------------------------ names and values


def test_unknown_names_and_sizes(tmp_path):
    assert "did you mean cifar100?" in message("cifar-100", tmp_path)
    assert message("cifar10", tmp_path, image_size=64).startswith("image_size: got 64, takes 32")
    for size in (0, 7, 1025, 100_000):
        assert message("imagefolder", tmp_path, image_size=size).startswith(f"image_size: got {size}, takes a whole")
    assert list(DATASETS) == ["cifar10", "cifar100", "tiny-imagenet", "imagefolder", "digits"]


def test_label_out_of_range(digits):
    labels = digits.train.labels.copy()
    labels[5] = 10
    split = ArraySplit(digits.train.images(), labels)
    split.check_labels(11)
    with pytest.raises(UsageError, match=r"label out of range: image 5 has 10, takes 0\.\.9"):
        split.check_labels(10)
    labels[5] = -1
    with pytest.raises(UsageError, match=r"^labels: got -1 to 9"):
        ArraySplit(digits.train.images(), labels)


# ----------------------------------------------------------------------------------------------------- torchvision


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_no_network_says_what_data_dir_may_hold(tmp_path, monkeypatch, name):
    def unreachable(*args, **kwargs):
        raise URLError("Network is unreachable")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    error = message(name, tmp_path)
    assert "unreachable" in error and "train/<class>/*.png" in error
    assert {"cifar10": "cifar-10-batches-py/", "cifar100": "cifar-100-python/"}[name] in error
    assert "downloading is off" in message(name, tmp_path, download=False)


def test_cifar10_as_published_agrees_with_the_tree(cifar10_tree, tmp_path, monkeypatch):
    """CIFAR's pickled batches, made from the tree's images: both layouts give the same images and labels."""
    tree = load_dataset("cifar10", cifar10_tree)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def save(name, split, part):
        rows = split.images().transpose(0, 3, 1, 2).reshape(len(split), -1)[part]
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": split.labels[part].tolist()}))

    for i in range(5):
        save(f"data_batch_{i + 1}", tree.train, slice(40 * i, 40 * i + 40))
    save("test_batch", tree.test, slice(None))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10_CLASSES)}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)  # these are fewer images
    published = load_dataset("cifar10", tmp_path, download=False)
    for split, other in ((published.train, tree.train), (published.test, tree.test)):
        np.testing.assert_array_equal(split.images(), other.images())
        np.testing.assert_array_equal(split.labels, other.labels)


def test_importing_is_light():
    heavy = ("torchvision", "sklearn", "ffcv", "PIL", "cv2", "numba")
    code = f"import sys, fastafd.data; print([m for m in {heavy} if m in sys.modules])"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------- augmentation


def naive(x: np.ndarray, offsets: np.ndarray, flips: np.ndarray, padding: int) -> torch.Tensor:
    """A naive reference: pad, slice and flip one image at a time."""
    out = []
    for image, (row, column), flip in zip(x, offsets, flips, strict=True):
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        crop = padded[row : row + image.shape[0], column : column + image.shape[1]]
        out.append(crop[:, ::-1] if flip else crop)
    return torch.from_numpy(np.stack(out).transpose(0, 3, 1, 2).astype(np.float32)) / 255


@pytest.fixture(params=["digits", "cifar10", "odd"])
def images(request):
    if request.param == "cifar10":
        return load_dataset("cifar10", request.getfixturevalue("cifar10_tree")).test.images()[::3]
    return request.getfixturevalue("digits").test.images()[:65, :, : 27 if request.param == "odd" else 32]


@pytest.mark.parametrize("padding,flip", [(4, True), (4, False), (0, True), (8, True), (1, False)])
def test_augment_is_pad_slice_flip(images, padding, flip):
    x = torch.from_numpy(np.ascontiguousarray(images))
    augment = Augment(padding, flip, seed=3)
    state = augment.generator.get_state()
    got = augment(x)
    augment.generator.set_state(state)
    offsets, flips = augment.draw(len(x))
    assert offsets.shape == (len(x), 2) and offsets.dtype == torch.int64 and flips.dtype == torch.bool
    assert torch.equal(got, naive(images, offsets.numpy(), flips.numpy(), padding))
    assert torch.equal(got, crop_flip(x, offsets, flips, padding))
    assert got.dtype == torch.float32 and got.is_contiguous(memory_format=torch.channels_last)
    assert got.min() >= 0 and got.max() <= 1


def test_crop_flip_at_every_extreme(digits):
    images = digits.train.images()[:1]
    for row in (0, 4, 8):
        for column in (0, 4, 8):
            for flip in (False, True):
                offsets, flips = torch.tensor([[row, column]]), torch.tensor([flip])
                got = crop_flip(torch.from_numpy(images), offsets, flips, 4)
                assert torch.equal(got, naive(images, offsets.numpy(), flips.numpy(), 4))


def test_no_padding_and_no_flip_draws_nothing(digits):
    x = torch.from_numpy(digits.train.images()[:9])
    augment = Augment(0, False, seed=1)
    state = augment.generator.get_state()
    assert torch.equal(augment(x), to_unit(x))
    assert torch.equal(augment.generator.get_state(), state)
    unit = to_unit(x)
    assert unit.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(unit, x.permute(0, 3, 1, 2).float() / 255)
    assert torch.equal(x, torch.from_numpy(digits.train.images()[:9]))  # the batch itself does not change


def test_draws_are_uniform_and_seeded():
    offsets, flips = Augment(4, True, seed=0).draw(81_000)
    counts = torch.bincount(offsets[:, 0] * 9 + offsets[:, 1], minlength=81).float()
    assert len(counts) == 81
    chi2 = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi2 < 140  # 80 degrees of freedom: p < 1e-4 beyond 140, and the seed is fixed
    assert abs(flips.float().mean().item() - 0.5) < 0.01
    again = Augment(4, True, seed=0).draw(81_000)
    assert torch.equal(again[0], offsets) and torch.equal(again[1], flips)
    assert not torch.equal(Augment(4, True, seed=1).draw(81_000)[0], offsets)


def test_a_restored_generator_continues_with_the_same_pixels(digits):
    x = torch.from_numpy(digits.train.images()[:64])
    augment = Augment(4, True, seed=5)
    augment(x)
    state = augment.generator.get_state()
    expected = [augment(x) for _ in range(3)]
    other = Augment(4, True, seed=99)
    other.generator.set_state(state)
    torch.rand(7)  # the global generator is not used
    for batch in expected:
        assert torch.equal(other(x), batch)


def test_pixels_of_more_than_eight_bits_are_refused(tmp_path):
    """Pillow's conversion to RGB would clip them to white."""
    from PIL import Image

    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
            Image.fromarray(ramp).save(tmp_path / part / name / "0.png")
    with pytest.raises(UsageError, match="8 bits"):
        load_dataset("imagefolder", tmp_path)


def test_one_class_is_no_classification(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "only").mkdir(parents=True)
    with pytest.raises(UsageError, match="one class"):
        load_dataset("imagefolder", tmp_path)


def test_digits_ignore_a_tree_of_something_else(tmp_path, digits):
    (tmp_path / "train" / "airplane").mkdir(parents=True)
    assert len(load_dataset("digits", tmp_path).train) == len(digits.train)
