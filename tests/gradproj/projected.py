"""What the tests of projectors and of protection share: precisions, random tensors, and projection by plain loops."""

from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from gradproj.projection import layer_projector
from gradproj.protection import Protection, projecting
from tests import reference

DOUBLE = torch.float64
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-12}
PRECISIONS = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def orthonormal(d: int, k: int, seed: int = 1) -> Tensor:
    return torch.linalg.qr(normal(d, max(k, 1), seed=seed)).Q[:, :k]


def project_by_reference(weight: Tensor, bias: Tensor | None, bases: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Rows [W, b] of each group times that group's I - M Mᵀ."""
    rows = weight.flatten(1) if bias is None else torch.cat([weight.flatten(1), bias[:, None]], dim=1)
    parts = [reference.project(part, basis) for part, basis in zip(rows.chunk(len(bases)), bases, strict=True)]
    rows = torch.cat([torch.from_numpy(part) for part in parts]).to(weight.dtype)
    if bias is None:
        return rows.view_as(weight), None
    return rows[:, :-1].reshape(weight.shape), rows[:, -1]


def projected_gradients(layers: dict, bases: dict) -> AbstractContextManager[Protection]:
    return projecting({name: layer_projector(layer, bases) for name, layer in layers.items()})
