"""Continual learning with backward transfer, CUBER (Lin, Yang, Fan and Zhang, NeurIPS 2022, arXiv 2211.00789)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from engine.options import Options, flag
from engine.task import Task
from gradproj.layers import Layer
from gradproj.projection import LayerProjector, full_float32, layer_projector
from methods.parts.regions import gradient_rows, layer_gradients, weight_rows
from methods.parts.side_paths import SidePath
from methods.trgp import TRGP


class CUBER(TRGP):
    """TRGP whose weights also move inside what old tasks use, where that helps them.

    - Of the regions j that TRGP chooses, those help whose own gradient G_j, kept from when task j was learned, agrees
      with the new task's G: ⟨G_j, G⟩ >= ε₂ ‖G_j‖ ‖G‖, neither of them 0. They are the paper's regime 3, other regions
      its regime 2, other old tasks its regime 1.
    - W's gradient is projected off the B_j of all old tasks but those that help, off an orthonormal basis of their sum;
      so a direction that one that helps shares with another stays closed. Q_j is learned as in TRGP, and the loss gets
      + λ Σ_j ‖(W - W_{t-1}) B_j‖ over those that help, whose gradient at 0 is 0.
    - At every step G is tested again, as it was before it is projected; a task that it no longer agrees with helps no
      more while this one is learned.

    W B_j moves on, so what old tasks compute with through it follows W. λ is not published; it was found by search on
    permuted MNIST (docs/successors.md). At test it uses the task's identity, also under a single head.

    Stores what TRGP does, and Σ o·d floats a task for its gradients.
    """

    name, title, place = "cuber", "CUBER", 15
    flags = TRGP.flags | {
        "cuber_agreement": flag(0.0, "ε₂: cosine of two tasks' gradients from which on the old one is helped"),
        "cuber_lambda": flag(0.001, "λ, weight of the distance that W moves inside what it helps", minimum=0),
    }
    defaults = TRGP.defaults | {"pmnist": {"region_images": 300}}
    graph_step = False
    state = (*TRGP.state, "gradients", "helping")

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        self.gradients: list[dict[str, Tensor]] = []  # by task and key, G (o, d) at its learned weights
        self.helping: dict[str, list[int]] = {}  # by key, the regions j in which W moves at the moment
        self.helped: dict[tuple[str, int], Tensor] = {}  # by key and j, their B_j

    def choose(self, t: int, gradients: dict[str, Tensor]) -> None:
        super().choose(t, gradients)
        self.helping = {}
        for layer in self.memory.layers.values():
            helped = {key: self.agreeing(key, gradients[key], list(self.shifts[t][key])) for key in layer.keys}
            self.helping |= helped if any(helped.values()) else {}

    def agreeing(self, key: str, gradient: Tensor, tasks: list[int]) -> list[int]:
        """Those of some old tasks whose own gradient agrees with this one (o, d)."""
        old = {j: self.gradients[j][key] for j in tasks}
        lengths = {j: (G.norm() * gradient.norm()).item() for j, G in old.items()}
        least = self.options.cuber_agreement
        return [j for j, G in old.items() if lengths[j] > 0 and (G * gradient).sum() >= least * lengths[j]]

    def projector(self, layer: Layer) -> LayerProjector:
        """None where W helps: there gradients are projected after they are tested."""
        closed = {key: [] if key in self.helping else self.closed(key) for key in layer.keys}
        return layer_projector(layer, {key: self.memory.bases[key][:, columns] for key, columns in closed.items()})

    def closed(self, key: str) -> list[int]:
        """The columns of M that hold what tasks use that are not helped."""
        helping = self.helping.get(key, [])
        return sorted({i for j, region in enumerate(self.regions) if j not in helping for i in region[key].tolist()})

    def side_paths(self, t: int) -> dict[str, list[SidePath]]:
        paths = super().side_paths(t)
        for key in paths if t < len(self.regions) else self.helping:  # there W B_j moves, or has moved
            paths[key] = [path._replace(product=None) for path in paths[key]]
        return paths

    @contextmanager
    def learning(self, t: int, task: Task) -> Iterator[None]:
        self.helped = {(key, j): self.span(key, j) for key, js in self.helping.items() for j in js}
        self.close()
        with super().learning(t, task):
            yield

    def close(self) -> None:
        """Make what the gradients of layers whose weights help go through."""
        bases = {key: self.memory.bases[key][:, self.closed(key)] for key in self.helping}
        layers = {name: layer for name, layer in self.memory.layers.items() if layer.keys[0] in bases}
        self.late_projectors = {name: layer_projector(layer, bases) for name, layer in layers.items()}

    def backward(self, images: Tensor, labels: Tensor, t: int) -> Tensor:
        loss = super().backward(images, labels, t)
        if self.helping:
            self.test_again()
            if any(self.helping.values()):
                self.movement().backward()
            self.project()
        return loss

    def test_again(self) -> None:
        """Help no more whom this step's gradients, not yet projected, disagree with."""
        gradients = gradient_rows(self.memory.layers)
        helping = {key: self.agreeing(key, gradients[key], tasks) for key, tasks in self.helping.items()}
        if helping != self.helping:
            self.helping = helping
            self.close()

    @torch.no_grad()
    def project(self) -> None:
        """Project the gradients of the layers whose weights help."""
        for project in self.late_projectors.values():
            parameters = project.layer.parameters
            with full_float32(project.layer.module.weight):
                projected = project(*(None if p is None else p.grad for p in parameters))
            for parameter, gradient in zip(parameters, projected, strict=True):
                if parameter is not None:
                    parameter.grad = gradient

    def movement(self) -> Tensor:
        """λ Σ ‖(W - W_{t-1}) B_j‖ over the tasks that are helped."""
        weights = weight_rows(self.memory.layers)
        pairs = [(key, j) for key, js in self.helping.items() for j in js]
        moved = [weights[key] @ self.helped[key, j] - self.products[key][j] for key, j in pairs]
        return self.options.cuber_lambda * sum(part.norm() for part in moved)

    def after_task(self, t: int, task: Task) -> None:
        super().after_task(t, task)
        self.helping = {}
        n = None if self.options.n_samples == "all" else self.options.n_samples
        with self.testing(t):
            self.gradients = [*self.gradients[:t], layer_gradients(self, t, task.train, n)]
