"""The memory on networks of users' own: what it protects, what it warns of, what it refuses."""

from __future__ import annotations

import copy
import io
import sys
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from gradproj import GradientProjectionMemory
from gradproj.errors import InputError

D = 6


def inputs(seed: int, n: int = 40) -> Tensor:
    """Images that use half of the directions, other ones for every seed."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=random) @ torch.randn(3, D, generator=random)


def train(model: nn.Module, seed: int, optimizer: torch.optim.Optimizer | None = None, steps: int = 5) -> None:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs(seed)).square().mean().backward()
        optimizer.step()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, 4))


def remembering(model: nn.Module, threshold: float = 0.99, **arguments) -> GradientProjectionMemory:
    memory = GradientProjectionMemory(model, **arguments)
    memory.update(model, [inputs(0)], threshold)
    return memory


class TestWhatIsFrozen:
    @pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, lambda n: nn.GroupNorm(2, n)])
    def test_normalisation(self, norm):
        model = nn.Sequential(nn.Linear(D, 8), norm(8), nn.Linear(8, 2))
        memory, before = remembering(model), copy.deepcopy(model[1].state_dict())
        for p in model[1].parameters():
            p.grad = torch.ones_like(p)  # left from whatever was done before
        with memory.protect():
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).step()
            train(model, 1)
        assert_close(model[1].state_dict(), before)
        assert all(p.requires_grad for p in model.parameters())

    def test_but_not_in_excluded_heads(self):
        model = nn.ModuleDict({"body": nn.Linear(D, 8), "heads": nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2))})
        memory = GradientProjectionMemory(model, exclude="heads")
        memory.update(lambda x: model["heads"](model["body"](x)), [inputs(0)], 0.9)
        with memory.protect():
            assert model["heads"][0].weight.requires_grad


class TestWarnings:
    def test_of_parameters_that_nothing_protects(self):
        with pytest.warns(UserWarning, match=r"^not protected, .*: 0.weight, 0.bias; freeze .* exclude their modules$"):
            memory = GradientProjectionMemory(nn.Sequential(nn.Bilinear(D, D, 2), nn.Linear(2, 2)))
        assert list(memory.layers) == ["1"]
        assert memory.unprotected == ["0.weight", "0.bias"]

    def test_not_of_frozen_or_excluded_ones(self):
        model = nn.Sequential(nn.Embedding(5, D).requires_grad_(False), nn.Linear(D, 2), nn.Bilinear(2, 2, 2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            GradientProjectionMemory(model, exclude=["2"])

    def test_of_running_statistics(self):
        with pytest.warns(UserWarning, match="^running statistics of 1 go on moving"):
            GradientProjectionMemory(nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4)))


class TestRefusals:
    def test_tied_weights(self):
        model = network()
        model.append(nn.Linear(8, 4))[3].weight = model[2].weight
        with pytest.raises(InputError, match=r"^layer 2 shares its weight with 3; exclude both$"):
            GradientProjectionMemory(model)
        with pytest.raises(InputError, match=r"^layer 2 shares its weight with 3; exclude both$"):
            GradientProjectionMemory(model, exclude="3")

    def test_parametrized_weights(self):
        model = network()
        nn.utils.parametrizations.weight_norm(model[0])
        with pytest.raises(InputError, match="^layer 0 makes its weight of other parameters; exclude it"):
            GradientProjectionMemory(model)

    @pytest.mark.parametrize("part", ["weight", "bias"])
    def test_half_frozen_layers(self, part):
        model = network()
        memory = remembering(model, 0.9)
        getattr(model[0], part).requires_grad_(False)
        with pytest.raises(InputError, match="^of layer 0 either the weight or the bias is frozen"):
            with memory.protect():
                pass
        assert "forward" not in vars(model[2])

    def test_update_within_protect(self):
        memory = remembering(network(), 0.9)
        with memory.protect():
            with pytest.raises(InputError, match="^update within protect"):
                memory.update(memory.model, [inputs(1)], 0.9)
        memory.update(memory.model, [inputs(1)], 0.9)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"threshold": {"0": 0.9}}, "threshold differs from the layers in 2; the layers are: 0, 2"),
            ({"threshold": {"0": 0.9, "2": 0.9, "fc": 0.9}}, "threshold differs from the layers in fc"),
            ({"threshold": "high"}, "threshold is 'high'; it must be a number"),
            ({"threshold": [0.9, 0.9]}, "threshold is .*; it must be a number, or one by layer name"),
            (
                {"samples": {"fc": 3}},
                "samples has 'fc': 3; it must give layers 1 or more: 0, 2",
            ),
            ({"samples": {"0": 0}}, "samples has '0': 0"),
            ({"batches": []}, "there are no batches to read representations from"),
            ({"batches": [torch.zeros(0, D)]}, "layers 0, 2 did not run .*or give images"),
        ],
    )
    def test_arguments(self, arguments, message):
        model = network()
        given = {"forward": model, "batches": [inputs(0)], "threshold": 0.9} | arguments
        with pytest.raises(InputError, match=f"^{message}"):
            GradientProjectionMemory(model).update(**given)

    def test_rank_rule(self):
        with pytest.raises(InputError, match="^rank_rule is 'Released'; it must be one of: paper, released$"):
            GradientProjectionMemory(network(), rank_rule="Released")


@pytest.mark.parametrize("threshold", [np.float32(0.9), torch.tensor(0.9), {"0": 0.9, "2": np.float64(0.9)}], ids=str)
def test_thresholds_of_any_numeric_kind(threshold):
    assert remembering(network(), threshold).columns == remembering(network(), 0.9).columns


def test_layers_called_by_keyword():
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(D, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=x)

    model = ByKeyword()
    memory = remembering(model)
    with memory.protect():
        model(inputs(1)).square().mean().backward()
    rows = torch.cat([model.fc.weight.grad, model.fc.bias.grad[:, None]], 1)
    assert (rows @ memory.bases["fc"].float()).norm() < 1e-5 * rows.norm()


def test_a_network_whose_layers_are_all_full_can_still_go_backward():
    model = network()
    memory = remembering(model, 1.0)
    for key, d in memory.input_sizes.items():
        memory.bases[key] = torch.eye(d, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    with memory.protect():
        train(model, 1)
    assert_close(model.state_dict(), before)


def test_a_layer_alone():
    model = nn.Linear(D, 3)
    memory, before = remembering(model), copy.deepcopy(model.state_dict())
    with memory.protect():
        train(model, 1)
    assert memory.leak(before)[""] < 1e-5


@pytest.mark.parametrize("full", [False, True])
def test_copies_made_within_protect_are_plain(full):
    model = network()
    memory = remembering(model)
    if full:
        memory.bases["0"] = torch.eye(D + 1, dtype=torch.float64)
    with memory.protect():
        copied = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
    buffer.seek(0)
    for other in (copied, torch.load(buffer, weights_only=False)):
        assert_close(other(inputs(1)), model(inputs(1)))
        model.zero_grad()
        for net in (model, other):
            net(inputs(1)).square().mean().backward()
        assert_close(other[0].weight.grad, model[0].weight.grad)
        with remembering(other).protect():  # and can be protected themselves
            other.zero_grad()
            other(inputs(2)).square().mean().backward()
        assert not torch.allclose(other[0].weight.grad, model[0].weight.grad)


@pytest.mark.parametrize("kept", [False, True])
def test_momentum_kept_from_an_earlier_task_needs_protect_update(kept):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, 0, optimizer)
    memory, before = remembering(model), copy.deepcopy(model.state_dict())
    if not kept:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with memory.protect(), memory.protect_update(optimizer) if kept else nullcontext():
        train(model, 1, optimizer)
    assert max(memory.leak(before).values()) < 1e-4


def test_distributed_data_parallel(tmp_path, monkeypatch):
    """Layers without a gradient (frozen norms, a full layer) do not stall its reduction."""
    if sys.platform == "linux":  # where this machine's own name cannot be looked up
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 8), nn.LayerNorm(8), nn.Linear(8, 5), nn.Linear(5, 4))
    results = []
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        for wrap in (lambda m: DistributedDataParallel(m, find_unused_parameters=True), lambda m: m):
            copied = copy.deepcopy(model)
            wrapped, memory = wrap(copied), remembering(copied)
            memory.bases["3"] = torch.eye(6, dtype=torch.float64)  # full: it gets no gradient at all
            with memory.protect():
                train(wrapped, 1, steps=3)
            results.append(copied.state_dict())
    finally:
        torch.distributed.destroy_process_group()
    assert_close(*results)
