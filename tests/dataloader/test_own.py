"""Tasks from data of one's own: what is read, how it is split, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from dataloader import own
from engine.task import Split
from engine.torchvision import import_torchvision
from gradproj.errors import InputError

transforms = import_torchvision("transforms")
IMAGES = torch.arange(60.0).view(60, 1, 1, 1).repeat(1, 1, 2, 2)  # each image is its number
LABELS = torch.arange(60) % 6


def numbers(split: Split) -> list[int]:
    return split.images[:, 0, 0, 0].int().tolist()


class Dicts:
    """As Hugging Face's."""

    column_names = ("picture", "digit")
    keys = ("picture", "digit")

    def __len__(self):
        return 60

    def __getitem__(self, i):
        if i in self.keys:
            return LABELS.tolist()
        return {"picture": IMAGES[i], "digit": int(LABELS[i])}


class Endless(IterableDataset):
    def __iter__(self):
        return zip(IMAGES, LABELS, strict=True)


SOURCES = {
    "tensors": lambda: (IMAGES, LABELS),
    "arrays": lambda: (IMAGES.numpy(), LABELS.numpy().astype(np.uint8)),
    "split": lambda: Split(IMAGES, LABELS),
    "data set": lambda: TensorDataset(IMAGES, LABELS),
    "dicts": Dicts,
    "loader": lambda: DataLoader(TensorDataset(IMAGES, LABELS.int()), batch_size=7),
    "iterable": Endless,
    "loader of an iterable": lambda: DataLoader(Endless(), batch_size=7),
    "batches": lambda: ((IMAGES[i : i + 20], LABELS[i : i + 20]) for i in (0, 20, 40)),
}


@pytest.mark.parametrize("source", SOURCES)
def test_stream(source):
    split = own.stream(SOURCES[source](), Dicts.keys)
    assert torch.equal(split.images, IMAGES)
    assert torch.equal(split.labels, LABELS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([(IMAGES[0], 0), (IMAGES[1, :, :1], 1)], r"cannot read list \(RuntimeError: .*one shape"),
        ([(Image.new("L", (2, 2)), 0)], r"cannot read list \(TypeError: .*give the data set a transform"),
        ((IMAGES, LABELS.float()), r"the labels of tuple are torch.float32 \(60,\); they must be one whole number"),
        ((IMAGES, torch.zeros(60, 6, dtype=torch.int64)), r"the labels of tuple are torch.int64 \(60, 6\)"),
        ([{"x": 1}], r"cannot read list \(KeyError: 'image'\)"),
        ([], r"cannot read list"),
    ],
)
def test_what_cannot_be_streamed(data, message):
    with pytest.raises(InputError, match=message) as caught:
        own.stream(data)
    assert "\n" not in str(caught.value)


def test_task_holds_out_and_numbers_anew():
    chosen = LABELS.ge(3)
    task = own.task("high", (IMAGES[chosen], LABELS[chosen]), (IMAGES[chosen][:6], LABELS[chosen][:6]), pc_valid=0.2)
    assert (task.name, task.n_classes, task.classes) == ("high", 3, (3, 4, 5))
    assert sorted(numbers(task.train) + numbers(task.valid)) == [i for i in range(60) if i % 6 >= 3]
    assert len(task.valid.labels) == 6
    for part in (task.train, task.valid, task.test):
        assert [i % 6 - 3 for i in numbers(part)] == part.labels.tolist()
    again = own.task("high", (IMAGES[chosen], LABELS[chosen]), (IMAGES, LABELS % 3 + 3), pc_valid=0.2)
    assert numbers(again.valid) == numbers(task.valid)
    other = own.task("high", (IMAGES[chosen], LABELS[chosen]), (IMAGES, LABELS % 3 + 3), pc_valid=0.2, seed=2)
    assert numbers(other.valid) != numbers(task.valid)


def test_task_with_all_said():
    valid = Split(IMAGES[:3], torch.tensor([2, 0, 2]))
    task = own.task("t", (IMAGES, LABELS % 3), (IMAGES, LABELS % 3), valid, classes=[2, 0, 1], names=["c", "a", "b"])
    assert dict(zip(numbers(task.valid), task.valid.labels.tolist(), strict=True)) == {0: 0, 1: 1, 2: 0}
    assert len(task.train.labels) == 60
    assert task.classes == ("c", "a", "b")
    with pytest.raises(InputError, match=r"t has labels 1, which are none of its classes \[2, 0\]"):
        own.task("t", (IMAGES, LABELS % 3), (IMAGES, LABELS % 3), valid, classes=[2, 0])


@pytest.mark.parametrize("source", ["tensors", "split", "data set", "dicts"])
def test_by_class(source):
    tasks = own.by_class(SOURCES[source](), [[4, 1], [0]], SOURCES[source](), pc_valid=0.1, keys=Dicts.keys)
    assert len(tasks) == 2
    task = tasks[0]
    assert (task.name, task.n_classes, task.classes) == ("4, 1", 2, (4, 1))
    assert sorted(numbers(task.train) + numbers(task.valid)) == [i for i in range(60) if i % 6 in (1, 4)]
    assert len(task.valid.labels) == 2
    for part in (task.train, task.valid, task.test):
        assert [{4: 0, 1: 1}[i % 6] for i in numbers(part)] == part.labels.tolist()
    assert set(numbers(tasks[1].test)) == set(range(0, 60, 6))


def test_batches_hold_all_classes_in_whatever_order_the_data_lie():
    """BatchNorm normalises by the batch at test too: class after class, a network would be tested on other numbers."""
    order = LABELS.argsort(stable=True)
    sorted_data = (IMAGES[order], LABELS[order])
    tasks = [own.task("t", sorted_data, sorted_data), own.by_class(sorted_data, [range(6)], sorted_data)[0]]
    for task in tasks:
        for part in (task.train, task.test):
            assert all(len(batch.unique()) > 3 for batch in part.labels.split(20))
    again = own.by_class(sorted_data, [range(6)], sorted_data)[0]
    assert numbers(again.test) == numbers(tasks[1].test)


def test_a_test_is_held_out_of_each_class_whichever_task_it_is_in():
    one = own.by_class((IMAGES, LABELS), [[0, 1], [2]], pc_test=0.3)
    other = own.by_class((IMAGES, LABELS), [[2, 0]], pc_test=0.3)
    tests = [numbers(one[0].test), numbers(one[1].test), numbers(other[0].test)]
    assert [len(found) for found in tests] == [6, 3, 6]
    assert set(tests[2]) == {i for i in tests[0] if i % 6 == 0} | set(tests[1])
    assert not set(tests[0]) & {*numbers(one[0].train), *numbers(one[0].valid)}
    assert numbers(own.by_class((IMAGES, LABELS), [[2, 0]], pc_test=0.3, seed=2)[0].test) != tests[2]


def test_few_training_images_of_each_class():
    task = own.by_class((IMAGES, LABELS), [[0, 1]], (IMAGES, LABELS), n_train=4, pc_valid=0.25)[0]
    assert sorted(numbers(task.train) + numbers(task.valid)) == [0, 1, 6, 7, 12, 13, 18, 19]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[0, 9]], "there is no class 9; there are: 0, 1, 2, 3, 4, 5"),
        ([[0], ["one"]], "there is no class one; there are: 0, 1"),
        ([[0, 1], [1]], "class 1 is named twice; each belongs to one task"),
        ([[0], []], "a task has no classes; give each at least one"),
        ([], "a task has no classes"),
    ],
)
def test_groups_that_cannot_be_made(groups, message):
    with pytest.raises(InputError, match=message):
        own.by_class((IMAGES, LABELS), groups)


def test_a_class_by_its_name_and_by_its_label_is_one():
    class Named(TensorDataset):
        targets, classes = LABELS, list("abcdef")

    with pytest.raises(InputError, match=r"^'b' and 1 are the same class; each belongs to one task$"):
        own.by_class(Named(IMAGES, LABELS), [["a", "b"], [1]])


def test_a_class_with_too_few_images():
    with pytest.raises(
        InputError, match="class 0 has too few images; it must have some to train on and some to test on"
    ):
        own.by_class((IMAGES[:1], LABELS[:1]), [[0]])


def test_a_stream_has_no_order():
    with pytest.raises(InputError, match=r"a DataLoader has no order to choose images from; give by_class stream"):
        own.by_class(SOURCES["loader"](), [[0]])


def test_too_little_memory_is_no_fault_of_the_data():
    class Large(TensorDataset):
        def __getitem__(self, i):
            raise MemoryError

    with pytest.raises(MemoryError):
        own.stream(Large(IMAGES, LABELS))


@pytest.mark.parametrize("n_labels", [20, 61])
def test_one_label_for_each_image(n_labels):
    labels = torch.arange(n_labels) % 6
    message = f"^tuple has 60 images and {n_labels} labels; there must be one label for each image$"
    with pytest.raises(InputError, match=message):
        own.task("t", (IMAGES, labels), (IMAGES, LABELS))
    with pytest.raises(InputError, match=message):
        own.by_class((IMAGES, labels), [[0, 1]])


def test_labels_that_are_whole_numbers_written_otherwise():
    tasks = [own.by_class((IMAGES, labels), [[0, 1]])[0] for labels in (LABELS, LABELS.double())]
    assert torch.equal(tasks[0].train.labels, tasks[1].train.labels)


@pytest.mark.parametrize("labels", [LABELS + 0.5, [x + 0.5 for x in LABELS.tolist()]], ids=["tensor", "list"])
def test_labels_that_are_no_whole_numbers(labels):
    with pytest.raises(InputError, match=r"^the labels are float\d+ \(60,\); they must be one whole number an image$"):
        own.by_class((IMAGES, labels), [[0, 1]])
    with pytest.raises(InputError, match="they must be one whole number an image"):
        own.task("t", (IMAGES, LABELS), (IMAGES, LABELS), classes=[0.0, 1.0, 2.5])


def test_sizes_are_known_before_tasks_are_built():
    tasks = own.by_class((IMAGES, LABELS), [[4, 1], [0]], pc_valid=0.1)
    for task, sizes in zip(tasks, tasks.sizes, strict=True):
        assert sizes == {part: len(getattr(task, part).labels) for part in ("train", "valid", "test")}


def test_groups_of_a_file(tmp_path):
    path = tmp_path / "tasks.txt"
    path.write_bytes("\ufeff# tasks.txt\r\ncat, golden retriever\r\n\r\n # more\nα β\n".encode())
    assert own.read_groups(path) == [["cat", "golden retriever"], ["α", "β"]]
    for content, message in (
        (b"\n , \n", "names no class"),
        (b"\xff\xfe\x00", "cannot read .*must have a line of class"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            own.read_groups(path)
    with pytest.raises(InputError, match="cannot read .*no.txt"):
        own.read_groups(tmp_path / "no.txt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pc_valid": 1}, "pc_valid is 1; it must be in .0, 1"),
        ({"pc_valid": -0.5}, "pc_valid is -0.5"),
        ({"classes": [0, 1, 1]}, r"mine: classes are \[0, 1, 1\]; each must be there once"),
    ],
)
def test_a_task_of_what_cannot_be(arguments, message):
    data = torch.zeros(6, 2), torch.tensor([0, 1] * 3)
    with pytest.raises(InputError, match=f"^{message}"):
        own.task("mine", data, data, **arguments)
    if "pc_valid" in arguments:
        with pytest.raises(InputError, match=f"^{message}"):
            own.by_class(data, [[0], [1]], **arguments)
