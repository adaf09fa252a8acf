"""A training step written out by hand for small fully connected networks on a CPU.

For the permuted-MNIST network autograd and the optimiser cost several times the arithmetic. Here one step is a dozen
matrix products and a few elementwise passes, with these savings on top of the plain mathematics:

- The projection of the first layer's inputs, X P, is made once a task: they are the data themselves.
- A weight update is one addmm, W ← W - lr/B · Δᵀ (X P), with no gradient left in between.
- The loss is not computed at each step: the logits are kept, and one pass at the epoch's end gives its mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.task import Split
from gradproj.projection import LayerProjector, Projector


def chain_outputs(weights: Sequence[Tensor], images: Tensor) -> list[Tensor]:
    """What goes into each layer of the chain, and its logits: (B, d), …, (B, classes)."""
    outputs = [images]
    for weight in weights[:-1]:
        outputs.append(torch.mm(outputs[-1], weight.T).relu_())
    return [*outputs, torch.mm(outputs[-1], weights[-1].T)]


class FusedChain:
    """Plain SGD on the cross-entropy of a chain Linear, ReLU, …, Linear without biases.

    Args:
        layers: the chain's layers, first to last.
        projectors: by position in the chain, what the layer's gradient goes through; missing means nothing.
        train: the task's training images (n, d) and labels.
    """

    def __init__(self, layers: Sequence[nn.Linear], projectors: Mapping[int, LayerProjector], train: Split) -> None:
        self.weights = [layer.weight.detach() for layer in layers]
        self.full = [i in projectors and projectors[i].is_full for i in range(len(layers))]
        self.project: list[Projector | None] = [
            projectors[i].groups[0] if i in projectors and not projectors[i].is_idle else None
            for i in range(len(layers))
        ]
        self.train = train
        projects_data = self.project[0] is not None and not self.full[0]
        self.projected_images = self.project[0](train.images) if projects_data else train.images

    @torch.no_grad()
    def epoch(self, order: Tensor, batches: Sequence[tuple[int, int]], lr: float) -> float:
        """One pass over the training set; returns the mean loss over its images, as seen while training.

        Args:
            order: (n,) the order of the images.
            batches: (start, stop) of each batch, in places of `order`, which they cover one after another.
            lr: learning rate.
        """
        images, labels = self.train.images[order], self.train.labels[order]
        projected = images if self.projected_images is self.train.images else self.projected_images[order]
        targets = F.one_hot(labels, self.weights[-1].shape[0]).to(images.dtype)  # (n, classes)
        sizes = [stop - start for start, stop in batches]
        parts = zip(images.split(sizes), projected.split(sizes), targets.split(sizes), strict=True)
        logits = torch.cat([self.step(*part, lr) for part in parts])
        return F.cross_entropy(logits, labels).item()

    def step(self, images: Tensor, projected: Tensor, targets: Tensor, lr: float) -> Tensor:
        """Update the weights by one batch (B, d); returns its logits (B, classes) from before the update."""
        weights = self.weights
        *inputs, logits = chain_outputs(weights, images)
        delta = torch.softmax(logits, 1).sub_(targets)  # (B, o), gradient of the summed loss by the layer's output
        for i in range(len(weights) - 1, -1, -1):
            weight, x = weights[i], inputs[i]
            below = torch.mm(delta, weight) if i > 0 else None  # before the weight moves
            if not self.full[i]:
                if i == 0:
                    x = projected
                elif self.project[i] is not None:
                    x = self.project[i](x)
                weight.addmm_(delta.T, x, alpha=-lr / len(images))
            if below is not None:
                delta = torch.ops.aten.threshold_backward(below, inputs[i], 0)
        return logits
