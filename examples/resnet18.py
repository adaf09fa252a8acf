"""Torchvision's ResNet18 learns rendered digits and then rendered clothes, in a plain loop: python examples/resnet18.py

The digits stay known where the memory protects them. Running statistics of BatchNorm would move old outputs whatever
gradients do, so the network is in eval mode after the first task.
"""

import argparse
import copy

import beforehand  # noqa: F401
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from dataloader import five_datasets
from engine.task import Split, Task
from gradproj import GradientProjectionMemory


def logits(model: nn.Module, images: Tensor, t: int) -> Tensor:
    """Of the ten classes of task t; the network has twenty outputs."""
    return model(images)[:, 10 * t : 10 * t + 10]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, t: int, n_epochs: int) -> None:
    for _ in range(n_epochs):
        for rows in torch.randperm(len(task.train.labels)).split(32):
            loss = nn.functional.cross_entropy(logits(model, task.train.images[rows], t), task.train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, test: Split, t: int) -> float:
    found = torch.cat([logits(model.eval(), images, t).argmax(1) for images in test.images.split(256)])
    return 100 * (found == test.labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a few steps, only to see that it runs")
    n_train, n_epochs, n_samples = (4, 1, 8) if parser.parse_args().short else (40, 4, 32)
    torch.manual_seed(0)
    sets = ["mnist", "fashion_mnist"]
    digits, clothes = five_datasets.load(seed=0, datasets=sets, n_train=n_train, data="embedded").tasks
    model = resnet18(num_classes=20)
    train(model, torch.optim.Adam(model.parameters(), lr=1e-3), digits, 0, n_epochs)
    print(f"digits after learning them: {accuracy(model, digits.test, 0):.1f} %")

    naive = copy.deepcopy(model)
    train(naive, torch.optim.Adam(naive.parameters(), lr=1e-3), clothes, 1, n_epochs)

    memory = GradientProjectionMemory(model)
    samples = digits.train.images[:n_samples]
    memory.update(model, samples, threshold=0.99)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with memory.protect(optimizer):
        train(model, optimizer, clothes, 1, n_epochs)

    for name, network in (("naive", naive), ("protected", model)):
        old, new = accuracy(network, digits.test, 0), accuracy(network, clothes.test, 1)
        print(f"{name:9} after learning clothes: digits {old:.1f} %, clothes {new:.1f} %")
    print(*str(memory.verify(model, samples)).splitlines()[-2:], sep="\n")


if __name__ == "__main__":
    main()
