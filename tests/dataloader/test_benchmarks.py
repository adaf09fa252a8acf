"""The benchmarks against their definitions: which images, which labels, which split, which numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataloader import cifar100, cifar100_superclass, five_datasets, pmnist
from dataloader.images.cache import SPECS, RawSet, write_cache
from dataloader.images.content import content_checksum, content_order
from dataloader.images.raw import load_raw
from dataloader.splits import holdout, limit_per_class, n_held_out, normalise
from gradproj.errors import InputError

LOADS = (pmnist.load, cifar100.load, cifar100_superclass.load, five_datasets.load)


def random_set(name: str, seed: int = 0) -> RawSet:
    """Noise with the shape and classes of a published set: 20 training and 3 test images per class, shuffled."""
    spec, generator, arrays = SPECS[name], np.random.default_rng(seed), []
    for per_class in (20, 3):
        labels = generator.permutation(np.repeat(np.arange(spec.n_classes), per_class))
        arrays += [generator.integers(0, 256, (len(labels), *spec.shape), dtype=np.uint8), labels]
    return RawSet(*arrays)


def sorted_by_class(raw: RawSet) -> RawSet:
    train, test = np.argsort(raw.train_labels, kind="stable"), np.argsort(raw.test_labels, kind="stable")
    return RawSet(raw.train_images[train], raw.train_labels[train], raw.test_images[test], raw.test_labels[test])


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in SPECS:
        write_cache(folder / name, random_set(name))
    return folder


def tensors(benchmark) -> list[torch.Tensor]:
    return [tensor for task in benchmark.tasks for part in (task.train, task.valid, task.test) for tensor in part]


def same(ours, theirs) -> bool:
    pairs = list(zip(tensors(ours), tensors(theirs), strict=True))
    return all(torch.equal(a, b) for a, b in pairs)


def rows(split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


@pytest.mark.parametrize(
    ("load", "n_tasks", "n_classes", "shape", "sizes"),
    [
        (pmnist.load, 10, 10, (784,), (180, 20, 30)),
        (cifar100.load, 10, 10, (3, 32, 32), (190, 10, 30)),
        (cifar100_superclass.load, 20, 5, (3, 32, 32), (95, 5, 15)),
        (five_datasets.load, 5, 10, (3, 32, 32), (190, 10, 30)),
    ],
)
def test_shapes_sizes_and_labels(load, n_tasks, n_classes, shape, sizes, data_dir):
    benchmark = load(seed=3, data_dir=data_dir)
    assert len(benchmark.tasks) == n_tasks and benchmark.data == "real"
    for task in benchmark.tasks:
        assert task.n_classes == n_classes
        assert tuple(len(part.labels) for part in (task.train, task.valid, task.test)) == sizes
        for part in (task.train, task.valid, task.test):
            assert part.images.shape[1:] == shape and part.images.dtype == torch.float32 and part.images.is_contiguous()
            assert part.labels.dtype == torch.int64
        assert task.test.labels.unique().tolist() == list(range(n_classes))
        assert len(rows(task.train) | rows(task.valid) | rows(task.test)) == sum(sizes), "splits share an image"


@pytest.mark.parametrize("load", LOADS)
def test_a_task_is_the_same_however_often_and_in_what_order_it_is_built(load, data_dir):
    forwards, backwards = load(seed=1, data_dir=data_dir), load(seed=1, data_dir=data_dir)
    last = backwards.tasks[len(backwards.tasks) - 1]
    torch.rand(5), np.random.rand(5)  # the global generators are none of a task's business
    assert same(forwards, backwards)
    assert torch.equal(last.train.images, forwards.tasks[len(forwards.tasks) - 1].train.images)
    assert not same(forwards, load(seed=2, data_dir=data_dir))


@pytest.mark.parametrize("load", (cifar100.load, cifar100_superclass.load, five_datasets.load))
def test_stored_order_does_not_matter(load, data_dir, tmp_path):
    for name in SPECS:
        write_cache(tmp_path / name, sorted_by_class(random_set(name)))
    ours, theirs = load(seed=1, data_dir=data_dir), load(seed=1, data_dir=tmp_path)
    assert same(ours, theirs)
    assert ours.sources == theirs.sources
    labels = ours.tasks[0].test.labels
    assert (labels.diff() < 0).any(), "test images come sorted by class"


def test_content_order_breaks_ties_by_label():
    images = np.zeros((3, 2, 2), dtype=np.uint8)
    assert content_order(images, np.array([2, 0, 1])).tolist() == [1, 2, 0]
    assert content_checksum(images, np.array([2, 0, 1])) == content_checksum(images, np.array([0, 1, 2]))
    assert content_checksum(images, np.array([2, 0, 1])) != content_checksum(images, np.array([0, 1, 1]))


def test_pmnist_permutes_file_order_and_holds_out_its_start(data_dir):
    raw = load_raw("mnist", data_dir)
    task = pmnist.load(seed=5, data_dir=data_dir).tasks[3]
    permutation = np.random.default_rng(np.random.SeedSequence([5, 3, 0])).permutation(784)
    for i, (images, labels) in enumerate(zip(raw.train_images, raw.train_labels, strict=True)):
        part, j = (task.valid, i) if i < 20 else (task.train, i - 20)
        expected = (images.reshape(784)[permutation] / 255 - 0.1307) / 0.3081
        np.testing.assert_allclose(part.images[j].numpy(), expected, rtol=0, atol=1e-6)
        assert part.labels[j] == labels


def test_pmnist_permutations_differ_and_ignore_the_number_of_tasks(data_dir):
    short, long = pmnist.load(seed=5, n_tasks=2, data_dir=data_dir), pmnist.load(seed=5, n_tasks=30, data_dir=data_dir)
    assert torch.equal(short.tasks[1].test.images, long.tasks[1].test.images)
    assert len({task.test.images[0].numpy().tobytes() for task in long.tasks}) == 30


def test_pmnist_stored_by_class_still_has_every_class_to_learn(tmp_path):
    write_cache(tmp_path / "mnist", sorted_by_class(random_set("mnist")))
    benchmark = pmnist.load(seed=1, data_dir=tmp_path)
    assert len(benchmark.tasks[0].train.labels.unique()) == 10
    assert any("sorted by class" in note for note in benchmark.notes)


def test_cifar100_labels_and_class_order(data_dir):
    raw = load_raw("cifar100", data_dir)
    fine_of = {normalise(image[None], cifar100.MEAN, cifar100.STD).numpy().tobytes(): label
               for image, label in zip(raw.test_images, raw.test_labels, strict=True)}  # fmt: skip
    for t, task in enumerate(cifar100.load(seed=0, data_dir=data_dir).tasks):
        fine = [fine_of[image.numpy().tobytes()] for image in task.test.images]
        assert fine == [10 * t + label for label in task.test.labels.tolist()]
    seen = []
    for task in cifar100.load(seed=0, class_order_seed=4, data_dir=data_dir).tasks:
        fine = {int(label): fine_of[image.numpy().tobytes()]
                for image, label in zip(task.test.images, task.test.labels, strict=True)}  # fmt: skip
        seen += [fine[label] for label in range(10)]
        assert task.name == f"classes {', '.join(map(str, seen[-10:]))}"
    assert sorted(seen) == list(range(100)) and seen != list(range(100))


def test_superclass_table_is_complete():
    table = np.array(cifar100_superclass.SUPERCLASS_OF)
    assert np.bincount(table).tolist() == [5] * 20
    assert all(sorted(order) == list(range(20)) for order in cifar100_superclass.TASK_ORDERS)
    # aquatic mammals: beaver 4, dolphin 30, otter 55, seal 72, whale 95; vehicles 2: 41 69 81 85 89
    assert np.flatnonzero(table == 0).tolist() == [4, 30, 55, 72, 95]
    assert np.flatnonzero(table == 19).tolist() == [41, 69, 81, 85, 89]


def test_superclass_tasks_are_the_same_in_every_order(data_dir):
    natural = cifar100_superclass.load(seed=1, data_dir=data_dir)
    other = cifar100_superclass.load(seed=1, t_order=4, data_dir=data_dir)
    assert other.tasks[0].name == "household furniture"
    assert torch.equal(other.tasks[0].valid.images, natural.tasks[6].valid.images)


def test_superclass_released_scrambles_and_fixes_the_split(data_dir):
    image = random_set("cifar100").train_images[:1]
    planes = [image[0, y, x, c] for c in range(3) for y in range(32) for x in range(32)]  # as CIFAR stores it
    scrambled = cifar100_superclass.scrambled_images(image)[0]
    for c, y, x in np.ndindex(3, 32, 32):
        assert scrambled[c, y, x] == torch.tensor(planes[(y * 32 + x) * 3 + c] / 255, dtype=torch.float32)
    one = cifar100_superclass.load(seed=1, protocol="released", data_dir=data_dir)
    two = cifar100_superclass.load(seed=2, pc_valid=0.5, protocol="released", data_dir=data_dir)
    assert same(one, two)
    assert any("scrambled" in note for note in one.notes)


def test_five_datasets_images(data_dir):
    benchmark = five_datasets.load(seed=0, data_dir=data_dir)
    grey = {"mnist": (0.1, 0.2752), "fashion_mnist": (0.2190, 0.3318), "notmnist": (0.4254, 0.4501)}
    for name, task in zip(five_datasets.DATASETS, benchmark.tasks, strict=True):
        assert task.name == name
        raw = load_raw(name, data_dir)
        first = content_order(raw.test_images, raw.test_labels)[0]
        image = np.array(raw.test_images[first])
        if name in grey:
            if name == "notmnist":
                image = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.LANCZOS))
            else:
                image = np.pad(image, 2)
            mean, std = grey[name]
            expected = np.repeat((image[None] / 255 - mean) / std, 3, axis=0)
        else:
            mean, std = five_datasets.STATISTICS[name]
            expected = ((image / 255 - mean) / std).transpose(2, 0, 1)
        np.testing.assert_allclose(task.test.images[0].numpy(), expected, rtol=0, atol=2e-6)
        assert task.test.labels[0] == raw.test_labels[first]


def test_resizing_all_at_once_gives_the_bytes_of_one_by_one():
    images = random_set("notmnist").test_images
    singly = [np.asarray(Image.fromarray(i).resize((32, 32), Image.Resampling.LANCZOS)) for i in images]
    np.testing.assert_array_equal(five_datasets.resize_to_32(images), np.stack(singly))


def test_five_datasets_released_shows_mnist_again(data_dir):
    one = five_datasets.load(seed=3, protocol="released", data_dir=data_dir)
    two = five_datasets.load(seed=4, protocol="released", data_dir=data_dir)
    mnist, fashion = one.tasks[1], one.tasks[3]
    torch.testing.assert_close(fashion.test.images * 0.3318 + 0.2190, mnist.test.images * 0.2752 + 0.1)
    assert torch.equal(fashion.valid.images, two.tasks[3].valid.images), "that task's split has seed 1"
    assert not torch.equal(mnist.valid.images, two.tasks[1].valid.images)
    assert "fashion_mnist" not in one.sources and any("MNIST's images" in note for note in one.notes)


def test_a_subset_says_so(data_dir):
    note = "5-datasets run on svhn, mnist instead of"
    assert any(note in n for n in five_datasets.load(seed=0, datasets=("svhn", "mnist"), data_dir=data_dir).notes)
    assert any("cifar10: 200 of 50,000" in n for n in five_datasets.load(seed=0, data_dir=data_dir).notes)


def test_split_helpers():
    assert [n_held_out(n, f) for n, f in ((5000, 0.05), (19, 0.05), (1, 0.5), (10, 0.0))] == [250, 1, 0, 0]
    train, valid = holdout(100, 0.25, np.random.default_rng(0))
    assert sorted([*train, *valid]) == list(range(100)) and len(valid) == 25
    assert limit_per_class(np.array([1, 0, 1, 1, 0]), 2).tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize("load", LOADS)
def test_n_train_limits_each_class(load, data_dir):
    task = load(seed=0, n_train=4, pc_valid=0, data_dir=data_dir).tasks[0]
    assert task.train.labels.bincount().tolist() == [4] * task.n_classes and len(task.valid.labels) == 0


@pytest.mark.parametrize(
    ("load", "arguments", "message"),
    [
        (pmnist.load, {"n_tasks": 0}, "n_tasks is 0; it must be at least 1"),
        (pmnist.load, {"seed": -1}, "seed is -1; it must be 0 or more"),
        (cifar100.load, {"n_tasks": 11}, "n_tasks is 11; it must be 1 to 10"),
        (cifar100.load, {"class_order_seed": -2}, "class_order_seed is -2"),
        (cifar100.load, {"data": "fake"}, "unknown data 'fake'; known are real, embedded"),
        (cifar100_superclass.load, {"t_order": 5}, "t_order is 5; it must be 0 to 4"),
        (cifar100_superclass.load, {"protocol": "mine"}, "unknown protocol 'mine'; known are paper, released"),
        (five_datasets.load, {"datasets": ("mnist", "emnist")}, "unknown data set 'emnist'; known are cifar10"),
        (five_datasets.load, {"datasets": ("mnist", "mnist")}, "each once"),
        (five_datasets.load, {"datasets": ()}, "datasets are none"),
        (five_datasets.load, {"n_tasks": 6}, "n_tasks is 6; it must be 1 to 5"),
        *((load, {"n_train": 0}, "n_train is 0; it must be at least 1") for load in LOADS),
        *((load, {"pc_valid": 1.0}, "pc_valid is 1.0; it must be a fraction") for load in LOADS),
        *((load, {"pc_valid": float("nan")}, "pc_valid is nan; it must be a fraction") for load in LOADS),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(load, arguments, message, data_dir):
    with pytest.raises(InputError, match=message) as error:
        load(**{"seed": 0, "data_dir": data_dir, **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.real
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar100", "notmnist"])
def test_real_images_are_the_published_ones(name, real_data_dir):
    from dataloader.sets import open_sets

    opened = open_sets([name], "real", real_data_dir)
    assert opened.sources[name]["verified"] and not opened.notes


@pytest.mark.real
@pytest.mark.slow
def test_real_images_are_normalised(real_data_dir):
    datasets = ("mnist", "fashion_mnist", "notmnist")
    for task in five_datasets.load(seed=0, datasets=datasets, n_train=1000, data_dir=real_data_dir).tasks:
        assert abs(task.train.images.mean()) < 0.02 and abs(task.train.images.std() - 1) < 0.02
