"""An Avalanche strategy learns two permutations of rendered digits: python examples/avalanche_digits.py"""

import argparse
import io
import warnings

import beforehand  # noqa: F401
import torch
from torch import nn

warnings.filterwarnings("ignore", message="no QP solver found")  # Avalanche's, at import
from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels  # noqa: E402
from avalanche.benchmarks.utils import _make_taskaware_tensor_classification_dataset  # noqa: E402
from avalanche.logging import TextLogger  # noqa: E402
from avalanche.training.plugins import EvaluationPlugin  # noqa: E402
from avalanche.training.supervised import Naive  # noqa: E402

from dataloader import pmnist  # noqa: E402
from engine.task import Split  # noqa: E402
from gradproj import GradientProjectionMemory  # noqa: E402
from gradproj.integrations.avalanche import GradientProjectionPlugin, growing  # noqa: E402


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))


@torch.no_grad()
def accuracy(model: nn.Module, test: Split) -> float:
    return 100 * (model.eval()(test.images).argmax(1) == test.labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--short", action="store_true", help="a few steps, only to see that it runs")
    n_train, n_epochs = (4, 1) if parser.parse_args().short else (100, 10)
    tasks = list(pmnist.load(seed=0, n_tasks=2, n_train=n_train, data="embedded").tasks)
    sets = [
        _make_taskaware_tensor_classification_dataset(task.train.images, task.train.labels, task_labels=t)
        for t, task in enumerate(tasks)
    ]
    stream = with_classes_timeline(with_task_labels(benchmark_from_datasets(train=sets))).train_stream

    for name in ("naive", "protected"):
        model = network()
        memory = GradientProjectionMemory(model, exclude=growing(model))
        plugin = GradientProjectionPlugin(memory, threshold=0.97)
        strategy = Naive(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
            train_mb_size=10,
            train_epochs=n_epochs,
            plugins=[plugin] if name == "protected" else [],
            evaluator=EvaluationPlugin(loggers=[TextLogger(io.StringIO())]),  # silent
        )
        strategy.train(stream[0])
        before = accuracy(model, tasks[0].test)
        plugin.remember = False  # there is no third task
        strategy.train(stream[1])
        after, new = accuracy(model, tasks[0].test), accuracy(model, tasks[1].test)
        print(f"{name:9} first permutation {before:.1f} %, after the second {after:.1f} %; second {new:.1f} %")
    print(memory.verify(model, tasks[0].train.images[:300]))


if __name__ == "__main__":
    main()
