"""Flattening Sharpness for Dynamic GPM, FS-DGPM (Deng et al., NeurIPS 2021, arXiv 2110.04593)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_

from engine.options import Options, flag
from engine.seeds import generator
from engine.task import Split, Task
from methods.gpm import GPM, Forward
from methods.parts.perturbation import computing_with
from methods.parts.replay import Replay, has_batch_statistics, mixed_loss
from methods.parts.scaled import Scaled, calls_of_few_rows

STEEPNESS = 10  # of λ = σ(10 s)
LARGEST_ENTRY, LARGEST_NORM = 2.0, 2.0  # of a gradient uphill, and of those stepped on

Weights = dict[nn.Parameter, Tensor]


class FSDGPM(GPM, Replay):
    """GPM with projections of learned softness, steps on weights moved uphill (as in SAM), and replay.

    A step, on a batch x and as many images x' of the memory: from w_0 = w, for the halves h = 1, 2 of x,

        g = ∇L(w_{h-1}; x_h), in layers with a basis g ← g V diag(λ) Vᵀ,   w_h = w_{h-1} + η₁ clip(g, ±2),

    then the gradient of (L(w_1; x ∪ x') + L(w_2; x ∪ x')) / 2 by w and by s, where λ = σ(10 s) and s = 1 as a task
    begins. Both are cut to a norm of 2; w's are projected, G ← G - G V diag(λ) Vᵀ, and s takes steps of η₂ with a
    momentum of 0.9. `fs_order` 1 takes g as constant in w, 2 differentiates through it.

    After each task V is made anew, by GPM's Eq. 5, from `n_samples` images of the memory.

    Differs: the memory is filled at the end of a task (see Replay), where the paper fills it in the task's first epoch;
    networks, images and epochs are GPM's, where the paper has others: docs/differences.md. η₁, the size of the memory
    and ε are the paper's, those of CIFAR-100 where it has none; permuted MNIST's rate was found by search
    (docs/successors.md).

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
            "lr": 0.001,
            "threshold": (0.99,),
            "threshold_step": 0.0005,
            "memory_images": 200,
            "fs_eta1": 0.05,
            "fs_order": 1,
        },
        "cifar100_superclass": {"fs_eta1": 0.01},
    }
    plain_step, embeddings, learns_when_full = False, False, True
    state = ("memory", "softness", *Replay.state)

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        self.softness: dict[str, nn.Parameter] = {}  # s (k,) by key, from the second task on, while one is learned

    def before_task(self, t: int, task: Task) -> None:
        like = next(self.model.parameters())
        self.softness = {key: nn.Parameter(like.new_ones(k)) for key, k in self.memory.columns.items() if t}

    def parameters(self, t: int) -> list[nn.Parameter]:
        return [*super().parameters(t), *self.softness.values()]

    def optimizer(self, t: int, lr: float) -> torch.optim.Optimizer:
        groups = [{"params": super().parameters(t)}]
        if self.softness:
            groups.append({"params": list(self.softness.values()), "lr": self.options.fs_eta2, "momentum": 0.9})
        return torch.optim.SGD(groups, lr=lr, momentum=self.options.momentum)

    @contextmanager
    def learning(self, t: int, task: Task) -> Iterator[None]:
        self.directions = {key: self.memory.bases[key].to(s) for key, s in self.softness.items()}  # V (d, k)
        with self.frozen_normalization(t):
            yield

    def backward(self, images: Tensor, labels: Tensor, t: int) -> Tensor:
        everything = [images, labels, torch.full((len(labels),), t)]
        if len(self.reservoir):
            n = self.options.replay_batch or len(labels)
            drawn = self.reservoir.draw(n, has_batch_statistics(self.model), self.generator)
            everything = [torch.cat(pair) for pair in zip(everything, drawn, strict=True)]
        n_parts = 2 if len(labels) > 3 else 1  # BatchNorm refuses a single image
        weights, losses = {p: p for p in super().parameters(t)}, []
        for part in zip(images.chunk(n_parts), labels.chunk(n_parts), strict=True):
            weights = self.uphill(weights, *part, t)
            with computing_with(self.model, weights), self.precision(images.device):
                losses.append(mixed_loss(self, *everything))
        loss = sum(losses) / len(losses)
        loss.backward()
        clip_grad_norm_(list(weights), LARGEST_NORM)
        clip_grad_norm_(self.softness.values(), LARGEST_NORM)
        if self.softness:
            with torch.no_grad():
                held = self.scaled.gradients(self.memory.layers.values(), {p: p.grad for p in weights})
                for p, part in held.items():
                    p.grad -= part
        return loss.detach()

    def uphill(self, weights: Weights, images: Tensor, labels: Tensor, t: int) -> Weights:
        """w_h from w_{h-1}, by parameter."""
        layers, second = list(self.memory.layers.values()) if self.softness else [], self.options.fs_order == 2
        trained = [layer for layer in layers if all(p is None or p in weights for p in layer.parameters)]
        attention = sdpa_kernel(SDPBackend.MATH) if second else nullcontext()  # others differentiate once only
        with calls_of_few_rows(trained) as calls, attention, computing_with(self.model, weights):
            with self.precision(images.device):
                loss = self.loss(images, labels, t)
        by_rows = {p for call in calls for p in call.layer.parameters}
        others = {p: w for p, w in weights.items() if p not in by_rows}
        wanted = [*others.values(), *(call.zeros for call in calls)]
        used = torch.autograd.grad(loss, wanted, create_graph=second, allow_unused=True)
        gradients = {p: g for p, g in zip(others, used, strict=False) if g is not None}
        if self.softness:
            gradients |= self.scaled.gradients(layers, gradients)
        for call, deltas in zip(calls, used[len(others) :], strict=True):
            if deltas is not None:
                call = call if second else call._replace(inputs=call.inputs.detach())
                gradients |= self.scaled.of_call(call, deltas)
        rate = self.options.fs_eta1 * self.lr / self.options.lr
        return weights | {p: weights[p] + rate * g.clamp(-LARGEST_ENTRY, LARGEST_ENTRY) for p, g in gradients.items()}

    @property
    def scaled(self) -> Scaled:
        """G ↦ G V diag(λ) Vᵀ."""
        return Scaled(self.directions, {key: torch.sigmoid(STEEPNESS * s) for key, s in self.softness.items()})

    def after_task(self, t: int, task: Task) -> None:
        self.softness = {}
        Replay.after_task(self, t, task)
        super().after_task(t, task)

    def remember(self, t: int, forward: Forward, images: Iterable[Tensor], samples: dict[str, int]) -> None:
        self.memory.bases = {key: basis[:, :0] for key, basis in self.memory.bases.items()}  # V is made anew
        super().remember(t, forward, images, samples)

    def representative(self, t: int, train: Split) -> tuple[Iterable[Tensor], dict[str, int]]:
        n = len(self.reservoir) if self.options.n_samples == "all" else self.options.n_samples
        images, _, tasks = self.reservoir.draw(n, False, generator(self.options.seed, "samples", t))
        if not has_batch_statistics(self.model):
            return [images], self.samples
        # A test batch is of one task, and BatchNorm normalises by it.
        parts = [images[(tasks == j).to(images.device)] for j in tasks.unique().tolist()]
        parts = [part for part in parts if len(part) > 1] or parts
        return parts, {name: -(-count // len(parts)) for name, count in self.samples.items()}
