"""Flattening Sharpness for Dynamic GPM, FS-DGPM (Deng et al., NeurIPS 2021, arXiv 2110.04593)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from engine.options import Options, flag
from engine.seeds import generator
from engine.task import Split, Task
from gradproj.normalization import frozen, normalization_parameters
from gradproj.subspace import extend_basis
from methods.gpm import GPM, Forward
from methods.parts.perturbation import computing_with
from methods.parts.replay import Replay, has_batch_statistics, mixed_loss
from methods.parts.scaled import scaled_parts

STEEPNESS = 10  # of λ = σ(10 s)
LARGEST_ENTRY, LARGEST_NORM = 2.0, 2.0  # of a gradient uphill, and of those stepped on


class FSDGPM(GPM, Replay):
    """GPM by degrees that it learns, at weights that look uphill, with replay.

    A step, on a batch x and as many images x' of the memory: from w_0 = w, for the halves h = 1, 2 of x,

        g = ∇L(w_{h-1}; x_h), in layers with a basis g ← g V diag(λ) Vᵀ,   w_h = w_{h-1} + η₁ clip(g, ±2),

    then the gradient of (L(w_1; x ∪ x') + L(w_2; x ∪ x')) / 2 by w and by s, where λ = σ(10 s) and s = 1 as a task
    begins. Both are cut to a norm of 2; w's are projected, G ← G - G V diag(λ) Vᵀ, and s takes steps of η₂ with a
    momentum of 0.9. `fs_order` 1 takes g as constant in w, 2 differentiates through it.

    After each task V is made anew, by GPM's Eq. 5, from `n_samples` images of the memory.

    Differs: the memory is filled at the end of a task (see Replay), where the paper fills it in the task's first epoch;
    networks, images and epochs are GPM's, where the paper has others: docs/differences.md. η₁, the size of the memory
    and ε are the paper's, those of CIFAR-100 where it has none.

    Stores the images of the memory, and Σ d·k floats over the layers.
    """

    name, title, place = "fs_dgpm", "FS-DGPM", 16
    flags = Replay.flags | {
        "fs_eta1": flag(0.001, "η₁, rate of the steps uphill; falls with lr", minimum=0),
        "fs_eta2": flag(0.01, "η₂, rate of s, which says how firmly each direction is held; falls with lr", above=0),
        "fs_order": flag(2, "1: gradients uphill are constants. 2: they are differentiated through", choices=(1, 2)),
    }
    defaults = {
        "momentum": 0.9,
        "memory_images": 1000,
        "pmnist": {
            "threshold": (0.99,),
            "threshold_step": 0.0005,
            "memory_images": 200,
            "fs_eta1": 0.05,
            "fs_order": 1,
        },
        "cifar100_superclass": {"fs_eta1": 0.01},
    }
    plain_step = False
    state = ("memory", "softness", *Replay.state)

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        self.softness: dict[str, nn.Parameter] = {}  # s (k,) by key, from the second task on, while one is learned

    def before_task(self, t: int, task: Task) -> None:
        dtype = next(self.model.parameters()).dtype
        bases = self.memory.bases if t else {}
        self.softness = {key: nn.Parameter(basis.new_ones(basis.shape[1], dtype=dtype)) for key, basis in bases.items()}

    def parameters(self, t: int) -> list[nn.Parameter]:
        return [*super().parameters(t), *self.softness.values()]

    def optimizer(self, t: int, lr: float) -> torch.optim.Optimizer:
        groups = [{"params": super().parameters(t)}]
        if self.softness:
            groups.append({"params": list(self.softness.values()), "lr": self.options.fs_eta2, "momentum": 0.9})
        return torch.optim.SGD(groups, lr=lr, momentum=self.options.momentum)

    @contextmanager
    def learning(self, t: int, task: Task) -> Iterator[None]:
        dtype = next(self.model.parameters()).dtype
        self.directions = {key: self.memory.bases[key].to(dtype) for key in self.softness}  # V (d, k)
        with frozen(normalization_parameters(self.model, self.task_module_names) if t else ()):
            yield

    def backward(self, images: Tensor, labels: Tensor, t: int) -> Tensor:
        everything = [images, labels, torch.full((len(labels),), t)]
        if len(self.reservoir):
            n = self.options.replay_batch or len(labels)
            drawn = self.reservoir.draw(n, has_batch_statistics(self.model), self.generator)
            everything = [torch.cat(pair) for pair in zip(everything, drawn, strict=True)]
        n_parts = 2 if len(labels) > 3 else 1  # BatchNorm refuses a single image
        weights = {p: p for p in super().parameters(t)}
        losses = []
        for part in zip(images.chunk(n_parts), labels.chunk(n_parts), strict=True):
            weights = self.uphill(weights, *part, t)
            with computing_with(self.model, weights), self.precision(images.device):
                losses.append(mixed_loss(self, *everything))
        loss = sum(losses) / len(losses)
        loss.backward()
        clip_grad_norm_(list(weights), LARGEST_NORM)
        clip_grad_norm_(self.softness.values(), LARGEST_NORM)
        with torch.no_grad():
            for p, held in self.held({p: p.grad for p in weights}).items():
                p.grad = p.grad - held
        return loss.detach()

    def uphill(
        self, weights: dict[nn.Parameter, Tensor], images: Tensor, labels: Tensor, t: int
    ) -> dict[nn.Parameter, Tensor]:
        """w_h from w_{h-1}, by parameter."""
        with computing_with(self.model, weights), self.precision(images.device):
            loss = self.loss(images, labels, t)
        second_order = self.options.fs_order == 2
        found = torch.autograd.grad(loss, list(weights.values()), create_graph=second_order, allow_unused=True)
        gradients = dict(zip(weights, found, strict=True))
        gradients |= self.held(gradients)
        rate = self.options.fs_eta1 * self.lr / self.options.lr
        return {
            p: w if gradients[p] is None else w + rate * gradients[p].clamp(-LARGEST_ENTRY, LARGEST_ENTRY)
            for p, w in weights.items()
        }

    def held(self, gradients: Mapping[nn.Parameter, Tensor | None]) -> dict[nn.Parameter, Tensor]:
        """G V diag(λ) Vᵀ of the layers, from the second task on, by parameter."""
        firmness = {key: torch.sigmoid(STEEPNESS * s) for key, s in self.softness.items()}
        return scaled_parts(self.memory.layers.values(), gradients, self.directions, firmness) if firmness else {}

    def after_task(self, t: int, task: Task) -> None:
        self.softness = {}
        Replay.after_task(self, t, task)
        super().after_task(t, task)

    def remember(self, t: int, forward: Forward, images: Iterable[Tensor], samples: dict[str, int]) -> None:
        gathered, epsilon = self.memory.gather(forward, images, samples), self.epsilon(t)
        bases = {
            key: extend_basis(self.memory.bases[key][:, :0], gathered[key], epsilon[layer.name])
            for layer in self.memory.layers.values()
            for key in layer.keys
        }
        self.memory.replace(bases)

    def representative(self, t: int, train: Split) -> tuple[Iterable[Tensor], dict[str, int]]:
        n = len(self.reservoir) if self.options.n_samples == "all" else self.options.n_samples
        images, _, _ = self.reservoir.draw(n, False, generator(self.options.seed, "samples", t))
        return [images], self.samples
