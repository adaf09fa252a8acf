"""What gradproj/ does in the plain way of the released scripts: what the speed benchmark compares with.

Dense d x d products on finished gradients; Python loops that cut out one patch at a time; two NumPy SVDs a layer.
(tests/reference.py is plainer still, one Python step a number, and too slow to time.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from engine.task import Task
from gradproj.layers import Layer
from gradproj.normalization import frozen, normalization_parameters
from methods.gpm import GPM

Array = NDArray[np.float32]


class DenseGPM(GPM):
    """G ← G - G (M Mᵀ) with a dense d x d matrix for each layer, applied to `.grad` after backward."""

    plain_step = False

    @contextmanager
    def learning(self, t: int, task: Task) -> Iterator[None]:
        """Train with projected gradients."""
        self.dense = [
            (layer.module.weight, (self.memory.bases[name] @ self.memory.bases[name].T).to(layer.module.weight))
            for name, layer in self.memory.layers.items()
        ]
        with frozen(normalization_parameters(self.model, self.memory.exclude)):
            yield

    def backward(self, images: Tensor, labels: Tensor, t: int) -> Tensor:
        loss = super().backward(images, labels, t)
        for weight, matrix in self.dense:
            weight.grad = weight.grad - torch.mm(weight.grad.flatten(1), matrix).view_as(weight)
        return loss


@torch.no_grad()
def update(
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    images: Tensor,
    layers: Mapping[str, Layer],
    samples: Mapping[str, int],
    bases: Mapping[str, Array],
    thresholds: Mapping[str, float],
) -> dict[str, Array]:
    """The bases of some layers after a task (Eqs. 5, 8 and 9): one forward pass, then layer after layer."""
    model.eval()
    inputs = {}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            keep = lambda _, args, name=name: inputs.update({name: args[0]})  # noqa: E731
            hooks.enter_context(layer.module.register_forward_pre_hook(keep))
        forward(images)
    return {
        name: extend_basis(
            bases[name], representation(layer.module, inputs[name][: samples.get(name)]), thresholds[name]
        )
        for name, layer in layers.items()
    }


def representation(module: nn.Module, inputs: Tensor) -> Array:
    """R (d, n) of a Linear's or a square Conv2d's inputs, one patch at a time."""
    if isinstance(module, nn.Linear):
        return inputs.detach().cpu().numpy().T
    x = F.pad(inputs, 2 * [module.padding[1]] + 2 * [module.padding[0]]).detach().cpu().numpy()
    (kh, kw), (sh, sw) = module.kernel_size, module.stride
    rows, columns = (x.shape[2] - kh) // sh + 1, (x.shape[3] - kw) // sw + 1
    matrix = np.zeros((x.shape[1] * kh * kw, len(x) * rows * columns), dtype=np.float32)
    place = 0
    for image in x:
        for i in range(rows):
            for j in range(columns):
                matrix[:, place] = image[:, i * sh : i * sh + kh, j * sw : j * sw + kw].reshape(-1)
                place += 1
    return matrix


def extend_basis(M: Array, R: Array, eps: float) -> Array:
    """The basis M (d, k) with what the samples R (d, n) need appended."""
    total = (np.linalg.svd(R, full_matrices=False)[1] ** 2).sum()
    residual = R - M @ M.T @ R
    U, S, _ = np.linalg.svd(residual, full_matrices=False)
    captured, r = total - (S**2).sum(), 0
    while captured < eps * total and r < len(S) and M.shape[1] + r < len(M):
        captured, r = captured + S[r] ** 2, r + 1
    return np.concatenate([M, U[:, :r]], axis=1)
