"""Updates orthogonal to the bases, for optimisers whose step is not a combination of this task's gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradproj.projection import LayerProjector, full_float32


@contextmanager
def projected_updates(optimizer: torch.optim.Optimizer, projectors: Mapping[str, LayerProjector]) -> Iterator[None]:
    """Within this context every `optimizer.step()` moves the layers' weights orthogonally to their bases.

    Args:
        optimizer: of any kind; what it does to a weight is projected afterwards, W ← W₀ + (W - W₀) P.
        projectors: by layer name.
    """
    busy = {name: project for name, project in projectors.items() if not project.is_idle}
    before: dict[str, list[Tensor | None]] = {}

    def remember(*_: Any) -> None:
        for name, project in busy.items():
            before[name] = [None if p is None else p.detach().clone() for p in project.layer.parameters]

    @torch.no_grad()
    def project(*_: Any) -> None:
        for name, project in busy.items():
            old, now = before[name], project.layer.parameters
            with full_float32(now[0]):
                moved = project(*(None if p is None else p - o for p, o in zip(now, old, strict=True)))
            for parameter, start, step in zip(now, old, moved, strict=True):
                if parameter is not None:
                    parameter.copy_(start + step)

    with optimizer.register_step_pre_hook(remember), optimizer.register_step_post_hook(project):
        yield
