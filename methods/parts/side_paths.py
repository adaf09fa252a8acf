"""Side paths: a layer computes with W + W B (Q - I) Bᵀ, changed inside a few directions, by thin products."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine import state
from engine.task import Task
from gradproj.layers import Layer
from gradproj.layers.linear import LinearLayer
from methods.gpm import GPM


class SidePath(NamedTuple):
    """One term W B (Q - I) Bᵀ of a layer's weights [W, b] (o, d).

    W B is made anew at each step, so it follows W. What W's gradient gets through it is projected as the rest of that
    gradient is, at the price of a thin product: where that goes through P, so does Bᵀ.

    Attributes:
        basis: B (d, k), orthonormal columns, in the weights' dtype.
        shift: Q - I (k, k).
        open: P B (d, k); None where nothing gets through, P B = 0.
    """

    basis: Tensor
    shift: Tensor
    open: Tensor | None = None

    def change(self, rows: Tensor, *columns: Tensor) -> Tensor:
        """W B (Q - I) Bᵀ (o, d), or its product with columns (d, n), in the cheapest order."""
        right = [self.shift, self.basis.T, *columns]
        if self.open is None:
            return torch.linalg.multi_dot([rows.detach(), self.basis, *right])
        closed = torch.linalg.multi_dot([rows.detach(), self.basis - self.open, *right])
        return closed + torch.linalg.multi_dot([rows, self.open, *right])


@contextmanager
def side_paths(layers: Mapping[str, Layer], paths: Mapping[str, Sequence[SidePath]]) -> Iterator[None]:
    """Within this context layers compute with W̃, the sum of W and the terms of their side paths.

    Args:
        layers: by name.
        paths: by key; a layer without any stays as it is.
    """
    with ExitStack() as hooks:
        for layer in layers.values():
            groups = [paths.get(key, ()) for key in layer.keys]
            if any(groups):
                hook = partial(add_side_paths, layer, groups)
                hooks.enter_context(layer.module.register_forward_hook(hook, with_kwargs=True))
        yield


def add_side_paths(
    layer: Layer,
    groups: Sequence[Sequence[SidePath]],
    _module: nn.Module,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Any],
    output: Tensor,
) -> Tensor:
    """The output of a layer, and of the side paths of each of its groups."""
    inputs = args[0] if args else kwargs["input"]
    parts = layer.rows(*layer.parameters).chunk(layer.groups)  # [W, b] of each group
    if isinstance(layer, LinearLayer):  # few columns: products of a few columns are cheaper than new weights
        columns = layer.columns(inputs)[0].to(parts[0].dtype)  # (d, n)
        change = sum(path.change(parts[0], columns) for path in groups[0])  # (o, n)
        return output + change.T.reshape(output.shape).to(output.dtype)
    changes = [
        sum((path.change(part) for path in paths), torch.zeros_like(part))
        for part, paths in zip(parts, groups, strict=True)
    ]
    return output + layer.apply(inputs, *layer.from_rows(torch.cat(changes)))


class SidePathGPM(GPM):
    """GPM whose tasks compute with side paths of their own, learned beside the weights and kept.

    Attributes:
        shifts: by task, the Q - I of its side paths, in dicts.
    """

    plain_step, graph_step, task_identity, one_network = False, True, True, False
    shifts: list[dict[str, Any]]

    def side_paths(self, t: int) -> dict[str, list[SidePath]]:
        """Those of task t, by key."""
        raise NotImplementedError

    def parameters(self, t: int) -> list[nn.Parameter]:
        return [*super().parameters(t), *state.parameters(self.shifts[t])]

    @contextmanager
    def learning(self, t: int, task: Task) -> Iterator[None]:
        with super().learning(t, task), self.testing(t):
            yield

    @contextmanager
    def testing(self, t: int) -> Iterator[None]:
        with side_paths(self.memory.layers, self.side_paths(t)):
            yield
