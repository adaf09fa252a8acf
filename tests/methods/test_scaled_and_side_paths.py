"""What several successors share: projection by degrees, and side paths."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.testing import assert_close

from gradproj.layers import find_layers
from gradproj.layers.uses import Uses
from gradproj.projection import layer_projector
from gradproj.protection import projecting
from methods.parts.scaled import Scaled, calls_of_few_rows, scaled_projector
from methods.parts.side_paths import SidePath, side_paths


@pytest.mark.parametrize("k", [0, 20, 70, 150, 200])
def test_projection_by_degrees(k):
    layer = find_layers(nn.Linear(200, 3, bias=False).double())[""]
    M = torch.linalg.qr(torch.randn(200, k).double()).Q
    scale, G = torch.rand(k).double(), torch.randn(3, 200).double()
    projected, _ = scaled_projector(layer, {"": M}, {"": scale})(G)
    assert_close(projected, G - G @ M @ torch.diag(scale) @ M.T)
    scaled = Scaled({"": M}, {"": scale})
    assert_close(scaled.gradients([layer], {layer.module.weight: G})[layer.module.weight], G - projected)


@pytest.mark.parametrize("bias", [False, True])
def test_projection_by_degrees_of_few_rows(bias):
    layer = find_layers(nn.Linear(7, 6, bias=bias).double())[""]
    x = torch.randn(2, 2, 7).double()
    M, scale = torch.linalg.qr(torch.randn(7 + bias, 3).double()).Q, torch.rand(3).double()
    scaled = Scaled({"": M}, {"": scale})
    with calls_of_few_rows([layer]) as calls:
        loss = layer.module(x).square().sum()
    parameters = list(layer.module.parameters())
    deltas, *found = torch.autograd.grad(loss, [calls[0].zeros, *parameters])
    gradients = dict(zip(parameters, found, strict=True))
    assert_close(scaled.of_call(calls[0], deltas), scaled.gradients([layer], gradients))


def test_calls_of_few_rows_are_single_ones():
    model = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("once", "twice", "many")} | {"other": nn.Conv1d(3, 3, 1)})
    layers = find_layers(model).values()
    with calls_of_few_rows(layers) as calls:
        for name, n in (("once", 2), ("twice", 2), ("twice", 2), ("many", 3)):
            model[name](torch.ones(n, 3))
        model["other"](torch.ones(1, 3, 1))
    assert [call.layer.name for call in calls] == ["once"]
    model["once"](torch.ones(1, 3))
    assert len(calls) == 1


def with_parameters(module, x, weight, bias):
    """A layer's output with other parameters."""
    return functional_call(module, {"weight": weight} | ({} if bias is None else {"bias": bias}), x)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(4, 3), (5, 4)),
        (nn.Linear(4, 3, bias=False), (2, 5, 4)),
        (nn.Conv2d(2, 3, 3, padding=1), (2, 2, 4, 4)),
        (nn.Conv2d(4, 6, 2, stride=2, groups=2), (2, 4, 4, 4)),
    ],
)
@pytest.mark.parametrize("by_keyword", [False, True])
def test_side_paths_are_dense_weights_whose_gradients_are_projected(module, shape, by_keyword):
    torch.manual_seed(0)
    module = copy.deepcopy(module).double()
    (layer,) = find_layers(nn.Sequential(module)).values()
    parameters = [p for p in layer.parameters if p is not None]
    d, k = layer.input_size, 2
    leaves = [part.detach().requires_grad_() for part in layer.rows(*layer.parameters).chunk(layer.groups)]
    paths, shifts, dense, bases = {}, [], [], {}
    for key, W in zip(layer.keys, leaves, strict=True):
        B, C, bases[key] = (torch.linalg.qr(torch.randn(d, k).double()).Q for _ in range(3))
        D, E = (nn.Parameter(torch.randn(k, k).double()) for _ in range(2))
        paths[key] = [SidePath(B, D), SidePath(C, E)]
        dense.append(W + W @ B @ D @ B.T + W @ C @ E @ C.T)
        shifts += [D, E]
    x = torch.randn(shape).double().requires_grad_()
    expected = with_parameters(module, x, *layer.from_rows(torch.cat(dense)))
    loss = lambda output: (output * torch.linspace(-1, 1, output.numel()).view_as(output).double()).sum()  # noqa: E731
    wanted = torch.autograd.grad(loss(expected), [x, *shifts, *leaves])
    with side_paths({"": layer}, paths), projecting({"": layer_projector(layer, bases)}):
        output = module(input=x) if by_keyword else module(x)
        found = torch.autograd.grad(loss(output), [x, *shifts, *parameters])
    assert_close(output, expected)
    assert_close(found[: -len(parameters)], wanted[: 1 + len(shifts)])
    projected = [G - G @ M @ M.T for G, M in zip(wanted[-len(leaves) :], bases.values(), strict=True)]
    gradients = [*found[-len(parameters) :], *[None] * (module.bias is None)]
    assert_close(layer.rows(*gradients), torch.cat(projected))
    assert_close(module(x), with_parameters(module, x, module.weight, module.bias))
    seen = []
    with side_paths({"": layer}, paths), Uses([layer], lambda *call: seen.append(call[2]["input"])), torch.no_grad():
        assert_close(module(input=x) if by_keyword else module(x), expected)
    assert len(seen) == 1, "a memory that looks for what W is applied to finds it once"
    assert_close(layer.columns(seen[0]), layer.columns(x))


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(2 * x, self.weight)


class Padding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight)


@pytest.mark.parametrize(
    ("module", "shape"), [(Doubling(4, 3, bias=False), (5, 4)), (Padding(2, 3, 3, bias=False), (2, 2, 4, 4))]
)
@pytest.mark.parametrize("grad", [False, True])
def test_side_paths_of_layers_with_a_forward_of_their_own(module, shape, grad):
    (layer,) = find_layers(nn.Sequential(module)).values()
    B, D = torch.linalg.qr(torch.randn(layer.input_size, 2)).Q, torch.randn(2, 2)
    x = torch.randn(shape)
    with torch.set_grad_enabled(grad), side_paths({"": layer}, {"0": [SidePath(B, D)]}):
        output = module(x)
    rows = layer.rows(*layer.parameters)
    module.weight.data = layer.weight_from_rows(rows + rows @ B @ D @ B.T).data
    assert_close(output, module(x))


def test_side_paths_leave_a_forward_as_it_was():
    (layer,) = find_layers(nn.Sequential(nn.Conv2d(2, 3, 2, bias=False))).values()
    paths = {"0": [SidePath(torch.eye(8)[:, :1], torch.ones(1, 1))]}
    with side_paths({"0": layer}, paths):
        pass
    assert "forward" not in vars(layer.module)
    layer.module.forward = replaced = lambda images: images
    with side_paths({"0": layer}, paths):
        assert layer.module.forward is not replaced
    assert layer.module.forward is replaced
