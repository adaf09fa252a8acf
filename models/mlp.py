"""The permuted-MNIST network: 784-100-100-10, ReLU, no bias, one head for all tasks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Two hidden layers and one output layer that all tasks share (89,400 weights by default).

    Args:
        n_inputs: pixels of a flattened image.
        n_hidden: units of each hidden layer.
        n_outputs: classes.
    """

    def __init__(self, n_inputs: int = 784, n_hidden: int = 100, n_outputs: int = 10) -> None:
        super().__init__()
        self.arguments = dict(n_inputs=n_inputs, n_hidden=n_hidden, n_outputs=n_outputs)  # for engine.load_run
        self.fc1 = nn.Linear(n_inputs, n_hidden, bias=False)
        self.fc2 = nn.Linear(n_hidden, n_hidden, bias=False)
        self.fc3 = nn.Linear(n_hidden, n_outputs, bias=False)

    @property
    def relu_chain(self) -> list[nn.Linear]:
        """The layers that, with a ReLU between them, are the whole network: what a hand-written step needs to know."""
        return [self.fc1, self.fc2, self.fc3]

    def forward(self, images: Tensor, task: int = 0) -> Tensor:
        """Logits (batch, n_outputs) of images (batch, n_inputs); the head is the same for every task."""
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(images)))))
