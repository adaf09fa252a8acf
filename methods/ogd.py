"""Orthogonal Gradient Descent (Farajtabar et al., AISTATS 2020, arXiv 1910.07104, Algorithm 1)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.method import Method
from engine.options import Options
from engine.seeds import generator
from engine.task import Task
from gradproj.errors import InputError
from gradproj.projection import full_float32
from gradproj.representation import Layer, find_layers, input_columns


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

    Hyperparameters: `ogd_samples` (200 a task, the paper's number). Outputs stay to first order only, so steps must be
    small: the learning rate is the paper's 0.001 unless --lr says another.

    Stores `ogd_samples` · Σ (o + d) floats a task: 238,800 for permuted MNIST's network, where V would take 18 million.
    """

    name = "ogd"
    learning_rate = 0.001

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        if hasattr(model, "heads"):
            raise InputError(
                f"ogd is for one head that all tasks share; {type(model).__name__} has a head for each task"
            )
        self.layers = {name: layer for name, layer in find_layers(model).items() if isinstance(layer.module, nn.Linear)}
        covered = {id(p) for layer in self.layers.values() for p in layer.module.parameters()}
        for name, p in model.named_parameters():
            if id(p) not in covered:
                raise InputError(f"ogd needs a network of Linear layers only; {name} is another layer's")
        self.factors: dict[str, Factors] = {}
        self.inverse: Tensor | None = None  # (Vᵀ V)⁺ (m, m)

    @torch.no_grad()
    def after_backward(self, t: int) -> None:
        """Project the gradient."""
        if self.inverse is None:
            return
        with full_float32(self.inverse):
            self.project()

    def project(self) -> None:
        """g ← g - V (Vᵀ V)⁺ Vᵀ g."""
        gradients = {name: _rows(layer) for name, layer in self.layers.items() if layer.module.weight.grad is not None}
        products = sum(
            ((self.factors[name].inputs @ G.T) * self.factors[name].deltas).sum(1) for name, G in gradients.items()
        )
        coefficients = self.inverse @ products
        for name, G in gradients.items():
            deltas, inputs = self.factors[name]
            G = G.addmm((deltas * coefficients[:, None]).T, inputs, alpha=-1)  # (o, d)
            module = self.layers[name].module
            module.weight.grad.copy_(G[:, : module.in_features])
            if module.bias is not None:
                module.bias.grad.copy_(G[:, -1])

    def after_task(self, t: int, task: Task) -> None:
        """Store the gradients of some of the task's logits."""
        order = torch.randperm(len(task.train.labels), generator=generator(self.options.seed, "samples", t))
        chosen = order[: self.options.ogd_samples].to(task.train.labels.device)
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
            def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                if layer.name in inputs or args[0].ndim != 2:
                    raise InputError(
                        f"ogd needs layers that see one vector an image, once; {layer.name} is another kind"
                    )
                inputs[layer.name] = input_columns(layer, args[0].detach())[0].T.contiguous()
                outputs[layer.name] = output

            return hook

        with ExitStack() as hooks:
            for layer in self.layers.values():
                hooks.enter_context(layer.module.register_forward_hook(listen(layer)))
            self.model.eval()
            logits = self.model(images, t)
        deltas = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), list(outputs.values()))
        return {name: Factors(delta, inputs[name]) for name, delta in zip(outputs, deltas, strict=True)}

    def memory_floats(self) -> int:
        """The factors; the inverse follows from them."""
        return sum(part.numel() for factors in self.factors.values() for part in factors)

    def state_dict(self) -> dict[str, Any]:
        """The factors by layer name."""
        return {"factors": {name: factors._asdict() for name, factors in self.factors.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over saved factors."""
        self.factors = {
            name: Factors(**{part: value.to(self.layers[name].module.weight.device) for part, value in parts.items()})
            for name, parts in state["factors"].items()
        }
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


def _rows(layer: Layer) -> Tensor:
    """The gradient of [W, b] (o, d)."""
    module = layer.module
    return module.weight.grad if module.bias is None else torch.cat([module.weight.grad, module.bias.grad[:, None]], 1)
