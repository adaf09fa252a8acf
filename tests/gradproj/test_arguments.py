"""What a user may give: the same whether a list or an iterator, refused in one line where it makes no sense."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from gradproj import GradientProjectionMemory
from gradproj.errors import InputError
from tests.gradproj.learned import NEW, OLD, D, mlp, remembering


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 0}, "rows is 0; it must be a whole number, 1 or more"),
        ({"rows": 2.5}, "rows is 2.5"),
        ({"max_columns": -1}, "max_columns is -1"),
        ({"samples": ["0"]}, "samples is a list; it must be a dict"),
        ({"mask": lambda batch: torch.ones(2)}, r"mask is \(2,\), but the batch is \(3, 6\)"),
    ],
)
def test_update(arguments, message):
    memory = GradientProjectionMemory(mlp())
    with pytest.raises(InputError, match=f"^{message}"):
        memory.update(memory.model, OLD, threshold=1.0, **arguments)
    assert memory.n_updates == 0


def test_a_model_that_is_none():
    with pytest.raises(InputError, match="^model is a NoneType; it must be a torch.nn.Module$"):
        GradientProjectionMemory(None)


def test_an_optimizer_that_is_none():
    with pytest.raises(InputError, match="^optimizer is a NoneType"), remembering(mlp()).protect([None]):
        pass


@pytest.mark.parametrize("damage", [{}, [], {"bases": {}}], ids=str)
def test_a_state_that_is_none(damage):
    with pytest.raises(InputError, match="^this is no memory's state"):
        GradientProjectionMemory(mlp()).load_state_dict(damage)


@pytest.mark.parametrize("factor", [3.0, torch.nan])
def test_a_state_whose_bases_are_not_orthonormal(factor):
    state = remembering(mlp()).state_dict()
    state["bases"]["2"] = state["bases"]["2"] * factor
    with pytest.raises(InputError, match="^the saved basis of 2 is damaged"):
        GradientProjectionMemory(mlp()).load_state_dict(state)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2)) for _ in range(2))
        self.body = nn.Linear(D, 8)

    def forward(self, x):
        return self.heads[0](self.body(x))


@pytest.mark.parametrize(
    "exclude", [lambda heads: iter(heads), lambda heads: heads.children(), lambda heads: ["heads"]]
)
def test_excluded_modules_stay_excluded_whatever_named_them(exclude):
    """An iterator can be gone through once only."""
    model = Heads()
    memory = GradientProjectionMemory(model, exclude=exclude(model.heads))
    memory.update(model, [OLD], threshold=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.heads[0][0].weight.clone()
    with memory.protect(optimizer):
        model(NEW).square().mean().backward()
        optimizer.step()
    assert list(memory.layers) == ["body"]
    assert not torch.equal(model.heads[0][0].weight, before)


def test_nothing_excluded():
    assert list(GradientProjectionMemory(mlp(), exclude=None).layers) == ["0", "2", "4"]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_a_bias_frozen_inside(make):
    model = mlp()
    memory = remembering(model)
    optimizer = make(model.parameters(), lr=0.1)
    with memory.protect(optimizer):
        model[0].bias.requires_grad_(False)
        with pytest.raises(InputError, match=r"^of layer 0 the weight or the bias was frozen inside protect\(\)"):
            model(NEW.repeat(9, 1)).square().mean().backward()


def test_a_layer_trained_again_inside():
    """It was frozen when protection began."""
    model = mlp()
    memory = remembering(model)
    model[0].requires_grad_(False)
    before = model(OLD)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with memory.protect(optimizer):
        model[0].requires_grad_(True)
        for _ in range(4):
            optimizer.zero_grad()
            model(NEW).square().mean().backward()
            optimizer.step()
    assert memory.verify(model, OLD).holds
    torch.testing.assert_close(model(OLD), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("n", "d"), [(60, 200), (60, 16)])
def test_one_large_value_hides_no_other_sample(n, d):
    """With ε = 1, whether R or R Rᵀ is kept; the other rows are 1e7 times shorter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d, 32), nn.Tanh(), nn.Linear(32, 3))
    old = torch.randn(n, d) * (torch.arange(d) % 3 == 0)
    old[0, 3] = 1e7
    memory = GradientProjectionMemory(model, exclude=["2"])
    model[2].requires_grad_(False)
    memory.update(model, [old], threshold=1.0)
    before = model(old).detach()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with memory.protect(optimizer):
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.randn(8, d)).square().mean().backward()
            optimizer.step()
    moved = (model(old) - before).norm(dim=1) / before.norm(dim=1)
    assert moved.max() < 1e-4
    assert memory.verify(model, old).holds


@pytest.mark.parametrize("shape", [(7, 4, D), (28, D)], ids=["positions first", "one axis"])
def test_a_mask_of_samples_and_positions_in_other_layouts(shape):
    mask = torch.zeros(4, 7)
    mask[:, :2] = 1
    memory = GradientProjectionMemory(nn.Sequential(nn.Linear(D, 9, bias=False)))
    batch = torch.zeros(shape)
    batch[..., 0] = 1
    memory.update(memory.model, batch, threshold=1.0, mask=lambda _: mask)
    assert memory.columns == {"0": 1}


@pytest.mark.parametrize("shape", [(6, 6, D), (36, D)], ids=["as many samples as positions", "one axis"])
@pytest.mark.parametrize("turned", [False, True], ids=["samples first", "positions first"])
def test_a_mask_that_may_be_read_in_two_ways_leaves_out_nothing_that_counts(shape, turned):
    mask = torch.zeros(6, 6)
    mask[0, :2] = 1
    memory = GradientProjectionMemory(nn.Sequential(nn.Linear(D, 9, bias=False)))
    batch = torch.zeros(6, 6, D)
    batch[0, :2, :2] = torch.eye(2)  # what counts
    batch[4:, 4:, 2] = 1
    batch = (batch.transpose(0, 1) if turned else batch).reshape(shape)
    memory.update(memory.model, batch, threshold=1.0, mask=lambda _: mask)
    held = memory.bases["0"].square().sum(1)  # of each input
    assert held.round(decimals=9).tolist() == [1, 1, 0, 0, 0, 0]


def test_a_forward_that_is_refused_leaves_the_parameters_in_their_places():
    model = nn.MultiheadAttention(D, 1, batch_first=True)
    memory = GradientProjectionMemory(model)
    forward = lambda x: model(x, x, x)[0]  # noqa: E731
    memory.update(forward, [torch.randn(2, 2, D)], threshold=0.9)
    parameters = dict(model.named_parameters())
    with memory.protect(), pytest.raises(InputError, match="frozen inside"):
        model.out_proj.bias.requires_grad_(False)
        forward(torch.randn(2, 2, D))
    assert dict(model.named_parameters()) == parameters


def test_nothing_outlives_a_memory():
    """Its bases may be large, and the garbage collector counts objects, not bytes."""
    model = mlp()
    memory = remembering(model)
    gc.collect()
    gc.disable()
    try:
        with memory.protect() as projectors:
            model(NEW).square().mean().backward()
        gone = [weakref.ref(thing) for thing in (projectors["0"], memory, model)]
        del projectors, memory, model
        assert [ref() for ref in gone] == [None] * 3
    finally:
        gc.enable()


def test_matrices_that_layers_do_not_share_are_planned_apart():
    """Two layers of one input, of which one remembers all of it."""
    model = nn.ModuleList(nn.Linear(100, 2, bias=False) for _ in range(2))
    memory, runs = GradientProjectionMemory(model), []

    def forward(x):
        runs.append(1)
        return model[0](x) + model[1](x)

    memory.update(forward, [torch.randn(30, 100)], threshold={"0": 1.0, "1": 0.9}, max_memory=8 * 100**2)
    assert len(runs) == 3  # who shares what, and a pass for each
