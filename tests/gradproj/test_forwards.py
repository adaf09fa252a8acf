"""The guarantee on networks whose layers do what they like in their forward, and in half precision."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from gradproj import GradientProjectionMemory
from gradproj.errors import FullLayerWarning, InputError
from tests.gradproj.learned import NEW, OLD, D, Learned, mlp


class TestHalfPrecision:
    def test_bfloat16_columns_are_all_kept(self):
        model = nn.Sequential(nn.Linear(4096, 64)).bfloat16()
        memory = GradientProjectionMemory(model)
        memory.update(model, [torch.randn(300, 4096).bfloat16()], threshold=1.0)
        assert memory.columns == {"0": 300}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_update_under_autocast(self, dtype):
        model, old = mlp(), OLD
        memory = GradientProjectionMemory(model)
        with torch.autocast("cpu", dtype=dtype):
            memory.update(model, [old], threshold=1.0)
        assert memory.columns == {"0": 3, "2": 3, "4": 3}

    def test_bfloat16_weights_are_warned_of_once_and_measured(self):
        learned = Learned(mlp().bfloat16(), old=OLD.bfloat16(), new=NEW.bfloat16())
        assert [s for s in learned.said if "are bfloat16" in s] == learned.said
        assert len(learned.said) == 1
        assert "rounds them by up to 0.004 of" in learned.said[0]
        assert 1e-4 < learned.verified.moved < 0.1
        assert learned.verified.holds


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # by vmap
@pytest.mark.parametrize("transformed", [torch.func.vmap, lambda layer: torch.func.grad(lambda x: layer(x).sum())])
def test_a_forward_within_a_transform_is_refused(transformed):
    layer = nn.Linear(D, 3)
    memory = GradientProjectionMemory(layer)
    message = r"^layer the model runs within a transform of torch.func .*; give a forward that uses none$"
    memory.replace(memory.bases)  # so that there is something to verify
    for look in (memory.check, memory.verify, lambda *given: memory.update(*given, threshold=1.0)):
        with pytest.raises(InputError, match=message):
            look(transformed(layer), OLD)
    with GradientProjectionMemory(layer).protect():  # training reads no inputs
        transformed(layer)(OLD).sum().backward()
    assert layer.weight.grad.any()


def test_a_forward_in_inference_mode():
    model = mlp()
    memory = GradientProjectionMemory(model)
    with torch.inference_mode():
        memory.update(lambda batch: model(batch), [OLD], threshold=1.0)
    other = GradientProjectionMemory(model)
    other.update(torch.inference_mode()(model), [OLD], threshold=1.0)
    assert memory.columns == other.columns == {"0": 3, "2": 3, "4": 3}


class SamePadding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Cast(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Doubled(nn.Linear):
    """Its input is doubled: its weight sees twice what the module does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(2 * x, self.weight, self.bias)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 10, self.bias)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class InPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(0.9)
        return F.linear(x, self.weight, self.bias)


class TwoInputs(nn.Linear):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.linear(x + y, self.weight, self.bias)


class TestForwardsOfTheUsersOwn:
    @pytest.mark.parametrize("make", [Cast, Doubled])
    def test_protected_where_the_weight_is_applied_as_it_is(self, make):
        learned = Learned(nn.Sequential(make(D, 8), nn.ReLU(), nn.Linear(8, 4)))
        assert learned.verified.holds
        assert learned.has_learned
        assert not learned.said

    def test_convolution_that_pads_by_itself(self):
        model = nn.Sequential(SamePadding(3, 8, 3), nn.ReLU(), SamePadding(8, 4, 3))
        learned = Learned(model, old=torch.randn(1, 3, 4, 4), new=torch.randn(2, 3, 4, 4))
        assert learned.verified.holds
        assert learned.has_learned

    @pytest.mark.parametrize(
        ("layer", "use"),
        [
            (lambda: Scaled(D, 4), "uses the weight in (mul|__mul__)"),
            (lambda: Standardised(3, 4, 3), "uses the weight in .*mean"),
            (lambda: InPlace(D, 4), "uses the weight in mul_"),
            (lambda: TwoInputs(D, 4), r"could not be tried \(TypeError\)"),
        ],
    )
    def test_refused_by_name_where_it_is_not(self, layer, use):
        with pytest.raises(InputError, match=rf"^layer 1\.0 \(\w+\) has a forward of its own, which {use}.*exclude it"):
            GradientProjectionMemory(nn.Sequential(nn.Linear(D, D), nn.Sequential(layer())))

    def test_refused_and_then_excluded_it_is_named_as_it_trains(self):
        model = nn.Sequential(Scaled(D, 8), nn.Linear(8, 4))
        with pytest.warns(UserWarning, match="^not protected, .*: 0.weight, 0.bias; freeze them"):
            GradientProjectionMemory(model, exclude="0")
        weight_normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(D, 8)), nn.Linear(8, 4))
        with pytest.warns(UserWarning, match=r"^not protected, .*: 0.bias, 0.parametrizations.weight.original0"):
            GradientProjectionMemory(weight_normed, exclude="0")

    def test_frozen_it_is_no_business_of_the_memory(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            GradientProjectionMemory(nn.Sequential(Scaled(D, 8).requires_grad_(False), nn.Linear(8, 4)))

    def test_complex_weights_are_refused(self):
        layer = nn.Linear(D, 2)
        layer.weight = nn.Parameter(layer.weight.to(torch.complex64))
        with pytest.raises(InputError, match="^layer 0 has complex weights"):
            GradientProjectionMemory(nn.Sequential(layer))

    def test_a_module_may_be_wrapped_by_hooks_of_other_libraries(self):
        model = mlp()
        own = model[0].forward
        model[0]._old_forward = own
        model[0].forward = lambda *args, **kwargs: own(*args, **kwargs)
        learned = Learned(model)
        assert learned.verified.holds
        assert "0" in learned.memory.layers
        assert model[0].forward is not own  # theirs is back in its place


@pytest.mark.parametrize(
    "activation", [nn.ReLU(inplace=True), nn.Hardswish(inplace=True), nn.Dropout(0.5, inplace=True)]
)
def test_a_full_layer_before_an_operation_in_place(activation):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    with pytest.warns(FullLayerWarning, match="^0 is full after task 1: no direction is free"):
        memory = GradientProjectionMemory(model)
        memory.update(model, [torch.randn(1, 3, 8, 8)], threshold=1.0)
    with memory.protect():
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert model[0].weight.grad is None
    assert model[4].weight.grad is not None
