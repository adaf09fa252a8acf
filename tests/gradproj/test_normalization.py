"""BatchNorm at test: by the batch, as published, or by the statistics of each task's training set."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from engine import load_run
from engine.task import Split
from engine.training import evaluate
from gradproj.errors import InputError
from gradproj.normalization import batch_norms, fixed_statistics, training_statistics
from tests.faults import Normalised, TwoLayers, benchmark, outcome, small_run

pytestmark = pytest.mark.usefixtures("quick")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_statistics_are_mean_and_variance_of_all_inputs():
    batches = [3 * normal(5, 4, 3, 2, seed=1) + 1, normal(2, 4, 3, 2, seed=2)]
    model = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False).double())
    mean, variance = training_statistics(model, model, batches)["0"]
    pooled = torch.cat([batch.permute(1, 0, 2, 3).flatten(1) for batch in batches], dim=1)  # (4, 42)
    assert_close(mean, pooled.mean(1).float())
    assert_close(variance, pooled.var(1, unbiased=False).float())


def test_later_layers_see_inputs_normalised_by_each_batch():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)
    ).double()
    batches = [normal(6, 4), 5 * normal(9, 4, seed=1)]
    mean, variance = training_statistics(model, model, batches)["2"]
    with torch.no_grad():
        pooled = torch.cat([model[1](model[0](batch)) for batch in batches])
    assert_close(mean, pooled.mean(0).float())
    assert_close(variance, pooled.var(0, unbiased=False).float())


def test_constant_inputs_have_no_negative_variance():
    model = nn.BatchNorm1d(2, track_running_stats=False)
    _, variance = training_statistics(model, model, [torch.full((7, 2), 1e4 / 3)])[""]
    assert (variance >= 0).all()


def test_fixed_statistics_normalise_by_them_and_are_given_back():
    torch.manual_seed(0)
    model, images = Normalised(), torch.randn(5, 12)
    nn.init.normal_(model.bn.weight)
    before = model(images, 0)
    mean, variance = torch.randn(8), torch.rand(8)
    with fixed_statistics(model, {"bn": (mean, variance)}):
        found = model(images, 0)
    hidden = (model.fc(images) - mean) / (variance + model.bn.eps).sqrt() * model.bn.weight + model.bn.bias
    assert_close(found, model.heads[0](hidden.relu()))
    assert_close(model(images, 0), before, atol=0, rtol=0)


def test_by_the_training_sets_own_statistics_one_batch_is_the_same_either_way():
    torch.manual_seed(0)
    model, images = Normalised(), torch.randn(30, 12)
    statistics = training_statistics(model, lambda batch: model(batch, 0), [images])
    by_batch = model(images, 0)
    with fixed_statistics(model, statistics):
        assert_close(model(images, 0), by_batch, atol=1e-5, rtol=1e-5)


def accuracies(model: nn.Module, split: Split, batch_sizes: tuple[int, ...]) -> list[float]:
    """In several batch sizes and orders."""
    orders = [torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(s)) for s in range(3)]
    return [
        evaluate(model, 0, Split(split.images[order], split.labels[order]), batch_size)[1]
        for order in orders
        for batch_size in batch_sizes
    ]


def test_accuracy_depends_on_batch_size_and_order_only_without_it(tmp_path):
    small_run(tmp_path, Normalised, batchnorm="task")
    loaded, split = load_run(tmp_path), benchmark().tasks[0].test
    assert len(set(accuracies(loaded.model, split, (2, 3, 7, 40)))) > 1
    with fixed_statistics(loaded.model, loaded.statistics[0]):
        found = accuracies(loaded.model, split, (1, 2, 3, 7, 40))
    assert set(found) == {loaded.summary["accuracy"][-1][0]}


@pytest.mark.parametrize("batch_size", [2, 5, 64])
def test_run_with_it_has_the_same_accuracy_at_every_batch_size(tmp_path, batch_size):
    # The validation loss and the statistics see batches too, so that only the test's own batches are varied.
    small_run(tmp_path / "run", Normalised, batchnorm="task", schedule="constant")
    loaded = load_run(tmp_path / "run")
    for t, task in enumerate(benchmark().tasks):
        with fixed_statistics(loaded.model, loaded.statistics[t]):
            assert evaluate(loaded.model, t, task.test, batch_size)[1] == loaded.summary["accuracy"][-1][t]


def test_it_changes_nothing_but_the_test(tmp_path):
    small_run(tmp_path / "batch", Normalised)
    small_run(tmp_path / "task", Normalised, batchnorm="task")
    by_batch, by_task = outcome(tmp_path / "batch"), outcome(tmp_path / "task")
    assert by_batch["accuracy"] != by_task["accuracy"]
    for name in ("lines", "weights", "memory_columns"):
        assert by_batch[name] == by_task[name]


def test_one_line_on_models_without_batchnorm(tmp_path):
    with pytest.raises(InputError, match="^batchnorm is task, but TwoLayers has no BatchNorm; leave the flag out$"):
        small_run(tmp_path, TwoLayers, batchnorm="task")
    assert not list(tmp_path.iterdir())  # what is refused leaves nothing behind


def test_batch_norms_by_name():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm3d(2)), nn.GroupNorm(1, 2))
    assert list(batch_norms(model)) == ["0", "1.0"]
