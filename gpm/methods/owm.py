"""Orthogonal Weights Modification (Zeng et al., Nature Machine Intelligence 2019, arXiv 1810.01256)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gpm.memory import normalization_parameters
from gpm.methods.base import Method
from gpm.options import Options
from gpm.projection import LayerProjector, Projector, projecting
from gpm.representation import Layer, find_layers, input_columns
from gpm.seeds import generator
from gpm.task import Task


class OWM(Method):
    """SGD whose steps avoid the inputs of earlier tasks, the more the stronger the input: G ← G P for each layer.

    P follows from the layer's mean input x̄ over each batch by recursive least squares, beginning with the identity:
    k = P x̄ / (α + x̄ᵀ P x̄), P ← P - k x̄ᵀ P. That recursion is a way to invert, P = α (α I + Σ x̄ x̄ᵀ)⁻¹, in whatever
    order the x̄ come; so Σ x̄ x̄ᵀ is added up, in float64, and inverted once for each task. A convolution has an x̄ for
    each position of its patches.

    The batches are those of one pass over the training images, in random order, after the task is learned: the inputs
    of the weights that are to be kept. Normalisation parameters are frozen after the first task and heads are not
    protected, as for GPM.

    Hyperparameters: `owm_alpha` (α, 100). It competes with a sum over batches: with more batches a task the same α
    leaves less freedom.

    Stores Σ d² floats over the layers.
    """

    name = "owm"

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        self.layers = find_layers(model, exclude=["heads"] if hasattr(model, "heads") else [])
        self.gram = {  # Σ x̄ x̄ᵀ (d, d)
            key: layer.module.weight.new_zeros(layer.input_size, layer.input_size, dtype=torch.float64)
            for layer in self.layers.values()
            for key in layer.keys
        }

    def projector(self, key: str) -> Tensor:
        """P = α (α I + Σ x̄ x̄ᵀ)⁻¹."""
        gram, alpha = self.gram[key], self.options.owm_alpha
        return alpha * torch.cholesky_inverse(torch.linalg.cholesky(gram + alpha * torch.eye(len(gram)).to(gram)))

    @contextmanager
    def learning(self, t: int, task: Task) -> Iterator[None]:
        """Train with gradients G P."""
        if t == 0:  # P = I
            yield
            return
        frozen = [p for p in normalization_parameters(self.model) if p.requires_grad]
        self.projectors = {
            name: SoftProjector(layer, [self.projector(key) for key in layer.keys])
            for name, layer in self.layers.items()
        }
        for p in frozen:
            p.requires_grad_(False)
        try:
            with projecting(self.layers, self.projectors):
                yield
        finally:
            for p in frozen:
                p.requires_grad_(True)

    @torch.no_grad()
    def after_task(self, t: int, task: Task) -> None:
        """Add the outer products of the mean inputs."""
        gram = {key: value.clone() for key, value in self.gram.items()}

        def listen(layer: Layer):
            def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                mean = args[0].double().mean(0, keepdim=True)
                for key, columns in zip(layer.keys, input_columns(layer, mean), strict=True):
                    gram[key].addmm_(columns, columns.T)

            return hook

        order = torch.randperm(len(task.train.labels), generator=generator(self.options.seed, "owm", t))
        self.model.eval()
        handles = [layer.module.register_forward_pre_hook(listen(layer)) for layer in self.layers.values()]
        try:
            for index in order.to(task.train.labels.device).split(self.options.batch_size_train):
                self.model(task.train.images[index], t)
        finally:
            for handle in handles:
                handle.remove()
        self.gram = gram

    def memory_floats(self) -> int:
        """Σ d²."""
        return sum(value.numel() for value in self.gram.values())

    def state_dict(self) -> dict[str, Any]:
        """Σ x̄ x̄ᵀ."""
        return {"gram": dict(self.gram)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved Σ x̄ x̄ᵀ."""
        self.gram = {key: value.to(self.gram[key]) for key, value in state["gram"].items()}


class SoftProjector(LayerProjector):
    """A LayerProjector whose matrices P, one for each group, are given."""

    def __init__(self, layer: Layer, matrices: list[Tensor]) -> None:
        weight = layer.module.weight
        self.groups = [Projector(matrix.new_zeros(len(matrix), 0), weight.dtype, route="dense") for matrix in matrices]
        for projector, matrix in zip(self.groups, matrices, strict=True):
            projector.factor = projector.factor_t = matrix.to(weight).contiguous()  # symmetric
