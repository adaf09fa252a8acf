"""Embedded data: same bytes every time, the published shapes, kept when possible and labelled always."""

import numpy as np
import pytest

from dataloader import cifar100_superclass, five_datasets, pmnist
from dataloader.embedded import render as embedded
from gradproj.errors import InputError


@pytest.fixture
def few(monkeypatch):
    """Four training images and two test images a class."""
    for name, recipe in embedded.RECIPES.items():
        monkeypatch.setitem(embedded.RECIPES, name, recipe._replace(n_train=4, n_test=2))


@pytest.mark.parametrize("name", embedded.RECIPES)
def test_same_bytes_in_the_published_shape(name, few):
    raw = embedded.render(name)
    for ours, again in zip(raw, embedded.render(name), strict=True):
        np.testing.assert_array_equal(ours, again)
    spec = embedded.spec(name)
    assert raw.train_images.shape == (4 * spec.n_classes, *spec.shape) and raw.train_images.dtype == np.uint8
    assert np.bincount(raw.train_labels).tolist() == [4] * spec.n_classes
    assert len({i.tobytes() for i in [*raw.train_images, *raw.test_images]}) == 6 * spec.n_classes, "an image repeats"
    assert 0.1 < raw.train_images.std() / 255 < 0.5


def test_every_class_of_cifar100_has_its_own_character():
    characters = embedded.RECIPES["cifar100"].characters
    assert len(set(characters)) == 100
    for fine, superclass in enumerate(cifar100_superclass.SUPERCLASS_OF):
        assert characters[fine] in embedded.GROUPS[superclass]


def test_kept_images_are_used(few, tmp_path, monkeypatch):
    first = embedded.load_raw("mnist", tmp_path)
    monkeypatch.setattr(embedded, "render", lambda name: pytest.fail("rendered again"))
    for ours, again in zip(first, embedded.load_raw("mnist", tmp_path), strict=True):
        np.testing.assert_array_equal(ours, again)


def test_unwritable_folder_only_costs_time(few, tmp_path):
    (tmp_path / "file").write_text("")
    raw = embedded.load_raw("mnist", tmp_path / "file")  # no folder can be made inside a file
    np.testing.assert_array_equal(raw.train_images, embedded.render("mnist").train_images)


def test_labelled_as_embedded(few, tmp_path):
    for load in (pmnist.load, five_datasets.load):
        benchmark = load(seed=0, data="embedded", data_dir=tmp_path)
        assert benchmark.data == "embedded"
        for source in benchmark.sources.values():
            assert source["data"] == "embedded" and not source["verified"] and len(source["train_sha256"]) == 64


def test_unknown_set(tmp_path):
    with pytest.raises(InputError, match="unknown data set 'emnist'; known are mnist"):
        embedded.load_raw("emnist", tmp_path)


@pytest.mark.slow
def test_a_linear_classifier_beats_chance_but_not_by_everything(tmp_path):
    """Classes have real features: far above the 10 % of guessing, not all read off single pixels."""
    raw = embedded.load_raw("mnist", tmp_path)
    x, x_test = (a.reshape(len(a), -1) / 255.0 for a in (raw.train_images, raw.test_images))
    targets = np.eye(10)[raw.train_labels]
    weights = np.linalg.solve(x.T @ x + 10 * np.eye(784), x.T @ targets)
    accuracy = ((x_test @ weights).argmax(1) == raw.test_labels).mean()
    assert 0.6 < accuracy < 0.97
