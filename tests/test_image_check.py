"""Image files: caches follow their content, bad ones are found before the training, and any file name works."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, line_of
from PIL import Image

from fastafd import pretrain, train
from fastafd.data import catalogue, ensure_beton, load_dataset
from fastafd.settings import UsageError

SMALL = "--dataset imagefolder --arch resnet8_half --batch-size 6 --loader resident --epochs 1 --autoattack-n 0".split()
AT = [*SMALL, "--recipe", "pgd_at", "--attack.steps", "2"]


def tree_of(root, classes="ab", each=4, ext="png", seed=0, side=8):
    rng = np.random.default_rng(seed)
    for part in ("train", "test"):
        for label in classes:
            (root / part / label).mkdir(parents=True)
            for index in range(each):
                pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{index}.{ext}")
    return root


def same_times(root):
    for path in root.rglob("*"):
        os.utime(path, ns=(1_600_000_000_000_000_000, 1_600_000_000_000_000_000))


@pytest.fixture
def reads(monkeypatch):
    """The paths of the files that were read and decoded for their facts."""
    paths = []
    original = catalogue.read_facts

    def noted(path):
        paths.append(path)
        return original(path)

    monkeypatch.setattr(catalogue, "read_facts", noted)
    return paths


# -- the key ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ext", ["bmp", "ppm"])
def test_files_of_one_size_and_time_have_different_keys(tmp_path, ext):
    """As archives leave them: the same names, sizes and times, other pixels."""
    trees = [tree_of(tmp_path / str(seed), ext=ext, seed=seed) for seed in (0, 1)]
    for tree in trees:
        same_times(tree)
    stats = [[path.stat() for path in sorted(tree.rglob("*." + ext))] for tree in trees]
    assert [(s.st_size, s.st_mtime_ns) for s in stats[0]] == [(s.st_size, s.st_mtime_ns) for s in stats[1]]
    first, second = (load_dataset("imagefolder", tree).train for tree in trees)
    assert first.fingerprint != second.fingerprint


def test_two_trees_of_equal_names_and_sizes_share_no_pixels_and_no_natural_model(tmp_path):
    results = []
    for seed in (0, 1):
        tree = tree_of(tmp_path / f"data{seed}", "abcd", ext="bmp", seed=seed)
        same_times(tree)
        out = tmp_path / f"out{seed}"
        flags = [*SMALL, "--pretrain.epochs", "1", "--pretrain.batch-size", "4", "--attack.steps", "1"]
        train.main([*flags, "--loader", "ffcv", "--data-dir", str(tree), "--out", str(out)])
        results.append((out / "natural.safetensors").read_bytes())
    assert results[0] != results[1]


def test_a_copy_has_the_key_of_the_original(tmp_path):
    tree = tree_of(tmp_path / "first")
    shutil.copytree(tree, tmp_path / "copy", copy_function=shutil.copyfile)
    first, second = (load_dataset("imagefolder", root).train for root in (tree, tmp_path / "copy"))
    assert first.fingerprint == second.fingerprint


def test_the_key_has_the_version_of_the_decoding(tmp_path, monkeypatch):
    from fastafd.data import splits

    tree = tree_of(tmp_path / "tree")
    first = load_dataset("imagefolder", tree).train.fingerprint
    monkeypatch.setattr(splits, "DECODING", catalogue.DECODING + 1)
    assert load_dataset("imagefolder", tree).train.fingerprint != first


# -- what is remembered -------------------------------------------------------------------------------------------


def test_a_file_is_read_once(tmp_path, reads):
    tree = tree_of(tmp_path / "tree")
    first = load_dataset("imagefolder", tree).train.fingerprint
    assert len(reads) == 16
    assert load_dataset("imagefolder", tree).train.fingerprint == first and len(reads) == 16
    touched = tree / "train" / "a" / "0.png"
    touched.touch()
    assert load_dataset("imagefolder", tree).train.fingerprint == first
    assert reads[16:] == [touched]


def test_a_change_that_restores_the_time_is_seen(tmp_path, reads):
    tree = tree_of(tmp_path / "tree", ext="bmp")
    first = load_dataset("imagefolder", tree).train.fingerprint
    path = tree / "train" / "b" / "1.bmp"
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns
    assert load_dataset("imagefolder", tree).train.fingerprint != first


def test_swapped_files_are_seen(tmp_path):
    tree = tree_of(tmp_path / "tree", ext="bmp")
    same_times(tree)
    first = load_dataset("imagefolder", tree).train.fingerprint
    a, b, other = (tree / "train" / name for name in ("a/0.bmp", "b/0.bmp", "other"))
    a.rename(other), b.rename(a), other.rename(b)
    same_times(tree)
    assert load_dataset("imagefolder", tree).train.fingerprint != first


@pytest.mark.parametrize("damage", [b"", b"no zip", "cut", "flip"])
def test_a_damaged_memory_is_made_anew(tmp_path, damage, reads, cache):
    tree = tree_of(tmp_path / "tree")
    first = load_dataset("imagefolder", tree).train.fingerprint
    (file,) = (path for path in (cache / "images").iterdir() if tree_file(path, tree))
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        file.write_bytes(content[:40] + b"\xff" * 40 + content[80:])
    else:
        file.write_bytes(damage)
    assert load_dataset("imagefolder", tree).train.fingerprint == first and len(reads) == 32


def tree_file(path, tree):
    import hashlib

    return path.name.startswith(hashlib.sha256(os.fsencode(tree)).hexdigest()[:16])


def test_a_cache_that_cannot_be_written_costs_time_alone(tmp_path, monkeypatch, reads):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("FASTAFD_CACHE", str(tmp_path / "file"))
    tree = tree_of(tmp_path / "tree")
    for _ in range(2):
        load_dataset("imagefolder", tree)
    assert len(reads) == 32


# -- what changes after the check ---------------------------------------------------------------------------------


def test_a_beton_never_holds_pixels_of_another_name(tmp_path):
    """An image changes between the check and the writing, and is restored."""
    pytest.importorskip("ffcv")
    tree = tree_of(tmp_path / "tree", ext="bmp")
    path = tree / "train" / "a" / "0.bmp"
    content = path.read_bytes()
    split = load_dataset("imagefolder", tree).train
    Image.new("RGB", (8, 8), (255, 0, 0)).save(path)
    with pytest.raises(UsageError, match=r"a/0\.bmp has changed since the images were checked; start again"):
        ensure_beton(split, "tree", tmp_path / "beton", print)
    assert not list((tmp_path / "beton").iterdir())
    path.write_bytes(content)
    assert ensure_beton(load_dataset("imagefolder", tree).train, "tree", tmp_path / "beton", print).exists()


def test_images_in_memory_are_those_that_were_checked(tmp_path, reads):
    tree = tree_of(tmp_path / "tree", ext="bmp")
    split = load_dataset("imagefolder", tree).train
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tree / "train" / "a" / "0.bmp")
    with pytest.raises(UsageError, match="start again"):
        split.images()
    load_dataset("imagefolder", tree).train.images()
    assert len(reads) == 32  # the next start trusts nothing that it remembers


@pytest.mark.parametrize("damage", [b"", b"no weights", "cut"])
def test_a_damaged_natural_model_is_trained_again_in_the_cache_alone(tmp_path, damage, capsys, monkeypatch):
    monkeypatch.setenv("FASTAFD_CACHE", str(tmp_path / "cache"))
    flags = [*SMALL[:-2], "--data-dir", str(tree_of(tmp_path / "tree"))]

    def spoil(file):
        file.write_bytes(file.read_bytes()[:-1000] if damage == "cut" else damage)

    pretrain.main(flags)
    (file,) = (tmp_path / "cache" / "pretrained").glob("*/model.safetensors")
    size = file.stat().st_size
    spoil(file)
    capsys.readouterr()
    pretrain.main(flags)
    assert f"{file} is damaged; it is trained again" in capsys.readouterr().err and file.stat().st_size == size
    named = tmp_path / "named"
    shutil.copytree(file.parent, named)
    spoil(named / "model.safetensors")
    line = line_of(pretrain.main, [*flags, "--out", named], capsys)
    assert "out: " in line and str(named) in line and line.endswith("; delete it or take another folder")


# -- bad images ---------------------------------------------------------------------------------------------------


def truncated(path):
    path.write_bytes(path.read_bytes()[:100])


def deep(path):
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(path)


def socket_at(path):
    path.unlink()
    here = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{here}/{path.name}")  # the name of a socket has at most 107 bytes
    os.close(here)


def linked(target):
    def spoil(path):
        path.unlink()
        path.symlink_to(target)

    return spoil


BAD = {
    "pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "no regular file"),
    "socket": (socket_at, "no regular file"),
    "device": (linked("/dev/zero"), "no regular file"),
    "broken link": (linked("nowhere.png"), "No such file"),
    "link to itself": (lambda path: linked(path.name)(path), "symbolic links"),
    "PostScript": (lambda path: Image.new("RGB", (8, 8)).save(path, format="EPS"), "no image file of a known kind"),
    "truncated": (truncated, "cannot read the image"),
    "empty": (lambda path: path.write_bytes(b""), "cannot read the image"),
    "text": (lambda path: path.write_text("<html>404</html>"), "no image file of a known kind"),
    "another size": (lambda path: Image.new("RGB", (9, 8)).save(path), "is 9x8 pixels, takes 8x8"),
    "16 bits": (deep, "more than 8 bits"),
}


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_ends_the_run_before_the_training(tmp_path, part, kind, capsys):
    spoil, says = BAD[kind]
    tree = tree_of(tmp_path / "tree")
    for name in ("a/2.png", "b/3.png"):
        spoil(tree / part / name)
    line = line_of(train.main, [*AT, "--data-dir", tree, "--out", tmp_path / "out"], capsys)
    assert says in line and str(tree / part / "a" / "2.png") in line and "and 1 more" in line
    assert "--skip-bad-images true" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_images_are_left_out_and_listed(tmp_path, part, kind, capsys):
    spoil, says = BAD[kind]
    tree = tree_of(tmp_path / "tree")
    spoil(tree / part / "a" / "2.png")
    train.main([*AT, "--data-dir", str(tree), "--out", str(tmp_path / "out"), "--skip-bad-images"])
    err = capsys.readouterr().err
    assert f"left out: {'' if 'is 9x8' in says else 'cannot read'}" in err and says in err
    assert "1 bad images are left out" in err
    counts = json.loads((tmp_path / "out" / "result.json").read_text())["dataset"]
    assert counts[part] == 7 and counts["test" if part == "train" else "train"] == 8
    assert train.parse(["--config", str(tmp_path / "out" / "config.yaml")]).task.skip_bad_images


def forbid(monkeypatch, denied):
    """Take away the permission to read a file or a folder. A mode would not stop root."""

    def guard(owner, name, refuses):
        original = getattr(owner, name)

        def guarded(path, *args, **kwargs):
            if refuses(Path(path)):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return original(path, *args, **kwargs)

        monkeypatch.setattr(owner, name, guarded)

    guard(os, "scandir", lambda path: path == denied)
    guard(Path, "read_bytes", lambda path: path == denied)
    guard(Path, "stat", lambda path: denied in path.parents)


def test_a_file_without_permission_is_a_bad_image(tmp_path, monkeypatch, capsys):
    tree = tree_of(tmp_path / "tree")
    path = tree / "train" / "a" / "0.png"
    with monkeypatch.context() as patch:
        forbid(patch, path)
        with pytest.raises(UsageError, match=r"0\.png \(Permission denied\); --skip-bad-images"):
            load_dataset("imagefolder", tree)
        assert len(load_dataset("imagefolder", tree, skip_bad_images=True).train) == 7
    assert len(load_dataset("imagefolder", tree).train) == 8  # it is not remembered as bad


@pytest.mark.parametrize("place", [".", "train", "train/a", "train/a/inner"])
def test_a_folder_without_permission_is_named(tmp_path, monkeypatch, place):
    tree = tree_of(tmp_path / "tree")
    shutil.copytree(tree / "test" / "a", tree / "train" / "a" / "inner")
    forbid(monkeypatch, tree / place)
    with pytest.raises(UsageError, match=rf"data_dir: cannot read {tree / place}\S* \(Permission denied\)"):
        load_dataset("imagefolder", tree, skip_bad_images=True)


@pytest.mark.parametrize("odd", [(9, 9), (9, 8)])
def test_the_most_common_size_counts(tmp_path, odd):
    tree = tree_of(tmp_path / "tree")
    first = tree / "train" / "a" / "0.png"
    Image.new("RGB", odd).save(first)
    with pytest.raises(UsageError, match=rf"{first} is {odd[0]}x{odd[1]} pixels, takes 8x8 .*--image-size"):
        load_dataset("imagefolder", tree)
    dataset = load_dataset("imagefolder", tree, skip_bad_images=True)
    assert dataset.image_size == 8 and len(dataset.train) == 7


def test_images_that_are_not_square_want_a_size(tmp_path):
    tree = tree_of(tmp_path / "tree")
    for path in tree.rglob("*.png"):
        Image.new("RGB", (9, 8)).save(path)
    with pytest.raises(UsageError, match=r"0\.png is 9x8 pixels.*takes square images; --image-size N"):
        load_dataset("imagefolder", tree)


def test_pillow_says_nothing_on_the_console(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    tree = tree_of(tmp_path / "tree")
    palette = Image.new("P", (8, 8))
    palette.putpalette([*range(256)] * 3)
    palette.save(tree / "train" / "a" / "0.png", transparency=bytes([0, 255, 3]))
    exif = b"Exif\0\0II*\0" + b"\xff" * 40
    Image.new("RGB", (8, 8)).save(tree / "train" / "a" / "1.jpg", exif=exif)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load_dataset("imagefolder", tree).train.images()
    assert [str(warning.message) for warning in said] == []


def test_control_characters_of_a_name_are_escaped(tmp_path, capsys):
    tree = tree_of(tmp_path / "tree")
    (tree / "train" / "a" / "0\x1b[31m\n1.png").write_text("no image")
    with pytest.raises(UsageError, match=r"a/0\\x1b\[31m\\n1\.png \("):
        load_dataset("imagefolder", tree)
    load_dataset("imagefolder", tree, skip_bad_images=True)
    assert r"0\x1b[31m\n1.png" in capsys.readouterr().err


def test_what_was_left_out_changes_the_key(tmp_path):
    tree = tree_of(tmp_path / "tree")
    first = load_dataset("imagefolder", tree).train.fingerprint
    truncated(tree / "train" / "a" / "0.png")
    assert load_dataset("imagefolder", tree, skip_bad_images=True).train.fingerprint != first


def test_a_class_without_a_good_image_is_named(tmp_path):
    tree = tree_of(tmp_path / "tree", each=1)
    truncated(tree / "test" / "b" / "0.png")
    with pytest.raises(UsageError, match="all images of the class 'b' are bad"):
        load_dataset("imagefolder", tree, skip_bad_images=True)


def test_only_the_first_bad_images_are_listed(tmp_path, capsys):
    tree = tree_of(tmp_path / "tree", each=14)
    for index in range(13):
        truncated(tree / "train" / "a" / f"{index}.png")
    load_dataset("imagefolder", tree, skip_bad_images=True)
    err = capsys.readouterr().err
    assert err.count("left out: ") == 10 and "13 bad images are left out, of which 10 are listed" in err


def test_images_in_memory_have_no_bad_files(tmp_path):
    with pytest.raises(UsageError, match=r"skip_bad_images.*no image files"):
        load_dataset("digits", tmp_path, skip_bad_images=True)


# -- EXIF ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation, turn", [(3, 2), (6, 3), (8, 1)])
def test_a_picture_is_turned_as_its_camera_says(tmp_path, orientation, turn):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    tree = tree_of(tmp_path / "tree")
    Image.fromarray(pixels).save(tree / "train" / "a" / "0.png", exif=exif)
    np.testing.assert_array_equal(load_dataset("imagefolder", tree).train.images()[0], np.rot90(pixels, turn))


def test_the_size_is_that_of_the_turned_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    tree = tree_of(tmp_path / "tree")
    Image.new("RGB", (8, 12)).save(tree / "train" / "a" / "0.png", exif=exif)
    with pytest.raises(UsageError, match="12x8 pixels"):
        load_dataset("imagefolder", tree)


# -- names and links ----------------------------------------------------------------------------------------------


def run_verb(name, *words):
    command = [sys.executable, "-m", f"fastafd.{name}", *words]
    return subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT)


@pytest.mark.slow
def test_names_that_are_not_utf8_work_everywhere(tmp_path):
    """A Latin-1 file, class and data folder: training with a cache, evaluation, and the report."""
    root = tree_of(tmp_path / "tree", "abcd")
    os.rename(os.fsencode(root / "train/a/0.png"), os.fsencode(root / "train/a") + b"/caf\xe9.png")
    for part in ("train", "test"):
        os.rename(os.fsencode(root / part / "b"), os.fsencode(root / part) + b"/na\xefve")
    folder = os.fsencode(tmp_path) + b"/donn\xe9es"
    os.rename(root, folder)
    out = str(tmp_path / "out")
    flags = [*SMALL, "--loader", "ffcv", "--pretrain.epochs", "1", "--pretrain.batch-size", "4", "--attack.steps", "1"]
    for words in (
        ["train", *flags, "--data-dir", folder, "--out", out],
        ["evaluate", out, "--attack", "clean"],
        ["evaluate", out, "--attack", "clean", "--json"],
        ["report", "page", out],
        ["report", "results", out],
    ):
        done = run_verb(*words)
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    assert (tmp_path / "out" / "report.html").exists()


def test_a_loop_of_links_ends(tmp_path):
    tree = tree_of(tmp_path / "tree")
    (tree / "train" / "a" / "inner").mkdir()
    (tree / "train" / "a" / "inner" / "up").symlink_to(tree / "train" / "a", target_is_directory=True)
    (tree / "train" / "a" / "top").symlink_to(tree, target_is_directory=True)
    assert len(load_dataset("imagefolder", tree).train) == 8


def test_a_class_that_links_to_itself_is_named(tmp_path):
    tree = tree_of(tmp_path / "tree")
    (tree / "train" / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match=rf"data_dir: cannot read {tree}/train/loop \(.*symbolic links\)"):
        load_dataset("imagefolder", tree)


def test_a_link_to_a_folder_elsewhere_is_followed_once(tmp_path):
    tree = tree_of(tmp_path / "tree")
    other = tree_of(tmp_path / "other", "a", seed=1) / "train" / "a"
    for name in ("more", "again"):
        (tree / "train" / "a" / name).symlink_to(other, target_is_directory=True)
    assert len(load_dataset("imagefolder", tree).train) == 12
