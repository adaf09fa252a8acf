"""The array cache and what fills it: damage is named, half a cache is never taken for one, archives are distrusted."""

import hashlib
import io
import socket
import sys
import tarfile
import types
from concurrent.futures import ThreadPoolExecutor
from urllib.error import URLError

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from scipy.io import savemat

from dataloader.errors import DataError
from dataloader.images import cache, content, download, notmnist, raw
from dataloader.images.cache import FILES, RawSet, write_cache
from dataloader.images.raw import load_raw
from gradproj.errors import InputError


def small_mnist() -> RawSet:
    generator = np.random.default_rng(0)
    return RawSet(
        generator.integers(0, 256, (40, 28, 28), dtype=np.uint8),
        np.arange(40) % 10,
        generator.integers(0, 256, (20, 28, 28), dtype=np.uint8),
        np.arange(20) % 10,
    )


@pytest.fixture
def folder(tmp_path):
    write_cache(tmp_path / "mnist", small_mnist())
    return tmp_path / "mnist"


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_round_trip(folder):
    raw = load_raw("mnist", folder.parent)
    for ours, theirs in zip(raw, small_mnist(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert isinstance(raw.train_images, np.memmap) and not raw.train_images.flags.writeable
    assert sorted(p.name for p in folder.parent.iterdir()) == ["mnist"], "something temporary was left"


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def _header_only(path):
    path.write_bytes(path.read_bytes()[:20])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [_truncate, _header_only, lambda p: p.write_bytes(b""), lambda p: p.write_text("?")])
def test_damaged_file_is_named(folder, name, damage):
    damage(folder / name)
    with pytest.raises(DataError, match=f"{name} .*; replace it if .* else delete this file to have it made") as error:
        load_raw("mnist", folder.parent)
    one_line(error)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train_images.npy", np.zeros((40, 28, 28), np.float32), r"float32 \(40, 28, 28\), not uint8"),
        ("train_images.npy", np.zeros((40, 32, 32), np.uint8), r"\(40, 32, 32\), not uint8 \(n, 28, 28\)"),
        ("test_images.npy", np.zeros((0, 28, 28), np.uint8), "with n > 0"),
        ("train_labels.npy", np.zeros(39, np.int64), r"\(39,\), not int64 \(40,\), one per image"),
        ("train_labels.npy", np.zeros(40), r"holds float64 \(40,\)"),
        ("test_labels.npy", np.arange(20) - 1, "labels -1 to 18, not 0 to 9"),
    ],
)
def test_wrong_array_is_refused(folder, name, array, message):
    np.save(folder / name, array)
    with pytest.raises(DataError, match=f"{name} .*{message}") as error:
        load_raw("mnist", folder.parent)
    one_line(error)


def test_pickles_are_never_opened(folder):
    np.save(folder / "train_labels.npy", np.array([print] * 40, dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="train_labels.npy cannot be read"):
        load_raw("mnist", folder.parent)


def test_unknown_set():
    with pytest.raises(InputError, match="unknown data set 'emnist'; known are mnist, "):
        load_raw("emnist", "data")


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("survived", range(4))
def test_interrupted_write_leaves_no_half_cache(tmp_path, monkeypatch, existing, survived):
    target = tmp_path / "mnist"
    if existing:
        target.mkdir()
    written = []

    def dying_save(file, array, **options):
        if len(written) == survived:
            raise KeyboardInterrupt
        written.append(file.write(array.tobytes()))

    monkeypatch.setattr(cache.np, "save", dying_save)
    with pytest.raises(KeyboardInterrupt):
        write_cache(target, small_mnist())
    assert cache.missing_files(target) == list(FILES)
    assert [p.name for p in tmp_path.iterdir()] == ["mnist"] * existing


def test_incomplete_cache_is_filled_again(folder, monkeypatch):
    (folder / "test_labels.npy").unlink()
    monkeypatch.setattr(download, "download", lambda name, data_dir: small_mnist())
    assert len(load_raw("mnist", folder.parent).test_labels) == 20
    assert cache.missing_files(folder) == []


def test_who_waits_for_another_process_is_told(folder, monkeypatch, capsys):
    (folder / "test_labels.npy").unlink()
    monkeypatch.setattr(download, "download", lambda name, data_dir: small_mnist())
    monkeypatch.setattr(raw, "PATIENCE", 0.05)
    with ThreadPoolExecutor() as pool:
        with FileLock(folder.parent / ".mnist.lock"):
            waiting, said = pool.submit(load_raw, "mnist", folder.parent), ""
            while "waiting for" not in said and not waiting.done():
                said += capsys.readouterr().err
        assert len(waiting.result().test_labels) == 20
    assert f"waiting for {folder.parent / '.mnist.lock'}: another process is preparing these images" in said


@pytest.mark.parametrize("name", ["cifar100", "notmnist"])
def test_failed_download_is_one_line_with_the_way_out(tmp_path, monkeypatch, name):
    def no_network(*_):
        raise URLError(OSError(-2, "Name or service\nnot known"))

    monkeypatch.setattr(download, "_from_torchvision", no_network)
    monkeypatch.setattr(notmnist.urllib.request, "urlopen", lambda *_, **__: no_network())
    with pytest.raises(DataError, match=f"^{name}: no images in .*{name} and no download") as error:
        load_raw(name, tmp_path)
    message = one_line(error)
    assert all(file in message for file in FILES) and message.endswith("or run with --data embedded")
    assert ("notMNIST_small.tar.gz" in message) == (name == "notmnist")
    assert socket.getdefaulttimeout() is None


def test_download_becomes_a_cache(tmp_path, monkeypatch):
    class Part:
        def __init__(self, root, train, download):
            assert root == tmp_path and download
            half = small_mnist()[:2] if train else small_mnist()[2:]
            self.data, self.targets = torch.from_numpy(half[0]), half[1].tolist()

    monkeypatch.setattr(download, "import_torchvision", lambda part: types.SimpleNamespace(MNIST=Part))
    with pytest.raises(DataError, match="mnist: the files under .* are not the published images"):
        load_raw("mnist", tmp_path)
    monkeypatch.setattr(content, "KNOWN", {})
    np.testing.assert_array_equal(load_raw("mnist", tmp_path).train_images, small_mnist().train_images)
    assert cache.missing_files(tmp_path / "mnist") == []


@pytest.mark.slow
def test_torchvision_can_be_imported_next_to_any_torch():
    assert download.import_torchvision("datasets").CIFAR100
    assert "torchvision" in sys.modules


def test_svhn_mat(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    digits = np.array([0, 1, 9, 0, 5, 2])
    y = np.where(digits == 0, 10, digits).astype(np.uint8)[:, None]
    savemat(tmp_path / "train.mat", {"X": images.transpose(1, 2, 3, 0), "y": y})
    read_images, read_labels = download.read_svhn_mat(tmp_path / "train.mat")
    np.testing.assert_array_equal(read_images, images)
    assert read_labels.tolist() == digits.tolist() and read_labels.dtype == np.int64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[0], [1]])}, "y .* from 1 to 10"),
        ({"X": np.zeros((32, 32, 3, 2)), "y": np.array([[1], [1]])}, "holds X float64"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8)}, "cannot be read as a MATLAB file"),
        (None, "cannot be read as a MATLAB file"),
    ],
)
def test_svhn_wrong_mat(tmp_path, content, message):
    if content is None:
        (tmp_path / "x.mat").write_bytes(b"MATLAB 5.0 MAT-file, Platform")
    else:
        savemat(tmp_path / "x.mat", content)
    with pytest.raises(DataError, match=message) as error:
        download.read_svhn_mat(tmp_path / "x.mat")
    one_line(error)


def png(side: int = 28, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def archive(path, members: dict[str, bytes], special: tarfile.TarInfo | None = None):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        if special is not None:
            tar.addfile(special)
    return path


LETTERS = {f"notMNIST_small/{letter}/{i}.png": png(seed=10 * i + ord(letter)) for letter in "ABJ" for i in range(10)}


def test_notmnist_archive(tmp_path):
    broken = {
        "notMNIST_small/A/empty.png": b"",
        "notMNIST_small/F/cut.png": png()[:90],
        "notMNIST_small/B/big.png": png(64),
    }
    others = {"notMNIST_small/A/readme.txt": b"hello", "notMNIST_small/K/0.png": png(), "A.pickle": b"cos\nsystem\n"}
    images, labels, n_skipped = notmnist.read_archive(archive(tmp_path / "a.tar.gz", LETTERS | broken | others))
    assert images.shape == (30, 28, 28) and images.dtype == np.uint8 and n_skipped == 3
    assert np.bincount(labels).tolist() == [10, 10, 0, 0, 0, 0, 0, 0, 0, 10]
    np.testing.assert_array_equal(images[0], np.asarray(Image.open(io.BytesIO(LETTERS["notMNIST_small/A/0.png"]))))


def test_notmnist_split_ignores_the_order_of_the_archive():
    images, labels = small_mnist()[:2]
    ours, theirs = notmnist.split(images, labels), notmnist.split(images[::-1], labels[::-1])
    assert [len(a) for a in ours] == [36, 36, 4, 4]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def _member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "special",
    [
        _member("notMNIST_small/A/../../../evil.png"),
        _member("/A/evil.png"),
        _member("notMNIST_small/A/evil.png", tarfile.SYMTYPE, "/etc/passwd"),
        _member("notMNIST_small/A/evil.png", tarfile.LNKTYPE, "notMNIST_small/A/0.png"),
        _member("notMNIST_small/A/evil.png", tarfile.CHRTYPE),
    ],
    ids=["parent", "absolute", "symlink", "hardlink", "device"],
)
def test_hostile_archive_is_refused_and_writes_nothing(tmp_path, special):
    path = archive(tmp_path / "a.tar.gz", LETTERS, special)
    with pytest.raises(DataError, match="evil.png', which no data set needs") as error:
        notmnist.read_archive(path)
    one_line(error)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar.gz"]


@pytest.mark.parametrize("data", [b"", b"no archive", None])
def test_broken_archive(tmp_path, data):
    path = archive(tmp_path / "a.tar.gz", LETTERS)
    path.write_bytes(path.read_bytes()[:2000] if data is None else data)
    with pytest.raises(DataError, match="is not a complete tar.gz archive; delete it"):
        notmnist.read_archive(path)


def test_archive_without_images(tmp_path):
    with pytest.raises(DataError, match="holds no 28x28 PNG files"):
        notmnist.read_archive(archive(tmp_path / "a.tar.gz", {"x.png": png()}))


def test_wrong_checksum_is_refused_before_opening(tmp_path, monkeypatch):
    (tmp_path / "notmnist").mkdir()
    path = archive(tmp_path / "notmnist" / notmnist.ARCHIVE, LETTERS)
    monkeypatch.setattr(notmnist.tarfile, "open", lambda *_: pytest.fail("opened before it was checked"))
    with pytest.raises(DataError, match=f"{path} has MD5 [0-9a-f]{{32}}, not {notmnist.MD5}; delete it") as error:
        load_raw("notmnist", tmp_path)
    one_line(error)


def test_placed_archive_is_converted(tmp_path, monkeypatch, capsys):
    (tmp_path / "notmnist").mkdir()
    path = archive(tmp_path / "notmnist" / notmnist.ARCHIVE, LETTERS | {"notMNIST_small/A/empty.png": b""})
    monkeypatch.setattr(notmnist, "MD5", hashlib.md5(path.read_bytes()).hexdigest())
    raw = load_raw("notmnist", tmp_path)
    assert len(raw.train_labels) == 27 and len(raw.test_labels) == 3
    assert "1 undecodable files skipped" in capsys.readouterr().err
    assert path.is_file()
