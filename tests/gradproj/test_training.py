"""The guarantee whatever optimiser trains, and in whatever loop; on Transformers, adapters and frozen layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from gradproj import GradientProjectionMemory
from gradproj.errors import FullLayerWarning, InputError
from tests.gradproj.learned import NEW, OLD, D, Learned, mlp, remembering

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
        assert set(memory._watcher.snapshot.values) == {"0.a.weight", "0.b.weight"}
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
