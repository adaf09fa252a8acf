"""Orthogonal Gradient Descent (Farajtabar et al., AISTATS 2020, arXiv 1910.07104, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.method import Method
from engine.options import Options, flag
from engine.seeds import generator, random_order
from engine.task import Task
from gradproj.errors import InputError
from gradproj.layers import Layer, find_layers
from gradproj.projection import full_float32


class Factors(NamedTuple):
    """Gradients of one layer's [W, b], one for each stored image: the i-th is deltas[i] inputs[i]ᵀ."""

    deltas: Tensor  # (m, o) gradient of the image's logit by the layer's output
    inputs: Tensor  # (m, d) the layer's input


class OGD(Method):
    """SGD orthogonal to the gradients of old images' logits, so that these outputs stay, to first order.

    After each task, for `ogd_samples` random training images (x, y) the gradient v = ∇_θ f_y(x) of the true class's
    logit (the paper's OGD-GTL) joins V, and a step takes g ← g - V (Vᵀ V)⁺ Vᵀ g: what an orthonormal basis of the
    span by Gram-Schmidt, as in the paper, would leave of g.

    The paper stores V, a whole network for each image. But in a network of Linear layers an image's gradient is an
    outer product for each layer, δ xᵀ, of which only the two vectors are kept. Then with the layers' gradients G of g
    (Vᵀ V)_ij = Σ_layers (δ_i · δ_j)(x_i · x_j), (Vᵀ g)_i = Σ_layers δ_iᵀ G x_i and V c = Σ_i c_i δ_i x_iᵀ are matrix
    products of the size of the factors.

    For single-head benchmarks only, as in the paper's comparison, and networks whose every parameter is a Linear's.

    Outputs stay to first order only, so steps must be small: the learning rate is the paper's 0.001.

    Stores `ogd_samples` · Σ (o + d) floats a task: 238,800 for permuted MNIST's network, where V would take 18 million.
    """

    name, title, place = "ogd", "OGD", 9
    flags = {
        "ogd_samples": flag(200, "images of each task whose logit gradients are stored; the paper's number", above=0)
    }
    defaults = {"lr": 0.001}
    heads = "one"
    state = ("factors",)

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        self.layers = {name: layer for name, layer in find_layers(model).items() if isinstance(layer.module, nn.Linear)}
        covered = {id(p) for layer in self.layers.values() for p in layer.module.parameters()}
        for name, p in model.named_parameters():
            if id(p) not in covered:
                raise InputError(f"ogd needs a network of Linear layers only; {name} is another layer's")
        self.factors: dict[str, Factors] = {}
        self.inverse: Tensor | None = None  # (Vᵀ V)⁺ (m, m)

    def backward(self, images: Tensor, labels: Tensor, t: int) -> Tensor:
        loss = super().backward(images, labels, t)
        if self.inverse is not None:
            with full_float32(self.inverse):
                self.project()
        return loss

    @torch.no_grad()
    def project(self) -> None:
        """g ← g - V (Vᵀ V)⁺ Vᵀ g."""
        gradients = {}  # G of [W, b] (o, d)
        for name, layer in self.layers.items():
            weight, bias = layer.parameters
            if weight.grad is not None:
                gradients[name] = layer.rows(weight.grad, None if bias is None else bias.grad)
        products = sum(
            ((self.factors[name].inputs @ G.T) * self.factors[name].deltas).sum(1) for name, G in gradients.items()
        )
        coefficients = self.inverse @ products
        for name, G in gradients.items():
            deltas, inputs = self.factors[name]
            G = G.addmm((deltas * coefficients[:, None]).T, inputs, alpha=-1)  # (o, d)
            layer = self.layers[name]
            for parameter, projected in zip(layer.parameters, layer.from_rows(G), strict=True):
                if parameter is not None:
                    parameter.grad.copy_(projected)

    def after_task(self, t: int, task: Task) -> None:
        """Store the gradients of some of the task's logits."""
        order = random_order(task.train.labels, generator(self.options.seed, "samples", t))
        chosen = order[: self.options.ogd_samples]
        new = self.logit_gradients(task.train.images[chosen], task.train.labels[chosen], t)
        self.factors = {
            name: Factors(*map(torch.cat, zip(self.factors[name], factors, strict=True))) if t else factors
            for name, factors in new.items()
        }
        self.inverse = pseudo_inverse(self.factors)

    def logit_gradients(self, images: Tensor, labels: Tensor, t: int) -> dict[str, Factors]:
        """The gradient of each image's true logit, by layer name; one backward pass serves all images."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def listen(layer: Layer):
            def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
                (given,) = (*args, *kwargs.values())
                if layer.name in inputs or given.ndim != 2:
                    raise InputError(
                        f"ogd needs layers that see one vector an image, once; {layer.name} is another kind"
                    )
                inputs[layer.name] = layer.columns(given.detach())[0].T.contiguous()
                outputs[layer.name] = output

            return hook

        with ExitStack() as hooks:
            for layer in self.layers.values():
                hooks.enter_context(layer.module.register_forward_hook(listen(layer), with_kwargs=True))
            self.model.eval()
            logits = self.model(images, t)
        deltas = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), list(outputs.values()))
        return {name: Factors(delta, inputs[name]) for name, delta in zip(outputs, deltas, strict=True)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.factors = {}  # those at hand would come back as Factors, the saved ones alone as dicts
        super().load_state_dict(saved)
        self.factors = {name: Factors(**parts) for name, parts in self.factors.items()}
        self.inverse = pseudo_inverse(self.factors) if self.factors else None


def pseudo_inverse(factors: dict[str, Factors]) -> Tensor:
    """(Vᵀ V)⁺ (m, m) in the factors' dtype, of the gradients V that they stand for.

    Directions that only rounding could tell from the span of the others are left out.
    """
    gram = sum(
        (f.deltas.double() @ f.deltas.double().T) * (f.inputs.double() @ f.inputs.double().T) for f in factors.values()
    )
    dtype, m = next(iter(factors.values())).inputs.dtype, len(gram)
    energies, vectors = torch.linalg.eigh(gram)
    noise = max(
        (m * torch.finfo(dtype).eps) ** 2, m * torch.finfo(torch.float64).eps
    )  # of V's entries, and of the sums
    kept = energies > noise * energies[-1]
    vectors = vectors[:, kept]
    return ((vectors / energies[kept]) @ vectors.T).to(dtype)
