"""How the bases of all layers grow: what is shared, what stays, and what is said to be lost."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from gradproj import GradientProjectionMemory
from gradproj.errors import InputError


class Twins(nn.Module):
    """Two layers that are given the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 2, bias=False), nn.Linear(8, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x)


INPUTS = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0, 0, 0, 0, 0]))  # energies 16, 9, 4, 1


def test_layers_with_the_same_inputs_share_a_basis():
    memory = GradientProjectionMemory(Twins())
    memory.update(memory.model, [INPUTS], threshold=0.8)
    assert memory.bases["one"] is memory.bases["two"] and memory.columns["one"] == 2


@pytest.mark.parametrize("more", [0.96, 1.0])
def test_but_not_where_they_remember_another_share(more):
    memory = GradientProjectionMemory(Twins())
    memory.update(memory.model, [INPUTS], threshold={"one": 0.8, "two": more})
    assert memory.columns == {"one": 2, "two": 3 if more < 1 else 4}


def test_rows_of_earlier_tasks_stay():
    memory = GradientProjectionMemory(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), exclude=["1"])
    for rows in ([1, 2], [5]):
        memory.update(memory.model, [torch.tensor(rows)], threshold=0.9)
    assert memory.bases["0"].tolist() == [1, 2, 5]


@pytest.mark.parametrize(("threshold", "lost"), [(0.8, False), (0.9, True)])
def test_what_the_most_columns_leave_out_is_said(threshold, lost):
    """Two columns hold 25 of 30."""
    memory = GradientProjectionMemory(Twins())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        memory.update(memory.model, [INPUTS], threshold=threshold, max_columns=2)
    said = [str(w.message) for w in caught]
    assert said == ["one has 2 columns, the most allowed; they hold 0.8333 of its inputs' energy"] * lost


@pytest.mark.parametrize("threshold", [0.0, -1, 1.5, {"one": 0.9, "two": 0}])
def test_shares_that_are_none(threshold):
    memory = GradientProjectionMemory(Twins())
    with pytest.raises(InputError, match=r"it must be in \(0, 1\]"):
        memory.update(memory.model, [INPUTS], threshold=threshold)


def test_a_look_before_training_tells_what_the_update_will_fill():
    """With ε = 1, also by samples that are short beside others."""
    model = nn.Sequential(nn.Linear(6, 2, bias=False))
    samples = torch.eye(6)
    samples[-1] *= 1e-9
    memory = GradientProjectionMemory(model)
    found = memory.check(model, samples.repeat(2, 1))
    with pytest.warns(UserWarning, match="full"):
        memory.update(model, samples.repeat(2, 1), threshold=1.0)
    assert memory.columns == {"0": 6} and list(found.full) == ["0"]
