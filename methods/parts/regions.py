"""What the choice of trust regions needs: a layer's weights and gradients, and the directions that a task uses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.method import Method
from engine.seeds import generator, random_order
from engine.task import Split
from gradproj.layers import Layer
from gradproj.representation import Representation
from gradproj.subspace import RankRule, count_directions, extend_basis


def some_of(method: Method, t: int, train: Split, n: int) -> Split:
    """n random images of task t with their labels."""
    chosen = random_order(train.labels, generator(method.options.seed, "regions", t))[:n]
    return Split(train.images[chosen], train.labels[chosen])


def layer_gradients(method: Method, t: int, train: Split, n: int) -> dict[str, Tensor]:
    """∂L/∂[W, b] (o, d) of a method's protected layers, by key, of the mean loss of n random images in eval mode."""
    method.model.eval()
    method.model.zero_grad()
    method.loss(*some_of(method, t, train, n), t).backward()
    found = gradient_rows(method.memory.layers)
    method.model.zero_grad()
    return found


def gradient_rows(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The gradients that some layers' parameters hold, as rows ∂L/∂[W, b] (o, d), by key; zero where they hold none."""
    gradients: dict[str, Tensor] = {}
    for layer in layers.values():
        parts = [p if p is None else torch.zeros_like(p) if p.grad is None else p.grad for p in layer.parameters]
        gradients |= layer.rows_by_key(*parts)
    return gradients


def weight_rows(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The weights of some layers as rows [W, b] (o, d), by key."""
    weights: dict[str, Tensor] = {}
    for layer in layers.values():
        weights |= layer.rows_by_key(*layer.parameters)
    return weights


def strongest_directions(
    basis: Tensor, inputs: Representation, threshold: float, rank_rule: RankRule
) -> tuple[Tensor, Tensor]:
    """The fewest directions that hold a fraction ε of the energy of a layer's inputs, chosen from old and new alike.

    Args:
        basis: M (d, k), the old ones; the new ones are the left singular vectors of (I - M Mᵀ) R.
        inputs: R.
        threshold: ε of ‖R‖².
        rank_rule: "released" takes one fewer.
    Returns:
        (d, k + r), M and the new ones among them.
        their places in it, ascending.
    """
    k = basis.shape[1]
    everything = extend_basis(basis, inputs, 1.0)
    energies = inputs.energies(everything)
    energies = energies * (energies > len(basis) * torch.finfo(torch.float32).eps ** 2 * energies.sum())  # no rounding
    order = energies.argsort(descending=True)
    taken = order[: count_directions(energies[order], 0.0, threshold, rank_rule)]
    old, r = taken[taken < k].sort().values, int((taken >= k).sum())  # new ones come by decreasing energy
    return everything[:, : k + r], torch.cat([old, torch.arange(k, k + r).to(old)])
