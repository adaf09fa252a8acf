"""The guarantee on networks that do what they like: it holds, or a message names what cannot be held."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from gradproj import GradientProjectionMemory
from gradproj.errors import FullLayerWarning, InputError

D = 6
OLD, NEW = (torch.randn(n, D, generator=torch.Generator().manual_seed(n)) for n in (3, 5))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


class Learned:
    """A model that has learned something new under protection: what it says, and how it holds.

    Args:
        model: with ε = 1 of what it sees of `old`.
        forward: runs it.
        optimizer: made of its parameters.
        old, new: batches.
        given: whether `protect` is given the optimiser.
    """

    def __init__(self, model, forward=None, optimizer=None, old=OLD, new=NEW, given=True, mask=None, **arguments):
        forward = forward or model
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.memory = GradientProjectionMemory(model)
            self.memory.update(forward, [old], threshold=1.0, mask=mask)
            optimizer = (optimizer or (lambda p: torch.optim.SGD(p, lr=0.1)))(list(model.parameters()))
            self.losses = []
            with self.memory.protect(optimizer if given else None, **arguments):
                for _ in range(4):
                    optimizer.zero_grad()
                    result = forward(new)
                    if not self.losses:
                        target = torch.randn_like(result)
                    loss = (result - target).float().square().mean()
                    loss.backward()
                    optimizer.step()
                    self.losses.append(loss.item())
            self.verified = self.memory.verify(forward, old, mask=mask)
        self.said = [
            str(w.message) for w in caught if issubclass(w.category, UserWarning) and "gradproj" not in w.filename
        ]

    @property
    def has_learned(self) -> bool:
        return self.losses[-1] < self.losses[0]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
        assert 1e-4 < learned.verified.moved < 0.1
        assert learned.verified.holds


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


OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "weight decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


class Wrapper:
    """An optimiser as other libraries wrap it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optim = optimizer

    def zero_grad(self) -> None:
        self.optim.zero_grad()

    def step(self) -> None:
        self.optim.step()


class TestOptimizers:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_given_to_protect_it_holds(self, name):
        learned = Learned(mlp(), optimizer=OPTIMIZERS[name])
        assert learned.verified.holds
        assert learned.has_learned
        assert not learned.said

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_not_given_it_is_named_at_its_first_step(self, name):
        learned = Learned(mlp(), optimizer=OPTIMIZERS[name], given=False)
        assert not learned.verified.holds
        (said,) = learned.said
        assert said.endswith("projected gradients alone do not hold old tasks then; give it to protect(optimizer)")

    def test_momentum_from_the_task_before(self):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(OLD).square().mean().backward()
        optimizer.step()
        memory = remembering(model)
        with memory.protect(optimizer):
            optimizer.zero_grad()
            model(NEW).square().mean().backward()
            optimizer.step()
        assert memory.verify(model, OLD).holds
        memory = remembering(model)
        with pytest.warns(UserWarning, match="^SGD trains protected layers, and momentum was kept from before"):
            with memory.protect():
                optimizer.step()

    def test_inside_a_wrapper(self):
        assert Learned(mlp(), optimizer=lambda p: Wrapper(torch.optim.Adam(p, lr=0.01))).verified.holds

    def test_several(self):
        model = mlp()
        memory = remembering(model)
        both = [torch.optim.Adam(model[0].parameters(), lr=0.01), torch.optim.Adam(model[2:].parameters(), lr=0.01)]
        with memory.protect(both):
            model(NEW).square().mean().backward()
            for optimizer in both:
                optimizer.step()
        assert memory.verify(model, OLD).holds

    def test_projected_by_protect_update_beside(self):
        model = mlp()
        memory = remembering(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        with memory.protect(), memory.protect_update(optimizer):
            model(NEW).square().mean().backward()
            optimizer.step()
        assert memory.verify(model, OLD).holds

    def test_with_a_closure(self):
        model = mlp()
        memory = remembering(model)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")

        def closure() -> float:
            optimizer.zero_grad()
            loss = model(NEW).square().mean()
            loss.backward()
            return loss.item()

        with memory.protect(optimizer):
            first = optimizer.step(closure)
        assert closure() < first
        assert memory.verify(model, OLD).holds

    @pytest.mark.parametrize("thing", [None.__class__, "SGD", mlp], ids=repr)
    def test_what_is_no_optimizer(self, thing):
        memory = remembering(mlp())
        with pytest.raises(InputError, match=r"^optimizer is a \w+; it must be a torch.optim.Optimizer, or wrap one$"):
            with memory.protect(thing):
                pass


def remembering(model: nn.Module) -> GradientProjectionMemory:
    memory = GradientProjectionMemory(model)
    memory.update(model, [OLD], threshold=1.0)
    return memory


class TestWaysToTrain:
    @pytest.mark.parametrize("whole", [False, True])
    def test_compiled(self, whole):
        """aot_eager: the compiler's front without machine code."""
        model = mlp()
        compiled = torch.compile(model, backend="aot_eager")
        learned = Learned(compiled if whole else model, forward=compiled)
        assert learned.verified.holds
        assert learned.has_learned

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
    def test_activations_recomputed(self, reentrant):
        model = mlp()
        learned = Learned(
            model, forward=lambda x: checkpoint(model, x, use_reentrant=reentrant), new=NEW.clone().requires_grad_()
        )
        assert learned.verified.holds
        assert learned.has_learned

    def test_functional_call(self):
        model = mlp()
        learned = Learned(model, forward=lambda x: torch.func.functional_call(model, dict(model.named_parameters()), x))
        assert learned.verified.holds
        assert learned.has_learned

    def test_gradients_asked_for(self):
        memory = remembering(model := mlp())
        with memory.protect():
            gradients = torch.autograd.grad(model(NEW).square().mean(), list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
        assert memory.verify(model, OLD).holds

    def test_made_without_memory_and_moved_since(self):
        with torch.device("meta"):
            model = mlp()
        memory = GradientProjectionMemory(model)
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        memory.update(model, [OLD], threshold=1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with memory.protect(optimizer):
            model(NEW).square().mean().backward()
            optimizer.step()
        assert memory.verify(model, OLD).holds
        assert {basis.device.type for basis in memory.bases.values()} == {"cpu"}

    def test_another_dtype_since(self):
        memory = remembering(model := mlp())
        model.double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = model(OLD.double()).detach()
        with memory.protect(optimizer):
            model(NEW.double()).square().mean().backward()
            optimizer.step()
        assert_close(model(OLD.double()), before, atol=1e-6, rtol=0)


class TestTransformers:
    def encoder(self) -> nn.TransformerEncoder:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)

    def test_every_weight_of_an_encoder_is_protected(self):
        learned = Learned(self.encoder(), old=torch.randn(2, 4, 16), new=torch.randn(2, 5, 16))
        assert not learned.memory.unprotected
        assert learned.verified.holds
        assert learned.has_learned
        assert not learned.said

    def test_padding(self):
        """Rows that are padded neither count nor are judged; the path for inference alone is not taken."""
        model = self.encoder()
        padded = torch.tensor([[False, False, False, True, True], [False] * 5])
        learned = Learned(
            model,
            forward=lambda x: model(x, src_key_padding_mask=padded),
            mask=lambda _: ~padded,
            old=torch.randn(2, 5, 16),
            new=torch.randn(2, 5, 16),
        )
        assert learned.memory.columns["layers.0.linear1"] == 8
        assert learned.verified.holds
        assert learned.has_learned
        assert torch.backends.mha.get_fastpath_enabled()

    def test_without_a_mask_every_row_counts(self):
        model = self.encoder()
        memory = GradientProjectionMemory(model)
        padded = torch.tensor([[False, False, False, True, True], [False] * 5])
        memory.update(lambda x: model(x, src_key_padding_mask=padded), [torch.randn(2, 5, 16)], threshold=1.0)
        assert memory.columns["layers.0.linear1"] == 10

    def test_nested_tensors_are_refused_in_a_line(self):
        model = nn.Sequential(nn.Linear(D, 2))
        nested = torch.nested.nested_tensor([torch.randn(2, D), torch.randn(1, D)], layout=torch.jagged)
        with pytest.raises(InputError, match="^layer 0 is given a NestedTensor; give padded batches"):
            GradientProjectionMemory(model).update(model, [nested], threshold=0.9)


class LowRank(nn.Module):
    """A frozen Linear with a trained detour of low rank, as LoRA's."""

    def __init__(self, d: int, r: int) -> None:
        super().__init__()
        self.base = nn.Linear(d, d).requires_grad_(False)
        self.a, self.b = nn.Linear(d, r, bias=False), nn.Linear(r, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


class TestFrozenLayers:
    def test_only_what_trains_is_remembered_and_copied(self):
        model = nn.Sequential(LowRank(D, 2), nn.ReLU(), nn.Linear(D, D).requires_grad_(False))
        memory = GradientProjectionMemory(model)
        assert list(memory.layers) == ["0.a", "0.b"]
        with pytest.warns(FullLayerWarning, match=r"^0.b is full after task 1: no direction is free, so no later task"):
            memory.update(model, [OLD], threshold=1.0)
        assert set(memory._reference) == {"0.a.weight", "0.b.weight"}
        with memory.protect():
            assert "forward" not in vars(model[0].base)
            assert "forward" not in vars(model[2])

    @pytest.mark.parametrize("part", ["weight", "bias"])
    def test_half_a_layer(self, part):
        model = nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, 4))
        getattr(model[0], part).requires_grad_(False)
        learned = Learned(model)
        assert learned.memory.input_sizes["0"] == (1 if part == "weight" else D)
        assert learned.verified.holds
        assert learned.has_learned


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


class TestBatches:
    @pytest.mark.parametrize(
        "batches",
        [
            [OLD],
            OLD,
            {"input": OLD},
            [{"input": OLD}],
            [(OLD, torch.zeros(3))],
            [[OLD, torch.zeros(3)]],
            torch.utils.data.DataLoader(torch.utils.data.TensorDataset(OLD, torch.zeros(3)), batch_size=2),
            (OLD[i : i + 1] for i in range(3)),
            OLD.split(2),
        ],
        ids=["list", "tensor", "dict", "dicts", "pairs", "lists", "loader", "generator", "split"],
    )
    def test_of_any_kind(self, batches):
        memory = GradientProjectionMemory(model := mlp())
        memory.update(model, batches, threshold=1.0)
        assert memory.columns == {"0": 3, "2": 3, "4": 3}

    def test_what_of_a_pair_a_model_needs(self):
        class Net(nn.Linear):
            def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
                assert labels is None
                return super().forward(x)

        net = Net(D, 2)
        memory = GradientProjectionMemory(net)
        memory.update(net, [(OLD, torch.zeros(3))], threshold=1.0)
        assert memory.columns == {"": 3}

    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            ((OLD, torch.zeros(3)), "batches is a tuple, which could be one batch or several; give a list"),
            (OLD.numpy(), "batches is of type ndarray; give batches in a list"),
            ("images", "batches is of type str"),
            (None, "batches is of type NoneType"),
            ([{"pixels": OLD}], "forward cannot take a batch of type dict .*pixels.*give a function"),
            (["images"], "forward cannot take a batch of type str"),
        ],
        ids=["tuple", "array", "text", "none", "wrong key", "texts"],
    )
    def test_that_cannot_be_used(self, batches, message):
        memory = GradientProjectionMemory(model := mlp())
        with pytest.raises(InputError, match=f"^{message}"):
            memory.update(model, batches, threshold=1.0)
        assert memory.n_updates == 0

    @pytest.mark.parametrize("mask", ["mask", lambda batch: batch["mask"]], ids=["key", "function"])
    def test_masked_rows_do_not_count(self, mask):
        memory = GradientProjectionMemory(model := mlp())
        batch = {"input": OLD, "mask": torch.tensor([1, 0, 1])}
        memory.update(lambda b: model(b["input"]), [batch], threshold=1.0, mask=mask)
        assert memory.columns["0"] == 2

    def test_a_mask_of_nothing_known(self):
        memory = GradientProjectionMemory(model := mlp())
        with pytest.raises(InputError, match="^mask 'mask' cannot be read from a batch of type Tensor"):
            memory.update(model, [OLD], threshold=1.0, mask="mask")
        with pytest.raises(InputError, match="^mask must give a tensor"):
            memory.update(model, [OLD], threshold=1.0, mask=lambda _: 3)

    def test_random_rows_in_bounded_memory(self):
        model = nn.Sequential(nn.Linear(D, 4))
        memory = GradientProjectionMemory(model)
        many = torch.cat([torch.zeros(500, D), torch.randn(500, D)])  # the first ones hold nothing but a bias's 1
        memory.update(model, [many], threshold=1.0, rows=20)
        assert memory.columns == {"0": D + 1}

    def test_a_limit_of_columns_says_what_is_lost(self):
        model = nn.Sequential(nn.Linear(D, 4, bias=False))
        memory = GradientProjectionMemory(model)
        x = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0, 0.0]))
        with pytest.warns(
            UserWarning, match=r"^0 has 2 columns, the most allowed; they hold 0\.9286 of its inputs' energy"
        ):
            memory.update(model, [x], threshold=0.99, max_columns=2)
        assert memory.columns == {"0": 2}


class TestPasses:
    def test_as_many_as_fit(self):
        """The same bases in several passes over the batches."""
        model, batches = mlp(), [torch.randn(30, D), torch.randn(30, D)]
        one, some = GradientProjectionMemory(model), GradientProjectionMemory(model)
        calls = []
        one.update(model, batches, threshold=0.9)
        some.update(lambda x: (calls.append(1), model(x))[1], batches, threshold=0.9, max_memory=8 * 9 * 9)
        assert len(calls) == 1 + 3 * 2  # a look, and a pass for each layer
        for key in one.bases:
            assert_close(one.bases[key], some.bases[key])

    def test_what_can_run_once_only(self):
        memory = GradientProjectionMemory(model := mlp())
        with pytest.raises(InputError, match="^the layers' inputs need .* GiB, so the batches must run 3 times, but"):
            memory.update(model, iter([OLD]), threshold=0.9, max_memory=8 * 9 * 9)

    def test_layers_that_see_the_same_share_it(self):
        class Heads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q, self.k, self.v = nn.Linear(D, 4), nn.Linear(D, 4), nn.Linear(D, 4, bias=False)

            def forward(self, x: Tensor) -> Tensor:
                return self.q(x) * self.k(x) + self.v(x)

        memory = GradientProjectionMemory(model := Heads())
        gathered = memory.gather(model, [torch.randn(20, D), torch.randn(20, D)])
        assert gathered["q"] is gathered["k"]
        assert gathered["v"] is not gathered["q"]  # it has no bias
        memory.extend(gathered, 0.9)
        assert memory.bases["q"] is memory.bases["k"]

    @pytest.mark.parametrize("n", [4, 60], ids=["columns", "R Rᵀ"])
    @pytest.mark.parametrize(
        "when", ["a second application", "another batch", "the first batch", "a is ahead", "twice the same"]
    )
    def test_layers_that_part_keep_their_own(self, when, n):
        class Parting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

            def forward(self, batch) -> Tensor:
                x, y = batch
                if when == "a is ahead":
                    self.a(x.cos())
                out = self.a(x) + self.b(x if y is None else y)
                if when == "twice the same":
                    self.a(x)
                if when != "a second application":
                    return out
                result = self.b(out)
                out.relu_()  # what b was given is not there any more
                return result

        memory = GradientProjectionMemory(model := Parting())
        one, other = torch.randn(n, D), torch.randn(n, D)
        batches = [(one, None), (other, one)] if when == "another batch" else [(one, None), (other, None)]
        if when == "the first batch":
            batches = [(one, other), (other, None)]
        seen = {"a": [], "b": []}
        hooks = [
            getattr(model, name).register_forward_hook(
                lambda _, args, __, name=name: seen[name].append(args[0].clone())
            )
            for name in seen
        ]
        gathered = memory.gather(lambda batch: model(batch), batches)
        for hook in hooks:
            hook.remove()
        for name, parts in seen.items():
            columns = torch.cat([torch.cat(parts), torch.ones(len(torch.cat(parts)), 1)], dim=1).T.double()
            assert_close(gathered[name].outer, columns @ columns.T)
            assert gathered[name].n == columns.shape[1]

    def test_an_input_changed_in_place_is_not_shared(self):
        class Changing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q, self.k = nn.Linear(D, 4), nn.Linear(D, 4)

            def forward(self, x: Tensor) -> Tensor:
                x = x.clone()
                first = self.q(x)
                return first + self.k(x.relu_())

        memory = GradientProjectionMemory(model := Changing())
        gathered = memory.gather(model, [OLD])
        expected = torch.cat([OLD.relu(), torch.ones(3, 1)], dim=1).T.double()
        assert_close(gathered["k"].outer, expected @ expected.T)


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
