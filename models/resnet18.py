"""The network of 5-datasets and miniImageNet: ResNet18 with a third of the usual channels, one head a task."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F


def batch_norm(n_features: int) -> nn.BatchNorm2d:
    """BatchNorm on the statistics of the batch at hand, in training and at test: no running averages."""
    return nn.BatchNorm2d(n_features, track_running_stats=False)


def conv(n_in: int, n_out: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias whose output has the input's size over the stride."""
    return nn.Conv2d(n_in, n_out, kernel_size, stride, padding=kernel_size // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a strided 1x1 convolution where the shape changes."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(n_in, n_out, 3, stride), batch_norm(n_out)
        self.conv2, self.bn2 = conv(n_out, n_out, 3), batch_norm(n_out)
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(conv(n_in, n_out, 1, stride), batch_norm(n_out))
        else:
            self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, n_in, h, w) to (batch, n_out, h / stride, w / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNet18(nn.Module):
    """The paper's reduced ResNet18 (1,125,140 parameters with five heads of ten classes on 32x32 images).

    Args:
        n_classes: classes of each task, one head for each entry.
        width: channels of the first stage; the later ones have 2, 4 and 8 times as many.
        side: height and width of the images.
        stride: of the first convolution.
    """

    def __init__(self, n_classes: list[int], width: int = 20, side: int = 32, stride: int = 1) -> None:
        super().__init__()
        self.arguments = dict(n_classes=n_classes, width=width, side=side, stride=stride)  # for engine.load_run
        self.conv1, self.bn1 = conv(3, width, 3, stride), batch_norm(width)
        self.layer1 = nn.Sequential(BasicBlock(width, width, 1), BasicBlock(width, width, 1))
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width, 1))
        self.layer3 = nn.Sequential(BasicBlock(2 * width, 4 * width, 2), BasicBlock(4 * width, 4 * width, 1))
        self.layer4 = nn.Sequential(BasicBlock(4 * width, 8 * width, 2), BasicBlock(8 * width, 8 * width, 1))
        last = math.ceil(side / (8 * stride))  # height and width after the last stage: each stride rounds up
        n_features = 8 * width * (last // 2) ** 2  # 640 for 5-datasets, 1440 for miniImageNet
        self.heads = nn.ModuleList(nn.Linear(n_features, n, bias=False) for n in n_classes)

    def forward(self, images: Tensor, task: int) -> Tensor:
        """Logits (batch, classes of `task`) of images (batch, 3, side, side)."""
        x = F.relu(self.bn1(self.conv1(images)))  # (batch, width, side / stride, side / stride)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (batch, 8 * width, last, last)
        x = F.avg_pool2d(x, 2).flatten(1)  # (batch, n_features)
        return self.heads[task](x)
