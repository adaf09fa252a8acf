"""Hard Attention to the Task (Serrà et al., ICML 2018, arXiv 1801.01423)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.method import Method
from engine.options import Options, flag
from engine.seeds import generator
from engine.task import Task
from gradproj.errors import InputError
from gradproj.layers.convolution import ConvolutionLayer
from gradproj.layers.linear import LinearLayer
from methods.parts.modules import refuse_other_kinds
from methods.parts.units import find_units

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
    but the heads; which units feed which layer is found when the first task begins (methods/parts/units.py). The
    embeddings become parameters of the model (`hat_embeddings`), and so part of its weights on disk.

    All hyperparameters are the paper's, for every benchmark.

    Stores the embeddings of all tasks and one cumulative gate for each unit.
    """

    name, title, place = "hat", "HAT", 8
    flags = {
        "hat_smax": flag(400.0, "slope of the gates at test; in training it begins at its inverse", minimum=1),
        "hat_sparsity": flag(0.75, "weight of the penalty on units that no earlier task uses", minimum=0),
    }
    defaults = {"lr": 0.05}
    heads = "many"
    task_identity = True
    state = ("past", "norms", "sources")

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        options = self.options
        self.layers = self.shared_layers()
        refuse_other_kinds(self.name, self.layers, (LinearLayer, ConvolutionLayer))
        self.slope, self.step, self.n_batches, self.task = options.hat_smax, 0, 1, 0
        self.norms: dict[str, str] = {}  # by layer, the normalisation that completes its units
        self.sources: dict[str, list[str]] = {}  # by layer, the layers whose units feed it; none: the images
        self.past: dict[str, Tensor] = {}  # a^{<t} by layer
        self.embeddings: dict[str, nn.Parameter] = {}
        for name, layer in self.layers.items():
            if layer.groups > 1:
                raise InputError(f"hat cannot gate layer {name}: it is a convolution in groups")
            weight, random = layer.module.weight, generator(options.seed, "hat", name)
            start = torch.randn(len(self.task_modules), len(weight), generator=random)
            self.embeddings[name] = nn.Parameter(start.to(weight))
            self.past[name] = weight.new_zeros(len(weight))
        model.hat_embeddings = nn.ParameterList(self.embeddings.values())
        model.register_forward_pre_hook(self.see_task, with_kwargs=True)

    def install(self, norms: dict[str, str], sources: dict[str, list[str]]) -> None:
        """Gate the units; refuse models with shared parameters that gates would not protect."""
        self.norms, self.sources = norms, sources
        modules = dict(self.model.named_modules())
        protected = {*norms.values(), *self.layers, "hat_embeddings"}
        of_tasks = {id(p) for owned in self.task_modules for module in owned for p in module.parameters()}
        for name, p in self.model.named_parameters():
            if name.rpartition(".")[0] not in protected and id(p) not in of_tasks:
                raise InputError(f"hat cannot protect {name}: it belongs to no unit of a Linear or convolution")
        for name in self.layers:
            modules[norms.get(name, name)].register_forward_hook(partial(self.apply_gate, name))

    def see_task(self, _model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """The model is called for a task."""
        self.task = kwargs["task"] if "task" in kwargs else args[1]

    def gate(self, name: str) -> Tensor:
        """a = σ(s e_t) (units,) of a layer, for the task that the model is called for."""
        slope = self.slope if self.model.training else self.options.hat_smax
        return torch.sigmoid(slope * self.embeddings[name][self.task])

    def apply_gate(self, name: str, _module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        """a ⊙ h."""
        return output * self.gate(name).view(1, -1, *[1] * (output.ndim - 2))

    @contextmanager
    def learning(self, t: int, task: Task) -> Iterator[None]:
        """Count the batches of an epoch, which the slope follows."""
        if not self.sources:
            self.install(
                *find_units(self.model, self.layers, task.train.images[:2], lambda images: self.model(images, t))
            )
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
        free = {name: 1 - past for name, past in self.past.items()}
        used = sum((self.gate(name) * free[name]).sum() for name in self.layers)
        return loss + self.options.hat_sparsity * used / sum(f.sum() for f in free.values()).clamp(min=1e-8)

    def backward(self, images: Tensor, labels: Tensor, t: int) -> Tensor:
        loss = super().backward(images, labels, t)
        self.scale_gradients(t)
        return loss

    @torch.no_grad()
    def scale_gradients(self, t: int) -> None:
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
            if self.sources[name]:
                units = torch.stack([self.past[source] for source in self.sources[name]]).amax(0)
                inside = units.repeat_interleave(len(inside) // len(units))  # flattened maps: channel by channel
            in_use = torch.minimum(out[:, None], inside[None, :])  # (units, inputs)
            yield weight, 1 - in_use.view(*in_use.shape, *[1] * (weight.ndim - 2))
            norm = self.model.get_submodule(self.norms[name]) if name in self.norms else None
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
        return sum(value.numel() for values in (self.embeddings, self.past) for value in values.values())

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        begun = bool(self.sources)
        super().load_state_dict(saved)
        if self.sources and not begun:
            self.install(self.norms, self.sources)
