"""The memory in Avalanche's strategies."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradproj import GradientProjectionMemory, InputError
from tests.gradproj.integrations.small import D, assert_kept, assert_open, data, network, outputs

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="no QP solver found", category=UserWarning)
    pytest.importorskip("avalanche", reason="Avalanche is not installed")
    from avalanche.benchmarks import (
        benchmark_from_datasets,
        split_online_stream,
        with_classes_timeline,
        with_task_labels,
    )
    from avalanche.benchmarks.utils import _make_taskaware_tensor_classification_dataset as dataset
    from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
    from avalanche.core import SupervisedPlugin
    from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive

    from gradproj.integrations.avalanche import GradientProjectionPlugin, growing

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")
OLD = data(0).tensors[0]


def features() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 8))


class ManyHeads(MultiTaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.heads = features(), MultiHeadClassifier(8, masking=False)

    def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
        return self.heads(self.features(x), task_labels)


def growing_head() -> nn.Sequential:
    return nn.Sequential(features(), IncrementalClassifier(8, initial_out_features=2))


def stream(are_classes_new: bool = False) -> list:
    """Two tasks of two classes, with task labels."""
    sets = []
    for task in (0, 1):
        inputs, targets = data(task).tensors
        classes = (targets[:, 0] > 0).long() + 2 * task * are_classes_new
        sets.append(dataset(inputs, classes, task_labels=task))
    return with_classes_timeline(with_task_labels(benchmark_from_datasets(train=sets))).train_stream


class Losses(SupervisedPlugin):
    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []

    def after_training_iteration(self, strategy, *args, **kwargs):
        self.values.append(strategy.loss.item())


def strategy(model: nn.Module, *plugins: Any, optimizer: Any = torch.optim.Adam) -> Naive:
    optimizer = optimizer(model.parameters(), lr=0.02)
    settings = {"train_mb_size": 8, "train_epochs": 6, "evaluator": EvaluationPlugin(), "plugins": list(plugins)}
    return Naive(model=model, optimizer=optimizer, **settings)


def protecting(model: nn.Module) -> GradientProjectionPlugin:
    memory = GradientProjectionMemory(model, exclude=growing(model))
    return GradientProjectionPlugin(memory, threshold=1.0)


def momentum(parameters: Any, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=3 * lr, momentum=0.9, weight_decay=0.01)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, momentum])
@pytest.mark.parametrize(
    ("make", "are_classes_new"),
    [(network, False), (ManyHeads, False), (ManyHeads, True)],
    ids=["one head", "many heads", "many heads that grow"],
)
def test_old_outputs_stay_while_the_new_task_is_learned(make, are_classes_new, optimizer):
    model, losses = make(), Losses()
    plugin = protecting(model)
    learner = strategy(model, plugin, losses, optimizer=optimizer)
    first, second = stream(are_classes_new)
    learner.train(first)
    assert_open(model)

    def run(inputs: Tensor) -> Tensor:
        return (
            model(inputs, torch.zeros(len(inputs), dtype=torch.long)) if isinstance(model, ManyHeads) else model(inputs)
        )

    def classes(inputs: Tensor) -> Tensor:
        return run(inputs)[:, :2]  # Avalanche pads the outputs of a head to the widest

    old = outputs(classes, model, OLD)
    plugin.remember = False
    losses.values.clear()
    learner.train(second)
    assert sum(losses.values[-3:]) < 0.9 * sum(losses.values[:3])
    assert_kept(plugin.memory, classes, old, OLD)
    assert_open(model)


def test_each_experience_is_remembered():
    model = network()
    plugin = protecting(model)
    learner = strategy(model, plugin)
    learner.train(stream())
    assert (plugin.memory.n_updates, plugin.memory.columns["0"]) == (2, 7)


def test_below_a_head_that_grows():
    """Features stay; the head that all classes share is named as what moved."""
    model = growing_head()
    plugin = protecting(model)
    learner = strategy(model, plugin)
    first, second = stream(are_classes_new=True)
    learner.train(first)
    old = outputs(model[0], model, OLD)
    plugin.remember = False
    learner.train(second)
    now = outputs(model[0], model, OLD)
    assert (now - old).norm() <= 1e-5 * old.norm()
    report = plugin.memory.verify(model, OLD)
    assert {"1.classifier.weight", "1.classifier.bias"} <= set(report.others) and not report.holds


def test_a_growing_head_must_be_excluded():
    assert growing(ManyHeads()) == ["heads", "heads.classifiers.0"] and growing(growing_head()) == ["1"]
    for model, layer in ((growing_head(), "1.classifier"), (ManyHeads(), "heads.classifiers.0.classifier")):
        with pytest.raises(InputError, match=f"layer {layer} grows"):
            GradientProjectionPlugin(GradientProjectionMemory(model), threshold=1.0)


def test_an_exception_closes_the_protection():
    class Fails(SupervisedPlugin):
        def after_backward(self, strategy, *args, **kwargs):
            if plugin.memory.n_updates:
                assert plugin.memory.is_protecting
                raise KeyError("broken step")

    model = network()
    plugin = protecting(model)
    learner = strategy(model, plugin, Fails())
    first, second = stream()
    learner.train(first)
    with pytest.raises(KeyError, match="broken step"):
        learner.train(second)
    assert not plugin.memory.is_protecting and plugin.memory.n_updates == 1
    assert_open(model)
    assert "_train_exp" not in vars(learner)


def test_the_memory_is_in_checkpoints(tmp_path):
    model = ManyHeads()
    plugin = protecting(model)
    learner = strategy(model, plugin)
    first, second = stream()
    learner.train(first)
    # Without the optimiser: dill cannot pickle those of every torch, with a memory or without.
    save_checkpoint(learner, tmp_path / "checkpoint.pkl", exclude=["optimizer"])

    def run(inputs: Tensor) -> Tensor:
        return learner.model(inputs, torch.zeros(len(inputs), dtype=torch.long))

    old = outputs(run, model, OLD)
    fresh = ManyHeads()
    learner, done = maybe_load_checkpoint(strategy(fresh, protecting(fresh)), tmp_path / "checkpoint.pkl")
    (again,) = (p for p in learner.plugins if isinstance(p, GradientProjectionPlugin))
    assert done == 1 and again is not plugin and again.memory.model is learner.model is not model
    again.remember = False
    learner.optimizer = torch.optim.Adam(learner.model.parameters(), lr=0.02)
    learner.train(second)
    assert_kept(again.memory, run, old, OLD)
    assert not torch.equal(learner.model.features[0].weight, model.features[0].weight)


def test_online_streams_are_refused():
    model = network()
    learner = strategy(model, protecting(model))
    with pytest.raises(InputError, match="online stream"):
        learner.train(next(iter(split_online_stream(stream(), 8))))
