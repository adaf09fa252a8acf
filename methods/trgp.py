"""Trust Region Gradient Projection (Lin, Yang, Fan and Zhang, ICLR 2022, arXiv 2202.02931)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from engine.options import Options, flag
from engine.task import Task
from methods.gpm import Forward
from methods.parts.regions import layer_gradients, strongest_directions
from methods.parts.side_paths import SidePath, SidePathGPM

MOST_REGIONS = 2  # of a layer and task


class TRGP(SidePathGPM):
    """GPM that lets a new task use, in a way of its own, what old tasks near to it have learned.

    - Before task t, each layer's gradient G on a few images tells which old tasks j are near: the two largest
      ‖G B_j‖ > ε₁ ‖G‖, where B_j spans what task j uses of the layer's inputs. They are its trust regions.
    - The layer then computes with W̃ = W + Σ_j W B_j (Q_j - I) B_jᵀ. W learns as in GPM, and Q_j from I by plain SGD; it
      is kept, and task t is tested with it. W B_j stays what it was, since W learns outside all B_j: a thin side path.
    - After the task, B_t is the fewest of the columns of M and the left singular vectors of (I - M Mᵀ) R, the strongest
      first, that hold ε of ‖R‖²; the latter join M. R are the inputs in the network of the W̃.

    Differs from the released code: docs/differences.md. At test it uses the task's identity, also under a single head.

    Stores M, which of its columns are B_t, and Q_j - I, of k_j² floats, for at most two j a layer and task.
    """

    name, title, place = "trgp", "TRGP", 13
    flags = {
        "region_threshold": flag(
            0.5, "ε₁: a trust region holds more than this share of the length of the new task's gradient", minimum=0
        ),
        "region_images": flag(125, "training images of a new task that its regions are chosen by", above=0),
    }
    defaults = {
        "pmnist": {"region_threshold": 0.2, "region_images": 300},
        "five_datasets": {"region_images": 500},
        "miniimagenet": {"region_images": 500, "threshold": (0.985,)},
    }
    state = ("memory", "regions", "shifts")

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        self.regions: list[dict[str, Tensor]] = []  # by task and key, the columns of M that are B
        self.shifts: list[dict[str, dict[int, nn.Parameter]]] = []  # by task, key and region j, Q_j - I

    def span(self, key: str, j: int) -> Tensor:
        """B_j (d, k_j) of a layer, in its weights' dtype."""
        return self.memory.bases[key][:, self.regions[j][key]].to(next(self.model.parameters()).dtype)

    def before_task(self, t: int, task: Task) -> None:
        self.shifts = [*self.shifts[:t], {}]
        if t:
            self.choose(t, layer_gradients(self, t, task.train, self.options.region_images))

    @torch.no_grad()
    def choose(self, t: int, gradients: dict[str, Tensor]) -> None:
        """Choose the task's trust regions by the gradients G (o, d) of its loss, by key."""
        near = {key: self.nearest(t, key, G) for key, G in gradients.items()}
        self.shifts[t] = {
            key: {j: nn.Parameter(gradients[key].new_zeros(2 * [len(self.regions[j][key])])) for j in js}
            for key, js in near.items()
        }

    def nearest(self, t: int, key: str, gradient: Tensor) -> list[int]:
        """The tasks before t whose regions hold most of a gradient (o, d), if that is much."""
        held = {j: (gradient @ self.span(key, j)).norm().item() for j in range(t)}
        near = [j for j in held if held[j] > self.options.region_threshold * gradient.norm().item()]
        return sorted(near, key=held.get, reverse=True)[:MOST_REGIONS]

    def side_paths(self, t: int) -> dict[str, list[SidePath]]:
        shifts = self.shifts[t].items()
        return {key: [SidePath(self.span(key, j), shift) for j, shift in parts.items()] for key, parts in shifts}

    def remember(self, t: int, forward: Forward, images: Iterable[Tensor], samples: dict[str, int]) -> None:
        gathered, epsilon = self.memory.gather(forward, images, samples), self.epsilon(t)
        rule = "paper" if t else self.memory.rank_rule
        bases, region = {}, {}
        for layer in self.memory.layers.values():
            for key in layer.keys:
                found = strongest_directions(self.memory.bases[key], gathered[key], epsilon[layer.name], rule)
                bases[key], region[key] = found
        self.memory.replace(bases)
        self.regions = [*self.regions[:t], region]
