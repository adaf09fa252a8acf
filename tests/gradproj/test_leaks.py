"""What cannot be held is named: weights used elsewhere, modules replaced, statistics that move."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from gradproj import GradientProjectionMemory
from gradproj.errors import InputError
from tests.gradproj.learned import NEW, OLD, D, Learned, mlp, remembering


class OutsideUse(nn.Module):
    """A weight that is also used by `use(h, weight)`."""

    def __init__(self, use) -> None:
        super().__init__()
        self.a, self.b, self.use = nn.Linear(D, D, bias=False), nn.Linear(D, 3), use

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.use(self.a(x), self.a.weight))


class Parent(nn.Module):
    """Applies the weight of a module that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.linear(x, self.a.weight, self.a.bias).relu())


class MovingMean(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.a, self.in_place = nn.Linear(D, D), in_place
        self.register_buffer("mean", torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
            self.mean = self.mean.copy_(mean) if self.in_place else mean
        return self.a(x - self.mean)


class Renormalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D, bias=False), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.a.weight.data = self.a.weight.data / self.a.weight.data.norm(dim=1, keepdim=True)
        return self.b(self.a(x))


class Tied(nn.Module):
    """A head that lends its weight to a kind of module that is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head, self.bend = nn.Linear(D, D), nn.Linear(D, D), nn.Bilinear(1, 1, 1)
        self.bend.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x))


class TestLeaks:
    @pytest.mark.parametrize(
        ("use", "name"),
        [
            (lambda h, w: F.linear(h, w.T), "T"),
            (lambda h, w: h @ w, "matmul|__matmul__"),
            (lambda h, w: torch.einsum("bi,ij->bj", h, w), "einsum"),
            (lambda h, w: h * w.norm(), "norm"),
            (lambda h, w: F.linear(h, w[:, :]), "__getitem__"),
        ],
    )
    def test_a_weight_that_is_used_otherwise_too(self, use, name):
        learned = Learned(OutsideUse(use))
        assert not learned.verified.holds
        (said,) = [s for s in learned.said if "also used" in s]
        assert "the weight of a is also used by" in said
        assert any(f" by {n}, which is not projected: old tasks may be forgotten" in said for n in name.split("|"))
        assert str(learned.memory.check(learned.memory.model, OLD)).count("the weight of a is also used by") == 1

    def test_a_weight_that_the_parent_applies_is_protected_there(self):
        learned = Learned(Parent())
        assert learned.verified.holds
        assert learned.has_learned
        assert not learned.said

    def test_also_after_saving_and_loading(self, tmp_path):
        model = Parent()
        memory = GradientProjectionMemory(model)
        memory.update(model, [OLD], threshold=1.0)
        memory.save(tmp_path / "memory.pt")
        again = GradientProjectionMemory(model)
        again.load(tmp_path / "memory.pt")
        before = model(OLD).detach()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with again.protect(optimizer):
            model(NEW).square().mean().backward()
            optimizer.step()
        assert_close(model(OLD), before, atol=1e-6, rtol=0)

    def test_uses_outside_any_module(self):
        model = nn.ModuleDict({"a": nn.Linear(D, D, bias=False), "b": nn.Linear(D, 3)})
        learned = Learned(model, forward=lambda x: model["b"](F.linear(x, model["a"].weight)))
        assert not learned.verified.holds
        assert learned.said == [
            "a gradient of a came past its projection, or is left from before: old tasks may be forgotten through it",
        ]

    @pytest.mark.parametrize("in_place", [False, True])
    def test_buffers_that_training_moves(self, in_place):
        learned = Learned(MovingMean(in_place))
        assert learned.said == [
            "mean is changed by the forward pass itself: old tasks may be forgotten through it",
        ]
        assert learned.verified.others == ["mean"]
        assert not learned.verified.holds

    def test_weights_that_the_forward_changes(self):
        learned = Learned(Renormalised())
        assert "a.weight is changed by the forward pass itself: old tasks may be forgotten through it" in learned.said
        assert not learned.verified.holds

    def test_a_module_replaced_since(self):
        memory = remembering(model := mlp())
        model[2] = nn.Linear(8, 8)
        with pytest.raises(InputError, match="^module 2 was replaced since this memory was made"):
            with memory.protect():
                pass

    def test_a_module_added_since(self):
        memory = remembering(model := mlp())
        model.append(nn.Linear(4, 4))
        with pytest.warns(UserWarning, match=r"^not protected, .*: 5.weight, 5.bias;"):
            with memory.protect():
                pass

    def test_a_layer_unfrozen_since(self):
        model = mlp()
        model[0].requires_grad_(False)
        memory = remembering(model)
        model[0].requires_grad_(True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.warns(UserWarning, match=r"^not protected, .*: 0.weight, 0.bias;"):
            with memory.protect(optimizer):
                model(NEW).square().mean().backward()
                optimizer.step()
        verified = memory.verify(model, OLD)
        assert verified.others == ["0.weight", "0.bias"]
        assert not verified.holds

    def test_a_layer_frozen_since(self):
        model = mlp()
        memory = GradientProjectionMemory(model)
        model[0].requires_grad_(False)
        memory.update(model, [OLD], threshold=1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with memory.protect(optimizer):
            model(NEW).square().mean().backward()
            optimizer.step()
        verified = memory.verify(model, OLD)
        assert verified.holds
        assert verified.layers["0"].moved == 0

    def test_a_head_added_since_does_not_touch_old_outputs(self):
        model = nn.ModuleDict({"body": nn.Linear(D, 4), "heads": nn.ModuleList([nn.Linear(4, 2)])})
        memory = GradientProjectionMemory(model, exclude="heads")
        memory.update(lambda x: model["heads"][0](model["body"](x)), [OLD], threshold=1.0)
        model["heads"].append(nn.Linear(4, 2))
        optimizer = torch.optim.SGD([*model["body"].parameters(), *model["heads"][1].parameters()], lr=0.1)
        with memory.protect(optimizer):
            model["heads"][1](model["body"](NEW)).square().mean().backward()
            optimizer.step()
        assert memory.verify(lambda x: model["heads"][0](model["body"](x)), OLD).holds

    def test_another_number_of_inputs_since(self):
        memory = remembering(model := mlp())
        model[4].weight = nn.Parameter(torch.randn(4, 9))
        with pytest.raises(InputError, match="^layer 4 has 10 inputs, but had 9 when this memory was made"):
            with memory.protect():
                pass

    def test_more_outputs_since_can_train_but_not_be_compared(self):
        memory = remembering(model := mlp())
        model[4].weight, model[4].bias = nn.Parameter(torch.randn(7, 8)), nn.Parameter(torch.zeros(7))
        with memory.protect():
            model(NEW).square().mean().backward()
        with pytest.raises(InputError, match=r"^4.weight, 4.bias had another shape when it was remembered"):
            memory.verify(model, OLD)


def test_a_weight_of_an_excluded_module_that_another_one_has_too_is_named():
    with pytest.warns(UserWarning, match=r"through them: bend\.bias, head\.weight; freeze"):
        GradientProjectionMemory(Tied(), exclude=["head"])


def test_leak_shows_a_full_layer_that_has_moved():
    layer = nn.Linear(D, D, bias=False)
    memory = GradientProjectionMemory(layer)
    memory.update(layer, [torch.eye(D)], threshold=1.0)
    before = {name: p.clone() for name, p in layer.state_dict().items()}
    assert memory.leak(before) == {"": None}
    layer.weight.data += 0.1
    assert memory.leak(before)[""] == pytest.approx(1, abs=1e-6)


def test_warnings_are_of_the_line_that_called_the_library():
    with pytest.warns(UserWarning, match="^not protected") as caught:
        GradientProjectionMemory(nn.ModuleDict({"a": nn.Linear(D, D), "b": nn.LSTM(D, D)}))
    assert caught[0].filename == __file__
