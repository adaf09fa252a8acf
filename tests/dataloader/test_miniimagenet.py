"""miniImageNet from a folder of class folders: the split, and one line for whatever else is in the folder."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

import main_miniimagenet
from dataloader import miniimagenet
from dataloader.errors import DataError
from dataloader.images import cache, raw
from dataloader.images.cache import Spec
from dataloader.images.miniimagenet import read_folder

SPEC = Spec((6, 8, 3), 3, 9, 6)  # six rows of eight pixels; three classes of five images, three of them for training
CLASSES = ("n01", "n02", "n10")


def color(c: int, i: int) -> tuple[int, int, int]:
    return 80 * c, 40 * i, 200


def save(path, size=(8, 6), ink=(9, 9, 9), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, ink).convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """A complete set in miniature, each image in a colour of its own."""
    folder = tmp_path / "miniimagenet"
    for c, name in enumerate(CLASSES):
        for i in range(5):
            save(folder / name / f"{name}_{i}.png", ink=color(c, i))
    return folder


def test_the_first_images_of_each_class_are_for_training(folder, capsys):
    found = read_folder(folder, SPEC)
    assert found.train_images.shape == (9, 6, 8, 3) and found.test_images.shape == (6, 6, 8, 3)
    assert found.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found.test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert [tuple(image[0, 0]) for image in found.train_images] == [color(c, i) for c in range(3) for i in range(3)]
    assert [tuple(image[5, 7]) for image in found.test_images] == [color(c, i) for c in range(3) for i in (3, 4)]
    assert capsys.readouterr().err == f"miniimagenet: reading 15 images from {folder}, once\n"


@pytest.mark.parametrize(("suffix", "mode"), [("jpg", "L"), ("JPEG", "CMYK"), ("webp", "RGBA"), ("bmp", "P")])
def test_larger_images_of_any_kind_are_resized(folder, suffix, mode):
    (folder / "n01" / "n01_0.png").unlink()
    save(folder / "n01" / f"a.{suffix}", size=(31, 17), ink=(250, 250, 250), mode=mode)
    first = read_folder(folder, SPEC).train_images[0]
    assert first.shape == (6, 8, 3) and first.min() > 235


def test_sixteen_bits_and_what_is_transparent(folder):
    Image.fromarray(np.full((6, 8), 32768, np.uint16)).save(folder / "n01" / "n01_0.png")
    Image.new("RGBA", (8, 6), (0, 0, 0, 0)).save(folder / "n01" / "n01_1.png")
    images = read_folder(folder, SPEC).train_images
    assert (images[0] == 128).all() and (images[1] == 255).all()


def test_a_mistyped_data_dir_is_not_made(tmp_path):
    with pytest.raises(DataError, match=r"^miniimagenet: no images in "):
        raw.load_raw("miniimagenet", tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def test_what_is_not_an_image_of_a_class_does_not_count(folder):
    (folder / ".DS_Store").write_text("")
    (folder / "list.csv").write_text("")
    (folder / "n01" / "Thumbs.db").write_text("")
    (folder / "n01" / "more.png").mkdir()
    (folder / "n01" / "._n01_0.png").write_text("")
    (folder / ".git").mkdir()
    assert len(read_folder(folder, SPEC).train_labels) == 9


def no_folder(folder):
    folder.rename(folder.with_name("elsewhere"))


def loose_files(folder):
    for path in [*folder.rglob("*.png")]:
        path.rename(folder / path.name)
    for name in CLASSES:
        (folder / name).rmdir()


def nested(folder):
    (folder / "train").mkdir()
    for name in CLASSES:
        (folder / name).rename(folder / "train" / name)
    (folder / "val").mkdir()


def nested_images(folder):
    (folder / "n02" / "images").mkdir()
    for path in (folder / "n02").glob("*.png"):
        path.rename(folder / "n02" / "images" / path.name)


def class_missing(folder):
    no_class = folder / "n10"
    no_class.rename(folder.parent / "n10")


def class_too_many(folder):
    save(folder / "n99" / "a.png")


def image_missing(folder):
    (folder / "n02" / "n02_3.png").unlink()


def image_too_many(folder):
    save(folder / "n02" / "zebra.png")


def too_small(folder):
    save(folder / "n02" / "n02_3.png", size=(8, 5))


def too_narrow(folder):
    save(folder / "n02" / "n02_3.png", size=(7, 60))


def empty(folder):
    (folder / "n02" / "n02_3.png").write_bytes(b"")


def no_image(folder):
    (folder / "n02" / "n02_3.png").write_text("<html>not\nfound</html>")


def cut_off(folder):
    path = save(folder / "n02" / "n02_3.png", size=(60, 60))
    path.write_bytes(path.read_bytes()[:-30])


def broken_header(folder):
    path = folder / "n02" / "n02_3.png"
    content = bytearray(path.read_bytes())
    content[8:12] = b"\0\0\0\1"  # the length of the header's chunk
    path.write_bytes(content)


def other_format(folder):
    save(folder / "n02" / "b.gif").rename(folder / "n02" / "n02_3.png")


def a_folder(folder):
    path = folder / "n02" / "n02_3.png"
    path.unlink()
    path.mkdir()


def dangling_link(folder):
    path = folder / "n02" / "n02_3.png"
    path.unlink()
    path.symlink_to("nowhere.png")


UNREADABLE = r"^miniimagenet: cannot read .*n02_3\.png \(.+\); replace it or take it away$"
NOT_THERE = "no images in .*, and nobody may offer them for download; get from image-net.org .*CLASS.*--data embedded"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_folder, NOT_THERE),
        (loose_files, NOT_THERE),
        (nested, r"holds 2 folders \(train, val\); it must hold 3, one for each class and not within train, val"),
        (nested_images, r"n02 holds 0 images \(\.jpg, .*\); it must hold 5"),
        (class_missing, r"holds 2 folders \(n01, n02\); it must hold 3"),
        (class_too_many, r"holds 4 folders \(n01, n02, n10, …\); it must hold 3"),
        (image_missing, "n02 holds 4 images .*; it must hold 5"),
        (image_too_many, "n02 holds 6 images .*; it must hold 5"),
        (too_small, r"n02_3\.png has 8x5 pixels; it must have 8x6 or more"),
        (too_narrow, r"n02_3\.png has 7x60 pixels; it must have 8x6 or more"),
        *((spoil, UNREADABLE) for spoil in (empty, no_image, cut_off, broken_header, other_format)),
        (a_folder, "n02 holds 4 images .*; it must hold 5"),
        (dangling_link, "n02 holds 4 images .*; it must hold 5"),
    ],
)
def test_a_folder_that_is_not_as_it_should_be_is_one_line(folder, monkeypatch, spoil, message):
    monkeypatch.setitem(cache.SPECS, "miniimagenet", SPEC)
    spoil(folder)
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(DataError) as error:
        raw.load_raw("miniimagenet", folder.parent)
    assert re.search(message, str(error.value)) and str(error.value).startswith("miniimagenet: ")
    assert "\n" not in str(error.value)
    after = [path for path in sorted(folder.parent.rglob("*")) if not path.name.endswith(".lock")]
    assert after == before, "half a cache was left"


def test_images_become_arrays_once_and_stay(folder, monkeypatch, capsys):
    monkeypatch.setitem(cache.SPECS, "miniimagenet", SPEC)
    first = raw.load_raw("miniimagenet", folder.parent)
    assert len(list(folder.rglob("*.png"))) == 15
    capsys.readouterr()
    again = raw.load_raw("miniimagenet", folder.parent)
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    assert not capsys.readouterr().err
    (folder / "train_labels.npy").write_text("?")
    with pytest.raises(
        DataError, match=r"train_labels\.npy cannot be read .*; replace it .* delete this file to have it made"
    ):
        raw.load_raw("miniimagenet", folder.parent)
    (folder / "train_labels.npy").unlink()
    assert raw.load_raw("miniimagenet", folder.parent).train_labels.tolist() == first.train_labels.tolist()


def test_a_full_disk_is_one_line(folder, monkeypatch):
    monkeypatch.setitem(cache.SPECS, "miniimagenet", SPEC)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_cache", full)
    with pytest.raises(DataError, match=r"cannot keep the images as arrays in .*: \[Errno 28\] No space .* 1\.3 GB$"):
        raw.load_raw("miniimagenet", folder.parent)


def test_the_script_runs_on_a_folder_of_images(tmp_path, monkeypatch):
    """Ten classes of small real files: two tasks, each with its own classes, normalised as ImageNet."""
    spec = Spec((84, 84, 3), 10, 60, 20)
    monkeypatch.setitem(cache.SPECS, "miniimagenet", spec)
    for c in range(10):
        for i in range(8):
            save(tmp_path / "miniimagenet" / f"n{c:02}" / f"{i}.jpg", size=(90, 100), ink=(25 * c, 200, 28 * i))
    benchmark = miniimagenet.load(seed=1, n_tasks=2, pc_valid=0.2, data_dir=tmp_path)
    second = benchmark.tasks[1]
    assert (second.name, second.n_classes) == ("classes 5 to 9", 5)
    assert sorted(second.test.labels.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert len(second.train.labels) == 24 and len(second.valid.labels) == 6
    red = second.test.images[:, 0].mean((1, 2)) * 0.229 + 0.485  # back to 0 … 1
    assert [round(float(r * 255 / 25)) for r in red] == [5 + int(label) for label in second.test.labels]
    flags = "--n_tasks 2 --n_epochs 1 --n_samples 4 --samples conv1=2 --device cpu --quiet".split()
    summary = main_miniimagenet.main([*flags, "--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "runs")])
    assert summary["finished"] and summary["data"]["sources"]["miniimagenet"]["train"] == 60
