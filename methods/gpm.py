"""Gradient Projection Memory (Saha, Garg and Roy, ICLR 2021, arXiv 2103.09762, Algorithm 1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine.method import Method, task_heads
from engine.options import Options
from engine.seeds import generator
from engine.task import Split, Task, batches
from gradproj.errors import InputError
from gradproj.memory import GradientProjectionMemory


class GPM(Method):
    """SGD whose steps leave the inputs of earlier tasks alone.

    From the second task on each layer's gradient is projected orthogonally to its basis, G ← G - (G M) Mᵀ (Eqs. 6-7),
    and normalisation parameters are frozen. After each task the basis grows by the directions that hold the fraction
    ε of the energy of the layer's inputs (Eqs. 5, 8 and 9). Heads are not protected: each belongs to one task.

    Hyperparameters: `threshold` (ε), `threshold_step` (added to ε with every task), `n_samples` and `samples` (the
    images whose inputs are decomposed), the paper's for each benchmark in its script.

    Stores Σ d·k floats over the layers' bases.
    """

    name = "gpm"

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        self.memory = GradientProjectionMemory(model, task_heads(model), rank_rule=options.protocol)
        names = list(self.memory.layers)
        if len(options.threshold) not in (1, len(names)):
            raise InputError(
                f"threshold has {len(options.threshold)} values; give one, or one for each of the {len(names)} layers: "
                f"{', '.join(names)}"
            )
        values = options.threshold * (len(names) if len(options.threshold) == 1 else 1)
        self.thresholds = dict(zip(names, values, strict=True))
        self.samples = samples_by_layer(options.samples, names)

    @contextmanager
    def learning(self, t: int, task: Task) -> Iterator[None]:
        """Train with projected gradients."""
        with self.memory.protect() as self.projectors:
            yield

    def after_task(self, t: int, task: Task) -> None:
        """Extend the bases by what the task uses."""
        epsilon = {name: min(1.0, value + self.options.threshold_step * t) for name, value in self.thresholds.items()}
        images, samples = self.representative(t, task.train)
        self.memory.update(lambda batch: self.model(batch, t), images, epsilon, samples)

    def representative(self, t: int, train: Split) -> tuple[Iterable[Tensor], dict[str, int]]:
        """Batches of random training images, and how many of each every layer uses."""
        order = torch.randperm(len(train.labels), generator=generator(self.options.seed, "samples", t))
        order = order.to(train.images.device)
        if self.options.n_samples != "all":
            return [train.images[order[: self.options.n_samples]]], self.samples
        # Batches of the usual size, so that batch statistics mean the same as with few samples.
        size = next(field.default for field in dataclasses.fields(self.options) if field.name == "n_samples")
        return (train.images[order[start:stop]] for start, stop in batches(len(order), size)), {}

    def memory_floats(self) -> int:
        """Σ d·k."""
        return sum(basis.numel() for basis in self.memory.bases.values())

    def state_dict(self) -> dict[str, Any]:
        """The bases."""
        return self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over saved bases."""
        self.memory.load_state_dict(state)


def samples_by_layer(samples: dict[str, int], layers: list[str]) -> dict[str, int]:
    """Sample counts by layer name, from counts by name or by the beginning of names; the longest match counts.

    Raises:
        InputError: an entry matches no layer.
    """
    matches = {name: [layer for layer in layers if f"{layer}.".startswith(f"{name}.")] for name in samples}
    for name, matched in matches.items():
        if not matched:
            raise InputError(f"samples names {name!r}, which is no layer; the layers are: {', '.join(layers)}")
    by_length = sorted(samples, key=len)
    return {layer: samples[name] for name in by_length for layer in matches[name]}
