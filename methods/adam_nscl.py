"""Adam in the null space of old tasks' inputs, Adam-NSCL (Wang, Li, Sun and Xu, CVPR 2021, arXiv 2103.07113)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from engine import state
from engine.options import Options, flag
from engine.task import Split, Task
from gradproj.errors import InputError
from gradproj.optimizers import projected_updates
from methods.gpm import GPM, Batches, Forward

EPS = torch.finfo(torch.float64).eps


class AdamNSCL(GPM):
    """Adam whose updates are projected onto what old tasks' inputs hardly use.

    Σ = (1 / n) Σ x xᵀ sums over the layer's inputs x of all training images of all tasks, each as its task was learned.
    The null space U₂ are its eigenvectors with eigenvalues of at most a · λ_min, and Adam's update, not its gradient,
    goes through it: ΔW ← ΔW U₂ U₂ᵀ. Normalisation parameters are frozen as in GPM.

    Where Σ is singular, λ_min is rounding: it counts as no less than rounding makes eigenvalues of 0, d · 2⁻⁵² · tr Σ,
    so that the null space is then what no input uses.

    The learning rate is the paper's, and so is a, 10 for ten tasks and 30 for twenty, but on permuted MNIST, where it
    was found by search (docs/successors.md). The paper's networks and schedules are not GPM's, so no published number
    is comparable.

    Stores Σ (d, d) of each layer.
    """

    name, title, place = "adam_nscl", "Adam-NSCL", 17
    reads = ()
    flags = {"nscl_ratio": flag(10.0, "a: the null space's eigenvalues are at most a times the smallest", minimum=1)}
    defaults = {
        "lr": 5e-5,
        "lr_min": 1e-6,
        "pmnist": {"nscl_ratio": 30.0},
        "cifar100_superclass": {"nscl_ratio": 30.0},
        "miniimagenet": {"nscl_ratio": 30.0},
    }
    plain_step, embeddings = False, False
    state = ("memory", "outer")

    @classmethod
    def refuse(cls, options: Options) -> None:
        if options.momentum:
            raise InputError(f"momentum is {options.momentum}, which is of SGD; adam_nscl's steps are Adam's")

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        self.outer = {key: basis.new_zeros(2 * [len(basis)]) for key, basis in self.memory.bases.items()}  # n Σ

    @contextmanager
    def learning(self, t: int, task: Task) -> Iterator[None]:
        self.projectors = {name: self.projector(layer) for name, layer in self.memory.layers.items()}
        with self.frozen_normalization(t), ExitStack() as self.projecting:
            yield

    def optimizer(self, t: int, lr: float) -> torch.optim.Optimizer:
        adam = torch.optim.Adam(self.parameters(t), lr=lr)
        self.projecting.enter_context(projected_updates(adam, self.projectors))
        return adam

    def remember(self, t: int, forward: Forward, images: Iterable[Tensor], samples: dict[str, int]) -> None:
        gathered = self.memory.gather(forward, images, samples)
        self.outer = {key: outer + gathered[key].outer for key, outer in self.outer.items()}
        self.memory.replace({key: used_directions(outer, self.options.nscl_ratio) for key, outer in self.outer.items()})

    def representative(self, t: int, train: Split) -> tuple[Iterable[Tensor], dict[str, int]]:
        everything = torch.arange(len(train.labels))
        return Batches(train.images, everything, self.options.batch_size_test), {}

    def memory_floats(self) -> int:
        return state.count(self.outer)  # the bases follow from it


def used_directions(outer: Tensor, ratio: float) -> Tensor:
    """All eigenvectors of n Σ (d, d) but those of the null space: (d, k), orthonormal columns.

    Args:
        outer: n Σ, float64.
        ratio: a.
    """
    values, vectors = torch.linalg.eigh(outer)
    smallest = values[0].clamp(min=len(outer) * EPS * outer.trace())
    return vectors[:, values > ratio * smallest]
