"""Image files of one's own, in a folder for each class: what counts, how it is read, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from dataloader import own
from engine.torchvision import import_torchvision
from gradproj.errors import InputError

transforms = import_torchvision("transforms")


@pytest.fixture
def pictures(tmp_path):
    """Classes a, b and c, in folders train and test; the test has no b, so that its classes have other numbers."""
    for part, names in (("train", "abc"), ("test", "ac")):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(4):
                Image.new("L", (3, 3), 60 * "abc".index(name) + i).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_folders_with_other_classes_in_the_test(pictures):
    train, test = own.image_folder(pictures, transforms.ToTensor())
    task = own.by_class(train, [["c", "a"]], test, pc_valid=0)[0]
    for part in (task.train, task.test):
        found = [round(255 * image[0, 0, 0].item()) // 60 for image in part.images]
        assert sorted(found) == [0] * 4 + [2] * 4
        assert part.labels.tolist() == [{2: 0, 0: 1}[number] for number in found]
    with pytest.raises(InputError, match=r"there is no class b in .*test; there are: a, c$"):
        own.by_class(train, [["b"]], test)


def test_an_undivided_folder(pictures):
    train, test = own.image_folder(pictures / "train", transforms.ToTensor())
    assert test is None
    assert len(train) == 12


def test_folders_that_are_none(pictures):
    for folder in (pictures / "no", pictures / "train" / "a", pictures / "train" / "a" / "0.png"):
        with pytest.raises(InputError, match="no images in .*it must hold a folder of images for each class") as caught:
            own.image_folder(folder, None)
        assert "\n" not in str(caught.value)


def test_hidden_files_are_no_images(pictures):
    hidden = pictures / "train" / "a" / ".checkpoints"
    hidden.mkdir()
    for path in (hidden / "0.png", pictures / "train" / "a" / "._1.png"):
        Image.new("L", (3, 3)).save(path)
    train, _ = own.image_folder(pictures, transforms.ToTensor())
    assert len(train) == 12


@pytest.mark.filterwarnings("ignore:.*files that are no images are left out")  # the last link of the loop
def test_an_image_that_links_make_two(pictures):
    for link, target in (
        (pictures / "train" / "a" / "loop", pictures / "train"),
        (pictures / "test/a/9.png", "train/a/0.png"),
    ):
        link.symlink_to(pictures / target)
        with pytest.raises(InputError, match=r"^\S+\.png and \S+\.png are the same image; take one of the links"):
            own.image_folder(pictures, transforms.ToTensor())
        link.unlink()


def test_links_to_images_elsewhere(pictures, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "one.png"
    Image.new("L", (3, 3)).save(elsewhere)
    (pictures / "train" / "a" / "link.png").symlink_to(elsewhere)
    assert len(own.image_folder(pictures, transforms.ToTensor())[0]) == 13


def test_a_third_part_beside_training_and_test_is_named(pictures):
    (pictures / "val" / "a").mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"^\S+: train and test are read, val beside them is not$"):
        own.image_folder(pictures, transforms.ToTensor())


def test_an_image_that_is_none(pictures):
    (pictures / "train" / "b" / "2.png").write_bytes(b"not an image")
    train, _ = own.image_folder(pictures, transforms.ToTensor())
    with pytest.raises(
        InputError,
        match=r"^cannot read .*train/b/2\.png \(cannot identify image file .*\); replace it or take it away$",
    ) as caught:
        own.by_class(train, [["b"]])[0]
    assert "\n" not in str(caught.value)


def gradient(dtype, largest):
    """4 x 4 pixels from nothing to a largest value."""
    return np.linspace(0, largest, 16).reshape(4, 4).astype(dtype)


def test_sixteen_bits_are_brought_to_eight(tmp_path):
    Image.fromarray(gradient(np.uint16, 65535)).save(tmp_path / "deep.png")
    Image.fromarray(gradient(np.uint8, 255)).save(tmp_path / "plain.png")
    deep, plain = (np.asarray(own.read_image(tmp_path / name)).astype(int) for name in ("deep.png", "plain.png"))
    assert deep.shape == plain.shape == (4, 4, 3)
    assert abs(deep - plain).max() <= 1 and deep.max() == 255 and deep.min() == 0


def test_sixteen_bits_of_a_portable_greymap(tmp_path):
    (tmp_path / "deep.pgm").write_bytes(b"P5 2 1 65535\n" + bytes([0, 0, 255, 255]))
    assert np.asarray(own.read_image(tmp_path / "deep.pgm"))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    ink = np.zeros((4, 4, 4), np.uint8)
    ink[:2, :, 3] = 255  # black above, nothing below
    image = Image.fromarray(ink)
    if mode == "P":
        image = Image.fromarray((ink[..., 3] > 0).astype(np.uint8), "L").convert("P")
        image.putpalette([0, 0, 0] * 256)
        image.info["transparency"] = 0
    (image if mode == "P" else image.convert(mode)).save(tmp_path / "ink.png")
    found = np.asarray(own.read_image(tmp_path / "ink.png"))
    assert found.shape == (4, 4, 3) and (found[:2] == 0).all() and (found[2:] == 255).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_an_unknown_range_are_refused(tmp_path, dtype):
    Image.fromarray(gradient(dtype, 60000)).save(tmp_path / "deep.tiff")
    with pytest.raises(own.UnreadableImage, match=r"deep.tiff has 32-bit pixels, whose range nobody knows"):
        own.read_image(tmp_path / "deep.tiff")


def test_an_image_that_is_too_large_is_named(tmp_path, monkeypatch):
    Image.new("L", (9, 9)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(own.UnreadableImage, match=r"^cannot read .*large.png \(Image size .81 pixels. exceeds limit"):
        own.read_image(tmp_path / "large.png")


def test_too_little_memory_is_no_fault_of_the_image(tmp_path, monkeypatch):
    Image.new("L", (3, 3)).save(tmp_path / "image.png")

    def open_nothing(*_, **__):
        raise MemoryError

    monkeypatch.setattr(Image, "open", open_nothing)
    with pytest.raises(MemoryError):
        own.read_image(tmp_path / "image.png")


def test_files_of_other_kinds_are_counted_and_left_out(pictures):
    Image.new("L", (4, 4)).save(pictures / "train" / "a" / "more.gif")
    for name in ("notes.txt", "more.txt", "movie", ".hidden"):
        (pictures / "train" / "a" / name).write_text("x")
    (pictures / "train" / "a" / "gone.png").symlink_to("nowhere.png")
    message = r"train: files that are no images are left out \(2 of .txt, 1 of links to nothing, 1 of no suffix\)$"
    with pytest.warns(UserWarning, match=message):
        train, _ = own.image_folder(pictures, transforms.ToTensor())
    assert sum(path.endswith(".gif") for path, _ in train.samples) == 1


def test_folders_without_images_are_no_classes(pictures):
    (pictures / "train" / ".ipynb_checkpoints").mkdir()
    train, test = own.image_folder(pictures, transforms.ToTensor())
    assert len(own.by_class(train, [["c", "a"]], test, pc_valid=0)[0].train.labels) == 8
    with pytest.raises(InputError, match=r"there is no class \.ipynb_checkpoints in .*train; there are: a, b, c$"):
        own.by_class(train, [[".ipynb_checkpoints"]], test)
