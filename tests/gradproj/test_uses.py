"""Weights applied otherwise than their modules do: without the bias, detached, outside the model's own forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from gradproj import GradientProjectionMemory
from gradproj.batches import in_eval_mode
from gradproj.errors import InputError
from gradproj.interference import interference
from tests.gradproj.learned import NEW, OLD, D, Learned, mlp


def adam(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02)


class WithoutBias(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Twice(nn.Module):
    """A layer called as usual, and its weight applied once more by `again(x, layer)`."""

    def __init__(self, again, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.again = nn.Linear(D, D, bias=bias), nn.Linear(D, 3), again

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.a(x) + self.again(x.flip(1), self.a)).relu())


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv1d(2, 9, 2), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.conv1d(x.unflatten(1, (2, -1)), self.conv.weight).relu().mean(2))


class TiedWithoutBias(nn.Module):
    """An output head whose weight is the embedding's too, applied without its bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.body, self.head = nn.Embedding(9, D), nn.Linear(D, D), nn.Linear(D, 9)
        self.head.weight = self.table.weight

    def forward(self, words: Tensor) -> Tensor:
        return F.linear(self.body(self.table(words)).relu(), self.head.weight)


class TestWithoutItsBias:
    @pytest.mark.parametrize("optimizer", [None, adam])
    @pytest.mark.parametrize(
        "make",
        [
            lambda: nn.Sequential(WithoutBias(D, 8), nn.ReLU(), nn.Linear(8, 3)),
            lambda: Twice(lambda x, a: F.linear(x, a.weight)),
            Convolved,
        ],
        ids=["subclass", "twice", "convolution"],
    )
    def test_holds(self, make, optimizer):
        torch.manual_seed(0)
        learned = Learned(make(), optimizer=optimizer)
        assert learned.verified.holds and learned.verified.moved < 1e-5
        assert learned.has_learned and not learned.said

    def test_of_a_tied_head(self):
        words, new = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6, 7]])
        learned = Learned(TiedWithoutBias(), optimizer=adam, old=words, new=new)
        assert learned.verified.holds and learned.verified.moved < 1e-5

    def test_layers_with_and_without_share_no_basis(self):
        """They are given the same input, but see another column of it."""

        class Side(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(D, 4), nn.Linear(D, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.a(x) + F.linear(x, self.b.weight)

        memory = GradientProjectionMemory(Side())
        memory.update(memory.model, [OLD], threshold=1.0)
        assert memory.bases["b"][-1].abs().max() == 0 < memory.bases["a"][-1].abs().max()

    @pytest.mark.parametrize(("make", "bias"), [(lambda: WithoutBias(D, 4), "bias"), (Convolved, "conv.bias")])
    def test_a_bias_that_is_not_added_moves_nothing(self, make, bias):
        model = make()
        memory = GradientProjectionMemory(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model.get_parameter(bias).data += 1
        found = interference(model, memory.layers, before, lambda: model(OLD))
        assert found[bias.rpartition(".")[0]]["ratio"] == 0


class TestOtherUses:
    def test_a_detached_weight_is_applied_all_the_same(self):
        for detached in (lambda a: a.weight.detach(), lambda a: a.weight.data, lambda a: torch.detach(input=a.weight)):
            learned = Learned(Twice(lambda x, a, w=detached: F.linear(x, w(a)), bias=False))
            assert learned.verified.holds and learned.verified.moved < 1e-5
            assert learned.has_learned and not learned.said

    @pytest.mark.parametrize(
        ("again", "name"),
        [
            (lambda x, a: x @ a.weight.detach(), "matmul|__matmul__"),
            (lambda x, a: x * torch.no_grad()(lambda: a.weight.norm())(), "norm"),
            (lambda x, a: x * (1 if a.training else a.weight.sum()), "sum"),
            (lambda x, a: x * torch.fft.fft(a.weight).abs().sum(), "fft_fft"),
        ],
        ids=["detached", "no_grad", "eval", "complex"],
    )
    def test_what_has_no_gradient_is_named_too(self, again, name):
        learned = Learned(Twice(again, bias=False), optimizer=adam)
        (said,) = [s for s in learned.said if "also used" in s]
        assert any(f"the weight of a is also used by {n}, which is not projected" in said for n in name.split("|"))

    def test_what_is_outside_the_model_is_named_by_update(self):
        model = nn.Sequential(nn.Linear(D, 8, bias=False), nn.ReLU())
        learned = Learned(model, forward=lambda x: model(x) @ model[0].weight, optimizer=adam)
        assert not learned.verified.holds
        assert [s for s in learned.said if "the weight of 0 is also used by" in s]

    @pytest.mark.parametrize(
        "like",
        [
            lambda w: torch.zeros_like(w),
            lambda w: w.new_ones(D, D),
            lambda w: torch.eye(D).to(w),
            lambda w: w.shape[0] / D,
        ],
    )
    def test_what_takes_its_shape_or_kind_alone_is_no_use(self, like):
        learned = Learned(Twice(lambda x, a: x @ (torch.ones(D, D) * like(a.weight))))
        assert learned.verified.holds and not learned.said

    def test_a_gradient_that_is_looked_at_is_no_use(self):
        learned = Learned(Twice(lambda x, a: x * (a.weight.grad is None or 1)))
        assert learned.verified.holds and not learned.said

    def test_a_weight_applied_with_a_bias_made_elsewhere(self):
        """As where queries and values alone have one."""

        class Elsewhere(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.a, self.b, self.shift = nn.Linear(D, 4, bias=False), nn.Linear(4, 3), nn.LayerNorm(2)

            def forward(self, x: Tensor) -> Tensor:
                bias = torch.cat([self.shift.bias, torch.zeros(2)])
                return self.b(F.linear(x, self.a.weight, bias).relu())

        learned = Learned(Elsewhere())
        assert learned.verified.holds and not learned.said

    def test_numbers_of_the_frozen_half_may_be_used(self):
        model = Twice(lambda x, a: x * a.weight.norm())
        model.a.weight.requires_grad_(False)
        learned = Learned(model)
        assert learned.verified.holds and not learned.said

    @pytest.mark.parametrize("part", ["weight", "bias"])
    def test_the_frozen_half_of_a_layer_is_no_other_use(self, part):
        model = mlp()
        for layer in (model[0], model[2], model[4]):
            getattr(layer, part).requires_grad_(False)
        learned = Learned(model)
        assert learned.verified.holds and not learned.said

    def test_a_branch_without_gradients_is_no_other_use(self):
        learned = Learned(Twice(lambda x, a: torch.no_grad()(lambda: a(x))()))
        assert learned.verified.holds and not learned.said

    @pytest.mark.parametrize("how", [{"sparse": True}, {"max_norm": 1.0}], ids=["sparse", "max_norm"])
    def test_embeddings_looked_up_in_a_way_that_cannot_be_projected_are_refused(self, how):
        class Words(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(9, 4)

            def forward(self, words: Tensor) -> Tensor:
                return F.embedding(words, self.table.weight, **how)

        memory = GradientProjectionMemory(Words())
        with pytest.raises(InputError, match=r"^layer table did not run in the forward pass, or not in a known way"):
            memory.update(memory.model, [torch.tensor([[1, 2]])], threshold=1.0)

    @pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
    def test_a_layer_without_outputs(self):
        memory = GradientProjectionMemory(nn.AdaptiveLogSoftmaxWithLoss(D, 12, [4, 8], div_value=4))
        assert memory.layers


class TestGradientsOfOtherKinds:
    @pytest.mark.parametrize("n_outputs", [3, 60], ids=["gradient side", "input side"])
    def test_vectorized_jacobians_are_projected(self, n_outputs):
        model = nn.Linear(D, n_outputs)
        memory = GradientProjectionMemory(model)
        memory.update(model, [OLD], threshold=1.0)
        with memory.protect():
            jacobian = torch.autograd.functional.jacobian(model, NEW, vectorize=True)
        assert_close(jacobian[0, :, 0], model.weight.detach())

    def test_batched_gradients_of_parameters_are_refused(self):
        model = nn.Linear(D, 3)
        memory = GradientProjectionMemory(model)
        memory.update(model, [OLD], threshold=1.0)
        with memory.protect(), pytest.raises(InputError, match="^is_grads_batched takes gradients of parameters that"):
            outputs = model(NEW).sum(0)
            torch.autograd.grad(outputs, list(model.parameters()), torch.eye(3), is_grads_batched=True)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
    @pytest.mark.parametrize("n_outputs", [3, 60], ids=["gradient side", "input side"])
    def test_forward_mode(self, n_outputs):
        model = nn.Linear(D, n_outputs)
        memory = GradientProjectionMemory(model)
        memory.update(model, [OLD], threshold=1.0)
        with memory.protect(), torch.autograd.forward_ad.dual_level():
            dual = model(torch.autograd.forward_ad.make_dual(NEW, torch.ones_like(NEW)))
            tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
        assert_close(tangent, F.linear(torch.ones_like(NEW), model.weight))


class Sum(nn.Module):
    """Takes any number of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.module = nn.Linear(D, 3), nn.ReLU()

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(sum(self.a(x) for x in inputs))


class Merged(nn.Linear):
    """Low-rank weights that are added at test."""

    def __init__(self) -> None:
        super().__init__(D, 3)
        self.weight.requires_grad_(False)
        self.down, self.up, self.is_merged = nn.Linear(D, 2, bias=False), nn.Linear(2, 3, bias=False), False

    def train(self, mode: bool = True) -> Merged:
        if self.is_merged == mode:
            self.weight.data += (-1 if mode else 1) * self.up.weight.data @ self.down.weight.data
            self.is_merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.is_merged else super().forward(x) + self.up(self.down(x))


class AlwaysTested(nn.Linear):
    def train(self, mode: bool = True) -> AlwaysTested:
        return super().train(False)


class TestBatchesAndModes:
    def test_a_model_that_does_not_take_the_mode_it_is_given(self):
        model = nn.Sequential(AlwaysTested(D, 3))
        model[0].training = True
        with in_eval_mode(model):
            assert not model[0].training
        assert model[0].training

    def test_all_inputs_of_a_model_that_takes_any_number(self):
        memory = GradientProjectionMemory(Sum())
        memory.update(memory.model, [(OLD, 2 * OLD.flip(1))], threshold=1.0)
        assert memory.columns == {"a": 6}, "three of each input"

    def test_labels_are_left_out_of_a_model_that_may_take_more(self):
        class More(nn.Linear):
            def forward(self, x: Tensor, *more: Tensor) -> Tensor:
                return super().forward(x + sum(m[:, None] for m in more))

        memory = GradientProjectionMemory(More(D, 3))
        memory.update(memory.model, [(OLD[:1], torch.ones(1))], threshold=1.0)
        direction = memory.bases[""][:-1, 0] / memory.bases[""][-1, 0]
        assert_close(direction.float(), OLD[0])

    @pytest.mark.parametrize("inner", ["module", "base_model"])
    def test_a_wrapper_is_given_what_its_model_needs(self, inner):
        class Wrapper(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                setattr(self, inner, nn.Linear(D, 3))

            def forward(self, *inputs, **arguments):
                return getattr(self, inner)(*inputs, **arguments)

        memory = GradientProjectionMemory(Wrapper())
        memory.update(memory.model, [(OLD, torch.zeros(3))], threshold=1.0)
        assert memory.columns == {f"{inner}": 3}
        with memory.protect():
            assert memory.verify(memory.model, (OLD, torch.zeros(3))).holds

    def test_a_model_that_parts_its_weights_in_training(self):
        model = nn.Sequential(Merged(), nn.ReLU())
        model[1].eval()
        before = model[0].weight.clone()
        with in_eval_mode(model):
            assert model[0].is_merged and not model[0].training
        assert not model[0].is_merged
        assert_close(model[0].weight, before)
        assert [m.training for m in model.modules()] == [True, True, True, True, False]
