"""What every kind of layer must satisfy: its tests inherit from LayerCase."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from gradproj import GradientProjectionMemory
from gradproj.layers import Layer, find_layers
from tests import reference

DRIFT: dict[tuple[str, str, str], list[float]] = defaultdict(list)  # by kind, optimiser and dtype; the suite prints it
STEPS = 6

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.2),
    "SGD, momentum, decay": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
}
# dtype of the weights, dtype of autocast, most that outputs may move: roundings of some steps
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None, float]] = {
    "float32": (torch.float32, None, 5e-6),
    "float64": (torch.float64, None, 1e-12),
    "float32, autocast": (torch.float32, torch.bfloat16, 5e-6),
    "bfloat16": (torch.bfloat16, None, 0.1),
}


class Variant(NamedTuple):
    """A layer to try: how it is made, and inputs for it.

    Attributes:
        make: the module.
        old: by seed, inputs that leave some direction of it free; float64, or indices.
        new: by seed, others.
    """

    make: Callable[[], nn.Module]
    old: Callable[[int], Tensor]
    new: Callable[[int], Tensor]


def normal(*shape: int) -> Callable[[int], Tensor]:
    """By seed, a float64 tensor."""
    return lambda seed: torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class LayerCase:
    """Tests of a kind of layer.

    Attributes:
        variants: what is tried, by name.
    """

    variants: ClassVar[dict[str, Variant]]

    @pytest.fixture
    def module(self, variant: str) -> nn.Module:
        torch.manual_seed(0)
        return self.model(self.variants[variant].make()).double()

    def model(self, module: nn.Module) -> nn.Module:
        """A network of that layer alone."""
        return nn.Sequential(module)

    def layer(self, model: nn.Module) -> Layer:
        (layer,) = find_layers(model).values()
        return layer

    def plain_columns(self, module: nn.Module, x: Tensor) -> list[np.ndarray]:
        """The columns (d, n) of each group, without a bias's constant 1, by loops."""
        raise NotImplementedError

    def output_rows(self, module: nn.Module, x: Tensor) -> Tensor:
        """The layer's output as (o, n): what [W, b] times the columns must be."""
        raise NotImplementedError

    def test_columns_are_those_of_plain_loops(self, variant, module):
        layer, x = self.layer(module), self.variants[variant].new(1)
        columns = layer.columns(x)
        expected = self.plain_columns(layer.module, x)
        assert len(columns) == len(expected) == layer.groups
        for found, right in zip(columns, expected, strict=True):
            if layer.trained[1]:
                assert torch.equal(found[-1], torch.ones(found.shape[1], dtype=found.dtype))
                found = found[:-1]
            assert_close(found, torch.from_numpy(right), atol=0, rtol=0)

    @torch.no_grad()
    def test_rows_times_columns_are_the_output(self, variant, module):
        layer, x = self.layer(module), self.variants[variant].new(1)
        rows = layer.rows(*layer.parameters).chunk(layer.groups)
        product = torch.cat([group @ columns for group, columns in zip(rows, layer.columns(x), strict=True)])
        assert_close(product, self.output_rows(layer.module, x), atol=1e-12, rtol=0)

    def test_rows_and_back(self, module):
        layer = self.layer(module)
        given = [None if p is None else torch.randn_like(p) for p in layer.parameters]
        assert_close(list(layer.from_rows(layer.rows(*given))), given, atol=0, rtol=0)

    def test_gathered_as_its_own_columns(self, variant, module):
        """Seen from outside while the network runs, whichever function applied the weight."""
        layer, x = self.layer(module), self.variants[variant].new(1)
        gathered = GradientProjectionMemory(module).gather(module, [x])
        for key, columns in zip(layer.keys, layer.columns(x), strict=True):
            assert_close(gathered[key].outer, columns @ columns.T, atol=1e-10, rtol=0)

    def test_gradients_are_those_without_protection_times_the_projector(self, variant, module):
        memory = self.remembering(module, variant)
        layer, x = memory.layers[next(iter(memory.layers))], self.variants[variant].new(2)

        def gradients() -> list[Tensor | None]:
            module.zero_grad()
            module(x).sin().square().sum().backward()
            return [None if p is None else p.grad for p in layer.parameters]

        plain = layer.rows(*gradients()).chunk(layer.groups)
        expected = [
            torch.from_numpy(reference.project(g, memory.bases[k])) for g, k in zip(plain, layer.keys, strict=True)
        ]
        with memory.protect():
            found = layer.rows(*gradients())
        assert_close(found, torch.cat(expected), atol=1e-11, rtol=0)

    def test_inside_protect_it_computes_what_it_computes_outside(self, variant, module):
        memory = self.remembering(module, variant)
        for x in (self.variants[variant].old(0), self.variants[variant].new(2)):
            outside = module(x)
            with memory.protect():
                assert torch.equal(module(x), outside)

    def test_a_frozen_layer_is_not_remembered(self, module):
        layer = self.layer(module)
        layer.all_parameters[0].requires_grad_(False)
        if layer.trained[1]:
            (other,) = find_layers(module).values()
            assert other.trained == (False, True)
            assert other.input_size == 1
            layer.all_parameters[1].requires_grad_(False)
        assert find_layers(module) == {}

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.filterwarnings("ignore:the weights of .* layers are bfloat16")
    def test_the_guarantee(self, variant, module, optimizer, precision):
        """With ε = 1 old outputs stay, while the loss of the new task falls."""
        dtype, autocast, bound = PRECISIONS[precision]
        model = module.to(dtype)
        old, new = (self.cast(x, dtype) for x in (self.variants[variant].old(0), self.variants[variant].new(2)))
        torch.manual_seed(1)
        target = torch.randn_like(model(new), dtype=torch.float32)
        memory = GradientProjectionMemory(model)
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            memory.update(model, [old], threshold=1.0)
        assert set(memory.full_layers) != set(memory.bases)
        with torch.no_grad():
            before, weights = model(old), copy.deepcopy(model.state_dict())
        optimize = OPTIMIZERS[optimizer](model.parameters())
        losses = []
        with memory.protect(optimize):
            for _ in range(STEPS):
                optimize.zero_grad()
                with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                    loss = (model(new).float() - target).square().mean()
                loss.backward()
                optimize.step()
                losses.append(loss.item())
        with torch.no_grad():
            moved = (model(old) - before).double().norm() / before.double().norm()
        DRIFT[self.layer(model).kind, optimizer, precision].append(moved.item())
        assert moved < bound
        assert losses[-1] < 0.999 * losses[0]
        assert not all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
        verified = memory.verify(model, old)
        assert verified.holds, str(verified)
        if dtype != torch.bfloat16:
            assert all(ratio is None or ratio < bound for ratio in memory.leak(weights).values())

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype) if x.is_floating_point() else x

    def remembering(self, model: nn.Module, variant: str) -> GradientProjectionMemory:
        memory = GradientProjectionMemory(model)
        memory.update(model, [self.variants[variant].old(0)], threshold=1.0)
        return memory


def drift_table() -> str:
    """The most that old outputs moved, of all variants of a kind, in Markdown: kinds and optimisers by dtypes."""
    names = list(PRECISIONS)
    lines = ["| layer | optimiser | " + " | ".join(names) + " |", "|---|---|" + "---:|" * len(names)]
    for kind, optimizer in dict.fromkeys((kind, optimizer) for kind, optimizer, _ in DRIFT):
        cells = [max(DRIFT.get((kind, optimizer, name), []), default=None) for name in names]
        lines.append(f"| {kind} | {optimizer} | " + " | ".join("" if c is None else f"{c:.0e}" for c in cells) + " |")
    return "\n".join(lines)
