"""The 10-split CIFAR-100 network: three convolutions, two fully connected layers, one head a task."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import Dropout


class AlexNet(nn.Module):
    """The paper's 5-layer AlexNet for 3x32x32 images (6,713,216 parameters with ten heads of ten classes).

    BatchNorm keeps no running averages: training and test both use the statistics of the batch at hand.

    Args:
        n_classes: classes of each task, one head for each entry.
    """

    def __init__(self, n_classes: list[int]) -> None:
        super().__init__()
        self.arguments = dict(n_classes=n_classes)  # for engine.load_run
        self.conv1 = nn.Conv2d(3, 64, 4, bias=False)
        self.bn1 = nn.BatchNorm2d(64, track_running_stats=False)
        self.conv2 = nn.Conv2d(64, 128, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(128, track_running_stats=False)
        self.conv3 = nn.Conv2d(128, 256, 2, bias=False)
        self.bn3 = nn.BatchNorm2d(256, track_running_stats=False)
        self.fc1 = nn.Linear(1024, 2048, bias=False)
        self.bn4 = nn.BatchNorm1d(2048, track_running_stats=False)
        self.fc2 = nn.Linear(2048, 2048, bias=False)
        self.bn5 = nn.BatchNorm1d(2048, track_running_stats=False)
        self.drop1, self.drop2 = Dropout(0.2), Dropout(0.5)
        self.heads = nn.ModuleList(nn.Linear(2048, n, bias=False) for n in n_classes)

    def forward(self, images: Tensor, task: int) -> Tensor:
        """Logits (batch, classes of `task`) of images (batch, 3, 32, 32)."""
        x = F.max_pool2d(self.drop1(F.relu(self.bn1(self.conv1(images)))), 2)  # (batch, 64, 14, 14)
        x = F.max_pool2d(self.drop1(F.relu(self.bn2(self.conv2(x)))), 2)  # (batch, 128, 6, 6)
        x = F.max_pool2d(self.drop2(F.relu(self.bn3(self.conv3(x)))), 2)  # (batch, 256, 2, 2)
        x = self.drop2(F.relu(self.bn4(self.fc1(x.flatten(1)))))  # (batch, 2048)
        x = self.drop2(F.relu(self.bn5(self.fc2(x))))
        return self.heads[task](x)
