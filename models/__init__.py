"""The paper's networks. Every model is called as `model(images, task)` and returns that task's logits only."""

from models.alexnet import AlexNet
from models.lenet import LeNet
from models.mlp import MLP
from models.resnet18 import ResNet18

__all__ = ["MLP", "AlexNet", "LeNet", "ResNet18"]
