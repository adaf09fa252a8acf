"""What the tests of models that do what they like share: a model that learns under protection, and how it holds."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from gradproj import GradientProjectionMemory

D = 6
OLD, NEW = (torch.randn(n, D, generator=torch.Generator().manual_seed(n)) for n in (3, 5))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


class Learned:
    """A model that has learned something new under protection: what it says, and how it holds.

    Args:
        model: with ε = 1 of what it sees of `old`.
        forward: runs it.
        optimizer: made of its parameters.
        old, new: batches.
        given: whether `protect` is given the optimiser.
    """

    def __init__(self, model, forward=None, optimizer=None, old=OLD, new=NEW, given=True, mask=None, **arguments):
        forward = forward or model
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.memory = GradientProjectionMemory(model)
            self.memory.update(forward, [old], threshold=1.0, mask=mask)
            optimizer = (optimizer or (lambda p: torch.optim.SGD(p, lr=0.1)))(list(model.parameters()))
            self.losses = []
            with self.memory.protect(optimizer if given else None, **arguments):
                for _ in range(4):
                    optimizer.zero_grad()
                    result = forward(new)
                    if not self.losses:
                        target = torch.randn_like(result)
                    loss = (result - target).float().square().mean()
                    loss.backward()
                    optimizer.step()
                    self.losses.append(loss.item())
            self.verified = self.memory.verify(forward, old, mask=mask)
        self.said = [str(w.message) for w in caught if w.category is UserWarning]

    @property
    def has_learned(self) -> bool:
        return self.losses[-1] < self.losses[0]


def remembering(model: nn.Module) -> GradientProjectionMemory:
    memory = GradientProjectionMemory(model)
    memory.update(model, [OLD], threshold=1.0)
    return memory
