"""The 20-task CIFAR-100 superclass network: two convolutions, two fully connected layers, one head a task."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import LocalResponseNorm


class LeNet(nn.Module):
    """The paper's LeNet for 3x32x32 images (3,036,500 parameters with twenty heads of five classes).

    Args:
        n_classes: classes of each task, one head for each entry.
    """

    def __init__(self, n_classes: list[int]) -> None:
        super().__init__()
        self.arguments = dict(n_classes=n_classes)  # for engine.load_run
        self.conv1 = nn.Conv2d(3, 20, 5, padding=2, bias=False)
        self.norm1 = LocalResponseNorm(20, size=4, alpha=0.001 / 9, beta=0.75, k=1)
        self.conv2 = nn.Conv2d(20, 50, 5, padding=2, bias=False)
        self.norm2 = LocalResponseNorm(50, size=4, alpha=0.001 / 9, beta=0.75, k=1)
        self.fc1 = nn.Linear(3200, 800, bias=False)
        self.fc2 = nn.Linear(800, 500, bias=False)
        self.heads = nn.ModuleList(nn.Linear(500, n, bias=False) for n in n_classes)
        for weight in self.parameters():
            nn.init.kaiming_uniform_(weight, mode="fan_in", nonlinearity="relu")

    def forward(self, images: Tensor, task: int) -> Tensor:
        """Logits (batch, classes of `task`) of images (batch, 3, 32, 32)."""
        x = F.max_pool2d(self.norm1(F.relu(self.conv1(images))), 3, stride=2, padding=1)  # (batch, 20, 16, 16)
        x = F.max_pool2d(self.norm2(F.relu(self.conv2(x))), 3, stride=2, padding=1)  # (batch, 50, 8, 8)
        x = F.relu(self.fc1(x.flatten(1)))  # (batch, 800)
        x = F.relu(self.fc2(x))  # (batch, 500)
        return self.heads[task](x)
