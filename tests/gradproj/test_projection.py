"""Gradients orthogonal to a basis: every way of computing them against G (I - M Mᵀ)."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gradproj.layers import find_layers
from gradproj.projection import cheapest_route, full_float32, layer_projector, orthogonal_projector
from tests import reference
from tests.gradproj.projected import DOUBLE, PRECISIONS, TOLERANCE, normal, orthonormal, project_by_reference


@PRECISIONS
@pytest.mark.parametrize("d, k", [(1, 0), (1, 1), (6, 0), (6, 1), (6, 3), (6, 5), (6, 6), (150, 20), (150, 140)])
@pytest.mark.parametrize("m", [1, 4, 200], ids="rows={}".format)
def test_every_route_is_the_dense_product(d, k, m, dtype):
    basis, rows = orthonormal(d, k), normal(m, d, dtype=dtype)
    expected = torch.from_numpy(reference.project(rows, basis)).to(dtype)
    always_right = ["subtract", "keep", "dense"]
    special = {0: ["none"], d: ["zero"]}.get(k, [])
    for route in [None, *always_right, *special]:
        projected = orthogonal_projector(basis, dtype, route)(rows)
        assert projected.dtype == dtype
        assert_close(projected, expected, atol=TOLERANCE[dtype], rtol=0, msg=lambda m, route=route: f"{route}: {m}")


@pytest.mark.parametrize(
    "d, k, route",
    [(1000, 0, "none"), (1000, 1000, "zero"), (1000, 100, "subtract"), (1000, 900, "keep"), (1000, 500, "dense")],
)
def test_the_cheapest_route(d, k, route):
    assert cheapest_route(d, k) == route


def test_projection_is_idempotent_and_orthogonal_to_the_basis():
    for d, k in [(6, 2), (200, 30), (200, 100), (200, 180)]:
        basis = orthonormal(d, k)
        project = orthogonal_projector(basis, DOUBLE)
        once = project(normal(9, d))
        assert_close(project(once), once, atol=1e-13, rtol=0)
        assert_close(once @ basis, torch.zeros(9, k, dtype=DOUBLE), atol=1e-13, rtol=0)
        inside = normal(9, k) @ basis.T
        assert_close(project(inside), torch.zeros(9, d, dtype=DOUBLE), atol=1e-13, rtol=0)


@PRECISIONS
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("columns", [(2, 2), (0, 3), (9, 1)], ids=str)
def test_layer_projector_takes_each_group_and_the_bias_along(columns, bias, dtype):
    conv = nn.Conv2d(4, 6, (1, 4), groups=2, bias=bias, dtype=dtype)
    layer = find_layers(nn.Sequential(conv))["0"]
    bases = [orthonormal(layer.input_size, min(k, layer.input_size), seed=k) for k in columns]
    weight, shift = normal(6, 2, 1, 4, dtype=dtype), normal(6, dtype=dtype) if bias else None
    projected = layer_projector(layer, dict(zip(layer.keys, bases, strict=True)))(weight, shift)
    expected = project_by_reference(weight, shift, bases)
    assert_close(projected[0], expected[0], atol=TOLERANCE[dtype], rtol=0)
    assert projected[1] is None if not bias else torch.allclose(projected[1], expected[1], atol=TOLERANCE[dtype])


# name: (layer, shape of its input)
def test_a_layer_is_full_when_all_its_groups_are_and_idle_when_none_holds_anything():
    layer = find_layers(nn.Sequential(nn.Conv2d(4, 6, 2, groups=2, bias=False)))["0"]
    for columns, full, idle in (
        ((8, 8), True, False),
        ((8, 3), False, False),
        ((0, 3), False, False),
        ((0, 0), False, True),
    ):
        bases = {key: orthonormal(8, k) for key, k in zip(layer.keys, columns, strict=True)}
        project = layer_projector(layer, bases)
        assert (project.is_full, project.is_idle) == (full, idle)


class NewFlagInUse:
    """Stands for torch.backends.cuda.matmul where somebody has set its newer flag."""

    fp32_precision = "tf32"

    @property
    def allow_tf32(self) -> bool:
        raise RuntimeError("mix of the legacy and new APIs")


@pytest.mark.parametrize("flags", [SimpleNamespace(allow_tf32=True), NewFlagInUse()], ids=["older flag", "newer flag"])
def test_products_on_a_gpu_are_full_float32_for_the_projection_alone(monkeypatch, flags):
    monkeypatch.setattr(torch.backends.cuda, "matmul", flags)
    before = dict(vars(flags)) or {"fp32_precision": "tf32"}
    for on_gpu, inside in ((True, (False, "ieee")), (False, (True, "tf32"))):
        with pytest.raises(KeyError), full_float32(SimpleNamespace(is_cuda=on_gpu)):
            assert all(getattr(flags, name) in inside for name in before)
            raise KeyError
        assert {name: getattr(flags, name) for name in before} == before
