"""Orthogonal Gradient Descent (Farajtabar et al., AISTATS 2020, arXiv 1910.07104, Algorithm 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gpm.errors import InputError
from gpm.methods.base import Method
from gpm.options import Options
from gpm.seeds import generator
from gpm.task import Task

NEGLIGIBLE = 1e-5  # a gradient is in the span already if less than this fraction of its length is left, in float32


class OGD(Method):
    """SGD orthogonal to the gradients of old images' logits, so that these outputs stay, to first order.

    After each task, for `ogd_samples` random training images (x, y) the gradient ∇_θ f_y(x) of the true class's logit
    (the paper's OGD-GTL) joins an orthonormal basis S of the whole parameter space by Gram-Schmidt. A step then takes
    g ← g - Σ_{v ∈ S} (vᵀ g) v.

    For single-head benchmarks only, as in the paper's comparison.

    Hyperparameters: `ogd_samples` (200 a task, the paper's number).

    Stores at most `ogd_samples` · parameters floats a task: 18 million a task for permuted MNIST's network, 28 times
    the largest possible GPM at the first task already. Every step reads them all.
    """

    name = "ogd"

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        if hasattr(model, "heads"):
            raise InputError(
                f"ogd is for one head that all tasks share; {type(model).__name__} has a head for each task"
            )
        first = next(model.parameters())
        self.basis = first.new_zeros(0, sum(p.numel() for p in model.parameters()))  # S, a row for each v

    @torch.no_grad()
    def after_backward(self, t: int) -> None:
        """Project the gradient."""
        if not len(self.basis):
            return
        parameters = list(self.model.parameters())
        g = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        g = torch.addmv(g, self.basis.T, self.basis @ g, alpha=-1)
        for p, part in zip(parameters, g.split([p.numel() for p in parameters]), strict=True):
            if p.grad is not None:
                p.grad = part.view_as(p)

    def after_task(self, t: int, task: Task) -> None:
        """Extend the basis by the gradients of some of the task's logits."""
        self.model.eval()
        parameters = list(self.model.parameters())
        order = torch.randperm(len(task.train.labels), generator=generator(self.options.seed, "samples", t))
        gradients = []
        for i in order[: self.options.ogd_samples].tolist():
            logit = self.model(task.train.images[i : i + 1], t)[0, task.train.labels[i]]
            parts = torch.autograd.grad(logit, parameters)
            gradients.append(torch.cat([part.flatten() for part in parts]))
        self.basis = torch.cat([self.basis, orthonormal_rest(torch.stack(gradients), self.basis)])

    def memory_floats(self) -> int:
        """The basis."""
        return self.basis.numel()

    def state_dict(self) -> dict[str, Any]:
        """The basis."""
        return {"basis": self.basis}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved basis."""
        self.basis = state["basis"].to(self.basis)


def orthonormal_rest(vectors: Tensor, basis: Tensor) -> Tensor:
    """Gram-Schmidt: orthonormal rows that, with the rows of `basis`, span the vectors as well.

    Args:
        vectors: (n, d).
        basis: (k, d), orthonormal rows.
    Returns:
        (r, d), r <= n; a vector that is in the span already adds none.
    """
    lengths = vectors.norm(dim=1)
    for _ in range(2):  # the second time removes what rounding left the first time
        vectors = vectors - (vectors @ basis.T) @ basis
    r = 0  # rows of `vectors` that are done and kept, at its top
    for vector, length in zip(vectors, lengths, strict=True):
        done = vectors[:r]
        for _ in range(2):
            vector = vector - (done @ vector) @ done
        if vector.norm() > NEGLIGIBLE * length:
            vectors[r] = vector / vector.norm()
            r += 1
    return vectors[:r].clone()
