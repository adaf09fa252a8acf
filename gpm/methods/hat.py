"""Hard Attention to the Task (Serrà et al., ICML 2018, arXiv 1801.01423)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpm.errors import InputError
from gpm.memory import Normalization
from gpm.methods.base import Method
from gpm.options import Options
from gpm.representation import find_layers
from gpm.seeds import generator
from gpm.task import Task

MOST_EMBEDDING, MOST_EXPONENT = 6.0, 50.0  # the paper's clamps: |e| <= 6, |s e| <= 50 inside cosh


class HAT(Method):
    """Each task learns which units it uses; weights between units that earlier tasks use hardly move.

    - Gates (Eq. 1): the outputs h of a layer's units (channels of a convolution) become a ⊙ h, a = σ(s e_t), with an
      embedding e_t for each task and layer. A unit is a layer together with the normalisation that follows it.
    - Slope (Eq. 4): within each epoch s rises with the batch, s = 1/s_max + (s_max - 1/s_max) (b - 1) / (B - 1); at
      test it is s_max, where gates are almost 0 or 1.
    - Cumulative gates (Eq. 2): after task t, a^{≤t} = max(a^t, a^{≤t-1}) at s_max.
    - Gradients (Eq. 3): that of the weight from unit j to unit i is multiplied by 1 - min(a_i^{<t}, a_j^{<t}), that of
      a unit's own bias and normalisation by 1 - a_i^{<t}. Images are always in use. Where several units feed one
      channel, as at a residual sum, it is in use if one of them is.
    - Embedding gradients (Eq. 5): times s_max (cosh(s e) + 1) / (s (cosh(e) + 1)), as if s had been 1; |e| <= 6.
    - Sparsity (Eq. 6): loss + c Σ a (1 - a^{<t}) / Σ (1 - a^{<t}), the sums over all units.

    For multi-head benchmarks, since the gates need to know the task at test. Hooks gate every Linear and convolution
    but the heads; which units feed a layer is read from the autograd graph of the first training batch. The embeddings
    become parameters of the model (`hat_embeddings`), and so part of its weights on disk.

    Hyperparameters: `hat_smax` (s_max), `hat_sparsity` (c). The paper's learning rate is 0.05: give --lr 0.05.

    Stores the embeddings of all tasks and one cumulative gate for each unit.
    """

    name = "hat"

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        if not hasattr(model, "heads"):
            raise InputError(
                f"hat gates units by task, so it needs a head for each task: {type(model).__name__} has one"
            )
        self.layers = find_layers(model, exclude=["heads"])
        self.norms = following_normalizations(model)
        self.check_coverage()
        self.slope, self.step, self.n_batches, self.task = options.hat_smax, 0, 1, 0
        self.sources: dict[str, list[str]] = {}  # by layer, the layers whose units feed it; none: the images
        self.gated: dict[Any, str] = {}  # by node of the autograd graph, the layer whose gated output it is
        self.past: dict[str, Tensor] = {}  # a^{<t} by layer
        self.embeddings: dict[str, nn.Parameter] = {}
        for name, layer in self.layers.items():
            weight, random = layer.module.weight, generator(options.seed, "hat", name)
            start = torch.randn(len(model.heads), len(weight), generator=random)
            self.embeddings[name] = nn.Parameter(start.to(weight))
            self.past[name] = weight.new_zeros(len(weight))
            layer.module.register_forward_pre_hook(partial(self.trace, name))
            self.norms.get(name, layer.module).register_forward_hook(partial(self.apply_gate, name))
        model.hat_embeddings = nn.ParameterList(self.embeddings.values())
        model.register_forward_pre_hook(self.see_task, with_kwargs=True)

    def check_coverage(self) -> None:
        """Refuse models with shared parameters that gates would not protect."""
        modules = [*(layer.module for layer in self.layers.values()), *self.norms.values()]
        known = {id(p) for module in modules for p in module.parameters()}
        for name, p in self.model.named_parameters():
            if id(p) not in known and not name.startswith("heads."):
                raise InputError(
                    f"hat cannot protect {name}: it is of no Linear, convolution or normalisation after one"
                )
        for name, layer in self.layers.items():
            if layer.groups > 1:
                raise InputError(f"hat cannot gate layer {name}: it is a convolution in groups")

    def see_task(self, _model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """The model is called for a task."""
        self.task = kwargs["task"] if "task" in kwargs else args[1]

    def gate(self, name: str) -> Tensor:
        """a = σ(s e_t) (units,) of a layer, for the task that the model is called for."""
        slope = self.slope if self.model.training else self.options.hat_smax
        return torch.sigmoid(slope * self.embeddings[name][self.task])

    def apply_gate(self, name: str, _module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        """a ⊙ h."""
        gated = output * self.gate(name).view(1, -1, *[1] * (output.ndim - 2))
        if len(self.sources) < len(self.layers) and gated.grad_fn is not None:
            self.gated[gated.grad_fn] = name
        return gated

    def trace(self, name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Find the gates that a layer's input comes from: walk the autograd graph back, up to the nearest gates."""
        if name in self.sources or not torch.is_grad_enabled():
            return
        nodes, visited, found = [args[0].grad_fn], {None}, set()
        while nodes:
            node = nodes.pop()
            if node in self.gated:
                found.add(self.gated[node])
            elif node not in visited:
                visited.add(node)
                nodes += [before for before, _ in node.next_functions]
        self.sources[name] = sorted(found)
        units = {len(self.past[source]) for source in found}
        if len(units) > 1 or any(self.layers[name].module.weight.shape[1] % n for n in units):
            raise InputError(f"hat cannot tell which inputs of layer {name} belong to which units of {sorted(found)}")

    @contextmanager
    def learning(self, t: int, task: Task) -> Iterator[None]:
        """Count the batches of an epoch, which the slope follows."""
        n, size = len(task.train.labels), self.options.batch_size_train
        self.n_batches = max(1, (n + size - 2) // size)  # a last batch of one image joins the one before
        self.step = 0
        yield

    def loss(self, images: Tensor, labels: Tensor, t: int) -> Tensor:
        """Cross-entropy at this batch's slope, and the price of units that no earlier task uses."""
        most = self.options.hat_smax
        done = self.step % self.n_batches / (self.n_batches - 1) if self.n_batches > 1 else 1.0
        self.slope = 1 / most + (most - 1 / most) * done
        loss = super().loss(images, labels, t)
        self.gated.clear()
        free = {name: 1 - past for name, past in self.past.items()}
        used = sum((self.gate(name) * free[name]).sum() for name in self.layers)
        return loss + self.options.hat_sparsity * used / sum(f.sum() for f in free.values()).clamp(min=1e-8)

    @torch.no_grad()
    def after_backward(self, t: int) -> None:
        """Hold back what earlier tasks use, and compensate the embeddings' gradients for the slope."""
        for parameter, factor in self.factors():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        for embedding in self.embeddings.values():
            e, s = embedding[t], self.slope
            rise = torch.cosh((s * e).clamp(-MOST_EXPONENT, MOST_EXPONENT)) + 1
            embedding.grad[t] *= self.options.hat_smax / s * rise / (torch.cosh(e) + 1)

    def factors(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Shared parameters, and what their gradients are multiplied by: 1 - min(a_i, a_j), or 1 - a_i."""
        for name, layer in self.layers.items():
            weight, out = layer.module.weight, self.past[name]
            inside = weight.new_ones(weight.shape[1])
            if self.sources.get(name):
                units = torch.stack([self.past[source] for source in self.sources[name]]).amax(0)
                inside = units.repeat_interleave(len(inside) // len(units))  # flattened maps: channel by channel
            in_use = torch.minimum(out[:, None], inside[None, :])  # (units, inputs)
            yield weight, 1 - in_use.view(*in_use.shape, *[1] * (weight.ndim - 2))
            norm = self.norms.get(name)
            own = [layer.module.bias, getattr(norm, "weight", None), getattr(norm, "bias", None)]
            yield from ((p, 1 - out) for p in own if p is not None)

    @torch.no_grad()
    def after_step(self, t: int) -> None:
        """Keep embeddings where gates can still change."""
        self.step += 1
        for embedding in self.embeddings.values():
            embedding.clamp_(-MOST_EMBEDDING, MOST_EMBEDDING)

    @torch.no_grad()
    def after_task(self, t: int, task: Task) -> None:
        """Add the task's gates to the cumulative ones."""
        self.past = {
            name: torch.maximum(past, torch.sigmoid(self.options.hat_smax * self.embeddings[name][t]))
            for name, past in self.past.items()
        }

    def memory_floats(self) -> int:
        """Embeddings and cumulative gates."""
        return sum(value.numel() for values in (self.embeddings, self.past) for value in values.values())

    def state_dict(self) -> dict[str, Any]:
        """The cumulative gates; embeddings are in the model."""
        return {"past": dict(self.past)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over saved gates."""
        self.past = {name: value.to(self.past[name]) for name, value in state["past"].items()}


def following_normalizations(model: nn.Module) -> dict[str, nn.Module]:
    """The normalisation layer defined right after a Linear or convolution and of its size, by that layer's name."""
    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    layers = find_layers(model, exclude=["heads"])
    return {
        name: after
        for (name, module), (_, after) in zip(leaves, leaves[1:], strict=False)
        if name in layers and isinstance(after, Normalization) and len(module.weight) == after.weight.numel()
    }
