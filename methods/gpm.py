"""Gradient Projection Memory (Saha, Garg and Roy, ICLR 2021, arXiv 2103.09762, Algorithm 1)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from engine.method import Method
from engine.options import Options, defaults
from engine.seeds import generator, random_order
from engine.task import Split, Task, batches
from gradproj import GradientProjectionMemory
from gradproj.errors import FullLayerWarning, InputError
from gradproj.layers import Layer
from gradproj.projection import LayerProjector, layer_projector

Forward = Callable[[Tensor], Tensor]


class GPM(Method):
    """SGD whose steps leave the inputs of earlier tasks alone.

    From the second task on each layer's gradient is projected orthogonally to its basis, G ← G - (G M) Mᵀ (Eqs. 6-7),
    and normalisation parameters are frozen. After each task the basis grows by the directions that hold the fraction
    ε of the energy of the layer's inputs (Eqs. 5, 8 and 9). Heads are not protected: each belongs to one task.

    Successors change one of three moments: which `projector` a layer's gradient goes through, what the network as
    `testing` sees it computes, and what they `remember` of a task.

    Stores Σ d·k floats over the layers' bases.

    Attributes:
        embeddings: whether it can remember rows of an embedding, which have no basis.
    """

    name, title, place = "gpm", "GPM", 0
    reads = ("threshold", "threshold_step", "n_samples", "samples")
    plain_step, embeddings = True, True
    state = ("memory",)

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        rule = "released" if options.protocol == "released" else "paper"
        self.memory = GradientProjectionMemory(model, exclude=self.task_module_names, rank_rule=rule, exact=True)
        names = list(self.memory.layers)
        tables = [key for key, basis in self.memory.bases.items() if basis.ndim == 1]
        if tables and not self.embeddings:
            raise InputError(f"{self.name} needs layers with a basis, and embeddings have none: {', '.join(tables)}")
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
        with self.memory.protect(projector=self.projector) as self.projectors:
            yield

    def projector(self, layer: Layer) -> LayerProjector:
        """What a layer's gradient goes through: G ← G - (G M) Mᵀ."""
        return layer_projector(layer, self.memory.bases)

    def after_task(self, t: int, task: Task) -> None:
        """Remember what the task uses of the network as it is tested."""
        images, samples = self.representative(t, task.train)
        with self.testing(t), warnings.catch_warnings():
            warnings.simplefilter("ignore", FullLayerWarning)  # each summary says how full layers are
            self.remember(t, lambda batch: self.model(batch, t), images, samples)

    def remember(self, t: int, forward: Forward, images: Iterable[Tensor], samples: dict[str, int]) -> None:
        """Extend the bases to the fraction ε of the energy of the layers' inputs."""
        self.memory.update(forward, images, self.epsilon(t), samples)

    def epsilon(self, t: int) -> dict[str, float]:
        """ε by layer name after task t."""
        step = self.options.threshold_step * t
        return {name: min(1.0, value + step) for name, value in self.thresholds.items()}

    def representative(self, t: int, train: Split) -> tuple[Iterable[Tensor], dict[str, int]]:
        """Batches of random training images, and how many of each every layer uses."""
        order = random_order(train.labels, generator(self.options.seed, "samples", t))
        if self.options.n_samples != "all":
            return [train.images[order[: self.options.n_samples]]], self.samples
        # Batches of the usual size, so that batch statistics mean the same as with few samples.
        usual = defaults(type(self.options), type(self), self.options.protocol)["n_samples"]
        return Batches(train.images, order, self.options.batch_size_test if usual == "all" else usual), {}


@dataclass(frozen=True)
class Batches:
    """Images in some order, a batch at a time, as often as anybody goes through them."""

    images: Tensor
    order: Tensor
    size: int

    def __iter__(self) -> Iterator[Tensor]:
        return (self.images[self.order[start:stop]] for start, stop in batches(len(self.order), self.size))


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
