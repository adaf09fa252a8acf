"""Continual learning with backward transfer, CUBER (Lin, Yang, Fan and Zhang, NeurIPS 2022, arXiv 2211.00789)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from engine.options import Options, flag
from engine.task import Task
from gradproj.errors import InputError
from gradproj.layers import Layer
from gradproj.projection import LayerProjector, layer_projector
from methods.parts.regions import gradient_rows, layer_gradients, weight_rows
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
        "cuber_lambda": flag(0.01, "λ, weight of the distance that W moves inside what it helps", minimum=0),
    }
    defaults = TRGP.defaults | {"pmnist": {"region_images": 300}}
    graph_step = False
    state = (*TRGP.state, "gradients", "helping", "before")

    @classmethod
    def refuse(cls, options: Options) -> None:
        if options.n_samples == "all":
            raise InputError("n_samples is all; cuber makes one gradient of all samples at once: give a number")
        if options.momentum:
            raise InputError(
                f"momentum is {options.momentum:g}; cuber closes directions while a task is learned, in which momentum "
                "would go on moving: give 0"
            )

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        self.gradients: list[dict[str, Tensor]] = []  # by task and key, G (o, d) at its learned weights
        self.helping: dict[str, list[int]] = {}  # by key, the regions j in which W moves at the moment
        self.before: dict[str, dict[int, Tensor]] = {}  # by key and j, W_{t-1} B_j of those that began as such

    def choose(self, t: int, gradients: dict[str, Tensor]) -> None:
        super().choose(t, gradients)
        self.helping = {}
        for layer in self.memory.layers.values():
            helped = {key: self.agreeing(key, gradients[key], list(self.shifts[t][key])) for key in layer.keys}
            self.helping |= helped if any(helped.values()) else {}
        weights = weight_rows(self.memory.layers)
        self.before = {
            key: {j: weights[key].detach() @ self.span(key, j) for j in js} for key, js in self.helping.items()
        }

    def agreeing(self, key: str, gradient: Tensor, tasks: list[int]) -> list[int]:
        """Those of some old tasks whose own gradient agrees with this one (o, d)."""
        new, length = gradient.flatten(), gradient.norm()
        cosines = {j: (old := self.gradients[j][key].flatten()) @ new / (old.norm() * length) for j in tasks}
        return [j for j in tasks if cosines[j] >= self.options.cuber_agreement]  # NaN, where one is 0, is not

    def projector(self, layer: Layer) -> LayerProjector:
        """None where W helps: there gradients are projected after they are tested."""
        late = layer.keys[0] in self.helping
        return layer_projector(layer, {key: self.memory.bases[key][:, : 0 if late else None] for key in layer.keys})

    @contextmanager
    def learning(self, t: int, task: Task) -> Iterator[None]:
        self.make_projectors()
        with super().learning(t, task):
            yield

    def make_projectors(self) -> None:
        """Make what the gradients of layers whose weights help go through: all but what helped tasks alone use."""
        self.helping_spans = {(key, j): self.span(key, j) for key, js in self.helping.items() for j in js}
        bases = {key: self.memory.bases[key][:, self.protected_columns(key)] for key in self.helping}
        layers = {name: layer for name, layer in self.memory.layers.items() if layer.keys[0] in bases}
        self.late_projectors = {name: layer_projector(layer, bases) for name, layer in layers.items()}

    def protected_columns(self, key: str) -> list[int]:
        """The columns of M that hold what tasks use that are not helped."""
        others = [region[key].tolist() for j, region in enumerate(self.regions) if j not in self.helping.get(key, [])]
        return sorted({i for columns in others for i in columns})

    def backward(self, images: Tensor, labels: Tensor, t: int) -> Tensor:
        loss = super().backward(images, labels, t)
        gradients = gradient_rows(self.memory.layers) if self.helping_spans else {}
        helping = {key: self.agreeing(key, gradients[key], js) if js else js for key, js in self.helping.items()}
        # Tasks that this step's gradients, not yet projected, disagree with are helped no more.
        if helping != self.helping:
            self.helping = helping
            self.make_projectors()
        if self.helping_spans:
            self.movement().backward()
        self.memory.project_gradients(self.late_projectors)
        return loss

    def movement(self) -> Tensor:
        """λ Σ ‖(W - W_{t-1}) B_j‖ over the tasks that are helped."""
        weights = weight_rows(self.memory.layers)
        moved = [weights[key] @ B - self.before[key][j] for (key, j), B in self.helping_spans.items()]
        return self.options.cuber_lambda * sum(part.norm() for part in moved)

    def after_task(self, t: int, task: Task) -> None:
        super().after_task(t, task)
        self.helping, self.before = {}, {}
        with self.testing(t):
            self.gradients = [*self.gradients[:t], layer_gradients(self, t, task.train, self.options.n_samples)]

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        super().load_state_dict(saved)
        self.make_projectors()
