"""Embeddings, alone and tied to an output head: rows that were looked up stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from gradproj import GradientProjectionMemory
from gradproj.layers import find_layers
from tests.gradproj.layers.case import LayerCase, Variant


def indices(*shape: int, below: int, first: int = 0):
    """By seed, rows of a table."""
    return lambda seed: torch.randint(first, below, shape, generator=torch.Generator().manual_seed(seed))


class TestEmbedding(LayerCase):
    variants = {
        "plain": Variant(lambda: nn.Embedding(12, 5), indices(2, 3, below=6), indices(4, 3, below=12)),
        "padding": Variant(lambda: nn.Embedding(12, 5, padding_idx=0), indices(2, 3, below=6), indices(4, 3, below=12)),
    }

    def test_columns_are_those_of_plain_loops(self, variant, module):
        x = self.variants[variant].new(1)
        (seen,) = self.layer(module).seen(x, nn.functional.embedding, {"input": x})
        assert torch.equal(seen["0"], x.flatten())

    @torch.no_grad()
    def test_rows_times_columns_are_the_output(self, variant, module):
        layer, x = self.layer(module), self.variants[variant].new(1)
        one_hot = nn.functional.one_hot(x.flatten(), 12).double().T
        assert_close(layer.rows(*layer.parameters) @ one_hot, module(x).flatten(0, -2).T)

    def test_gathered_as_its_own_columns(self, variant, module):
        x = self.variants[variant].old(1)
        memory = GradientProjectionMemory(module)
        memory.update(module, [x], threshold=0.5)
        assert memory.bases["0"].tolist() == sorted(set(x.flatten().tolist()))

    def test_gradients_are_those_without_protection_times_the_projector(self, variant, module):
        memory, x = self.remembering(module, variant), self.variants[variant].new(2)
        module(x).sin().square().sum().backward()
        expected = module[0].weight.grad.clone()
        expected[memory.bases["0"]] = 0
        module.zero_grad()
        with memory.protect():
            module(x).sin().square().sum().backward()
        assert_close(module[0].weight.grad, expected, atol=0, rtol=0)

    def test_rows_of_old_tasks_do_not_move_at_all(self, variant, module):
        memory, before = self.remembering(module, variant), module[0].weight.detach().clone()
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        with memory.protect(optimizer):
            module(self.variants[variant].new(2)).square().sum().backward()
            optimizer.step()
        rows = memory.bases["0"]
        assert torch.equal(module[0].weight[rows], before[rows])
        assert not torch.equal(module[0].weight, before)


class Tied(nn.Module):
    """A table that looks words up and scores them, as GPT-2's."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table, self.head = table, nn.Linear(5, 12, bias=False)
        self.head.weight = table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).tanh())


class TestTiedEmbedding(TestEmbedding):
    """Fewer words than dimensions, so that columns too are free."""

    variants = {"plain": Variant(lambda: nn.Embedding(12, 5), indices(1, 3, below=4), indices(6, 3, below=12))}

    def model(self, module: nn.Module) -> nn.Module:
        return Tied(module)

    def test_columns_are_those_of_plain_loops(self, variant, module):
        layer, x = self.layer(module), torch.randn(2, 3, 5)
        (seen,) = layer.seen(x, nn.functional.linear, {"input": x})
        assert torch.equal(seen["head"], x.flatten(0, 1).T)

    def test_rows_times_columns_are_the_output(self, variant, module):
        layer, x = self.layer(module), self.variants[variant].new(1)
        hidden = module.table(x).tanh().flatten(0, 1)
        assert_close(layer.rows(*layer.parameters) @ hidden.T, module(x).flatten(0, 1).T)

    def test_gathered_as_its_own_columns(self, variant, module):
        x = self.variants[variant].new(1)
        gathered = GradientProjectionMemory(module).gather(module, [x])
        hidden = module.table(x).tanh().flatten(0, 1).detach()
        assert gathered["table"].seen.nonzero().flatten().tolist() == sorted(set(x.flatten().tolist()))
        assert_close(gathered["head"].outer, hidden.T @ hidden, atol=1e-10, rtol=0)

    def test_gradients_are_those_without_protection_times_the_projector(self, variant, module):
        memory, x = self.remembering(module, variant), self.variants[variant].new(2)
        module(x).sin().square().sum().backward()
        M = memory.bases["head"]
        expected = module.head.weight.grad @ (torch.eye(5, dtype=M.dtype) - M @ M.T)
        expected[memory.bases["table"]] = 0
        module.zero_grad()
        with memory.protect():
            module(x).sin().square().sum().backward()
        assert_close(module.head.weight.grad, expected, atol=1e-12, rtol=0)

    def test_rows_of_old_tasks_do_not_move_at_all(self, variant, module):
        memory, before = self.remembering(module, variant), module.head.weight.detach().clone()
        with memory.protect(optimizer := torch.optim.AdamW(module.parameters(), lr=0.1)):
            module(self.variants[variant].new(2)).square().sum().backward()
            optimizer.step()
        rows = memory.bases["table"]
        assert torch.equal(module.head.weight[rows], before[rows])


@pytest.mark.parametrize("bias", [False, True])
def test_a_tied_head_with_a_bias_takes_it_along(bias):
    torch.manual_seed(0)
    model = Tied(nn.Embedding(12, 5))
    if bias:
        model.head.bias = nn.Parameter(torch.zeros(12))
    (layer,) = find_layers(model).values()
    assert layer.sizes == {"table": 12, "head": 5 + bias}
    memory = GradientProjectionMemory(model)
    old, new = torch.tensor([[1, 2]]), torch.tensor([[7, 8, 9]])
    memory.update(model, [old], threshold=1.0)
    before = model(old).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with memory.protect(optimizer):
        model(new).square().sum().backward()
        optimizer.step()
    assert_close(model(old), before, atol=1e-6, rtol=0)
    assert memory.verify(model, old).holds


def test_two_embeddings_of_one_table_are_one_layer():
    one, other = nn.Embedding(6, 3), nn.Embedding(6, 3)
    other.weight = one.weight

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = one, other

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x[0]) + self.other(x[1])

    model = Both()
    memory = GradientProjectionMemory(model)
    assert list(memory.layers) == ["one"]
    memory.update(model, [torch.tensor([[0, 1], [2, 2]])], threshold=1.0)
    assert memory.bases["one"].tolist() == [0, 1, 2]
    with memory.protect():
        model(torch.tensor([[1, 3], [2, 4]])).sum().backward()
    assert one.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [3, 4]
