"""What check, verify, leak and the table of a memory say."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from gradproj import GradientProjectionMemory
from gradproj.errors import FullLayerWarning, InputError
from tests.gradproj.learned import NEW, OLD, D, Learned, mlp, remembering


class TestCheck:
    def test_says_before_the_first_task_what_will_be(self):
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.unused = nn.Linear(D, 3), nn.Linear(3, 2), nn.Linear(2, 2)
                self.scale = nn.Parameter(torch.ones(2))

            def forward(self, x: Tensor) -> Tensor:
                return self.b(self.a(x)) * self.scale

        model = Net()
        with pytest.warns(UserWarning, match="^not protected, .*: scale;"):
            memory = GradientProjectionMemory(model)
        check = memory.check(model, torch.randn(20, D))
        assert check.silent == ["unused"]
        assert check.full == ["a", "b"]
        assert check.unprotected == ["scale"]
        assert check.columns == {"a": 20, "b": 20, "unused": 0}
        assert check.seconds > 0
        assert (memory.n_updates, memory.columns) == (0, {"a": 0, "b": 0, "unused": 0})
        for said in ("do not run, so exclude them: unused", "learn no more: a, b", "without protection: scale", "GiB"):
            assert said in str(check)

    def test_full_as_far_as_the_threshold_says(self):
        memory = GradientProjectionMemory(model := mlp())
        assert "0" not in memory.check(model, torch.randn(20, D), threshold=0.5).full


def test_training_in_full_directions_alone_is_no_leak():
    """What is left of each gradient is rounding."""
    learned = Learned(mlp(), new=OLD)
    assert not learned.said
    assert learned.verified.holds


class TestVerify:
    def test_rounding_grows_with_the_steps_taken(self):
        explained = []
        for steps in (1, 100):
            memory = remembering(model := mlp())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            with memory.protect(optimizer):
                model(NEW).square().mean().backward()
                for _ in range(steps):
                    optimizer.step()
            explained.append(memory.verify(model, OLD).layers["0"].explained)
        assert explained[1] == pytest.approx(10 * explained[0], rel=0.3)

    def test_before_anything_is_remembered(self):
        with pytest.raises(InputError, match="^there is nothing to compare with"):
            GradientProjectionMemory(model := mlp()).verify(model, OLD)

    def test_on_inputs_that_the_memory_has_not_seen(self):
        memory = GradientProjectionMemory(model := mlp())
        batch = torch.randn(40, D)
        memory.update(model, [batch], threshold=0.8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with memory.protect(optimizer):
            model(NEW).square().mean().backward()
            optimizer.step()
        verified = memory.verify(model, batch)
        columns = torch.cat([batch, torch.ones(40, 1)], dim=1).T.double()
        M = memory.bases["0"]
        expected = (columns - M @ M.T @ columns).norm() / columns.norm()
        assert verified.layers["0"].outside == pytest.approx(expected.item(), rel=1e-6)
        assert verified.moved > verified.explained
        assert verified.holds
        assert "what the bases hold has not moved; outputs moved by the inputs outside them" in str(verified)

    def test_weights_changed_by_hand(self):
        memory = remembering(model := mlp())
        with torch.no_grad():
            model[2].weight += 1e-5
        verified = memory.verify(model, OLD)
        assert not verified.holds
        assert "the guarantee does NOT hold" in str(verified)
        assert 1e-6 < verified.layers["2"].explained * 10 < 1e-4
        assert verified.layers["2"].inside > verified.layers["2"].explained
        assert verified.layers["0"].moved == 0

    def test_rows_of_an_embedding(self):
        """Of four rows that are looked up, two are known; of those that moved, one is."""
        memory = GradientProjectionMemory(table := nn.Embedding(9, 3))
        memory.update(table, [torch.tensor([1, 2])], threshold=1.0)
        with torch.no_grad():
            table.weight.fill_(1.0)
            memory.replace(memory.bases)
            table.weight[[2, 3, 4]] += 1e-3
        found = memory.verify(table, torch.tensor([1, 2, 3, 8])).layers[""]
        assert found.moved == pytest.approx((2 / 4) ** 0.5 * 1e-3, rel=1e-4)
        assert found.inside == pytest.approx((1 / 4) ** 0.5 * 1e-3, rel=1e-4)
        assert found.outside == pytest.approx(0.5**0.5)

    @pytest.mark.parametrize("order", [(1, 100), (100, 1)])
    def test_of_a_layer_that_is_applied_twice_where_it_moved_most(self, order):
        layer = nn.Linear(D, 3)
        memory = GradientProjectionMemory(layer)

        def forward(x):
            return sum(layer(x * torch.cat([torch.ones(D - 1), torch.ones(1) * by])) for by in order)

        memory.update(forward, [OLD + 1], threshold=0.5)
        with torch.no_grad():
            layer.weight[:, -1] += 1e-3
        apart = [
            memory.verify(lambda x, by=by: layer(x * torch.cat([torch.ones(D - 1), torch.ones(1) * by])), OLD + 1)
            for by in (1, 100)
        ]
        found = memory.verify(forward, OLD + 1).layers[""].moved
        assert found == max(each.layers[""].moved for each in apart) > min(each.layers[""].moved for each in apart)

    def test_an_unprotected_parameter_of_another_shape(self):
        model = mlp()
        model.scale = nn.Parameter(torch.ones(1))
        with pytest.warns(UserWarning, match="^not protected"):
            memory = remembering(model)
        model.scale = nn.Parameter(torch.ones(2))
        verified = memory.verify(model, OLD)
        assert verified.others == ["scale"] and not verified.holds

    def test_a_parameter_that_has_come_since(self):
        """Counts where the outputs depend on it; how they moved by it is not known, and said so."""
        model = mlp()
        memory = remembering(model)
        model.append(nn.Linear(4, 4))
        model.register_parameter("unused", nn.Parameter(torch.ones(2)))
        with pytest.warns(UserWarning, match="^not protected"):
            verified = memory.verify(model, OLD)
        assert verified.others == verified.unknown == ["5.weight", "5.bias"] and not verified.holds
        assert "; not counted is what comes of 5.weight, 5.bias\n" in str(verified)

    def test_a_frozen_number_that_decides_the_outputs_shape(self):
        model = mlp()
        model.n = nn.Parameter(torch.tensor(3.0), requires_grad=False)
        memory = remembering(model)
        model.n.data -= 1
        assert memory.verify(lambda x: model(x)[:, : int(model.n)], OLD).others == ["n"]

    def test_outputs_that_are_infinite_or_nan(self):
        """As those of classes that are masked out."""
        model = mlp()
        nothing = torch.tensor([0, -torch.inf, torch.nan, 0])
        memory = remembering(model)
        assert memory.verify(lambda x: model(x) + nothing, OLD).moved == 0
        with torch.no_grad():
            model[4].bias[0] += 1
        assert 0.01 < memory.verify(lambda x: model(x) + nothing, OLD).moved < 10

    def test_leaves_the_model_as_it_is(self):
        memory = remembering(model := mlp())
        before = copy.deepcopy(model.state_dict())
        model.train()
        memory.verify(model, OLD)
        assert_close(dict(model.state_dict()), dict(before), atol=0, rtol=0)
        assert all(module.training for module in model.modules())

    def test_outputs_of_zero(self):
        model = mlp()
        nn.init.zeros_(model[4].weight)
        nn.init.zeros_(model[4].bias)
        verified = remembering(model).verify(model, OLD)
        assert verified.moved == 0
        assert verified.holds


def test_leak_is_none_where_nothing_moved():
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
    memory = GradientProjectionMemory(model)
    with pytest.warns(FullLayerWarning, match="^0 is full"):
        memory.update(model, [torch.randn(3, 2)], threshold=1.0)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with memory.protect(optimizer):
        model(torch.randn(9, 2)).square().mean().backward()
        optimizer.step()
    leak = memory.leak(before)
    assert leak["0"] is None
    assert leak["2"] < 1e-5


def test_selection_by_pattern_and_by_module():
    model = nn.ModuleDict({"blocks": nn.ModuleList([mlp(), mlp()]), "head": nn.Linear(4, 2)})
    assert set(GradientProjectionMemory(model, include="blocks.*.0", exclude=model["blocks"][1]).layers) == {
        "blocks.0.0"
    }
    with pytest.raises(InputError, match="^include names 'block.[?]', which is not a module of ModuleDict$"):
        GradientProjectionMemory(model, include="block.?")


def test_the_table_of_a_memory():
    model = nn.Sequential(nn.Linear(D, 8), nn.LayerNorm(8), nn.Conv1d(3, 2, 1, groups=1), nn.Bilinear(2, 2, 2))
    with pytest.warns(UserWarning, match="^not protected"):
        memory = GradientProjectionMemory(model)
    text = repr(memory).splitlines()
    assert text[0].split() == ["layer", "kind", "d", "k", "share", "state"]
    assert text[2].split() == ["0", "Linear", "7", "0", "0", "%", "protected"]
    assert any("LayerNorm" in line and "frozen from the second task on" in line for line in text)
    assert any("Bilinear" in line and "not protected: weight, bias" in line for line in text)
