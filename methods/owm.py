"""Orthogonal Weights Modification (Zeng et al., Nature Machine Intelligence 2019, arXiv 1810.01256)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine.method import Method
from engine.options import Options, flag
from engine.seeds import generator, random_order
from engine.task import Task, batches
from gradproj.errors import InputError
from gradproj.layers import Layer
from gradproj.layers.convolution import ConvolutionLayer, TransposedConvolutionLayer
from gradproj.layers.linear import LinearLayer
from gradproj.projection import LayerProjector, Projector
from gradproj.protection import projecting
from methods.parts.modules import refuse_other_kinds, refuse_other_uses


class OWM(Method):
    """SGD whose steps avoid the inputs of earlier tasks, the more the stronger the input: G ← G P for each layer.

    P follows from the layer's mean input x̄ over each batch by recursive least squares, beginning with the identity:
    k = P x̄ / (α + x̄ᵀ P x̄), P ← P - k x̄ᵀ P. That recursion is a way to invert, P = α (α I + Σ x̄ x̄ᵀ)⁻¹, in whatever
    order the x̄ come; so Σ x̄ x̄ᵀ is added up, in float64, and inverted once for each task. A convolution has an x̄ for
    each position of its patches.

    The batches are those of one pass over the training images, in random order, after the task is learned: the inputs
    of the weights that are to be kept. Normalisation parameters are frozen after the first task and heads are not
    protected, as for GPM.

    Differs: the published code lets α fall within each task; here it is one number.

    α competes with a sum over batches: with more batches a task the same α leaves less freedom.

    Stores Σ d² floats over the layers.
    """

    name, title, place = "owm", "OWM", 7
    flags = {
        "owm_alpha": flag(
            100.0,
            "α of the projector α (α I + Σ x xᵀ)⁻¹; the larger, the more directions stay free to learn in",
            above=0,
        )
    }
    plain_step = True
    state = ("gram",)

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        self.layers = self.shared_layers()
        refuse_other_kinds(self.name, self.layers, (LinearLayer, ConvolutionLayer, TransposedConvolutionLayer))
        self.gram = {  # Σ x̄ x̄ᵀ (d, d)
            key: torch.zeros(layer.input_size, layer.input_size, dtype=torch.float64, device=layer.device)
            for layer in self.layers.values()
            for key in layer.keys
        }

    def matrix(self, key: str) -> Tensor:
        """P = α (α I + Σ x̄ x̄ᵀ)⁻¹.

        Raises:
            InputError: α is so small that rounding swallows it.
        """
        gram, alpha = self.gram[key], self.options.owm_alpha
        try:
            factor = torch.linalg.cholesky(gram + alpha * torch.eye(len(gram)).to(gram))
        except torch.linalg.LinAlgError as error:
            raise InputError(f"owm_alpha is {alpha:g}; beside the inputs' energy that is nothing, give more") from error
        return alpha * torch.cholesky_inverse(factor)

    @contextmanager
    def learning(self, t: int, task: Task) -> Iterator[None]:
        """Train with gradients G P."""
        if t == 0:  # P = I
            refuse_other_uses(self.name, self.model, self.layers, lambda: self.model(task.train.images[:2], t))
            yield
            return
        self.projectors = {
            name: LayerProjector(
                layer, [Projector("dense", self.matrix(key).to(layer.all_parameters[0])) for key in layer.keys]
            )
            for name, layer in self.layers.items()
        }
        with self.frozen_normalization(t), projecting(self.projectors):
            yield

    @torch.no_grad()
    def after_task(self, t: int, task: Task) -> None:
        """Add the outer products of the mean inputs."""
        gram = {key: value.clone() for key, value in self.gram.items()}

        def listen(layer: Layer):
            def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                (inputs,) = (*args, *kwargs.values())
                mean = inputs.double().mean(0, keepdim=True)
                for key, columns in zip(layer.keys, layer.columns(mean), strict=True):
                    gram[key].addmm_(columns, columns.T)

            return hook

        order = random_order(task.train.labels, generator(self.options.seed, "owm", t))
        self.model.eval()
        with ExitStack() as hooks:
            for layer in self.layers.values():
                hooks.enter_context(layer.module.register_forward_pre_hook(listen(layer), with_kwargs=True))
            for start, stop in batches(len(order), self.options.batch_size_train):
                self.model(task.train.images[order[start:stop]], t)
        self.gram = gram
