"""What moves although its gradients are projected is named, while it trains or when protection ends."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from gradproj import GradientProjectionMemory
from gradproj.errors import InputError
from gradproj.projection import layer_projector
from tests.gradproj.learned import NEW, OLD, D, Learned, mlp, remembering


def sgd(model: nn.Module, **settings) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **settings})


class Trained:
    """A model that has taken 12 steps of a user's own under protection.

    Args:
        step: called with the model, its optimiser and the number of the step; leaves gradients and takes the step.
        optimizer: makes the optimiser of the model.
        model: a perceptron where not given.
    """

    def __init__(self, step, optimizer=sgd, model=None) -> None:
        self.model = mlp() if model is None else model
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            memory = remembering(self.model)
            old, trainer = self.model(OLD).detach(), optimizer(self.model)
            with memory.protect(trainer):
                for i in range(12):
                    trainer.zero_grad()
                    step(self.model, trainer, i)
            self.moved = float((self.model(OLD) - old).norm() / old.norm())
            self.holds = memory.verify(self.model, OLD).holds
        self.said = [str(w.message) for w in caught if w.category is UserWarning]


def loss(model: nn.Module) -> Tensor:
    return model(NEW).square().mean()


def plain(model, optimizer, i):
    loss(model).backward()
    optimizer.step()


def growing_decay(model, optimizer, i):
    optimizer.param_groups[0]["weight_decay"] = 0.01 * i
    plain(model, optimizer, i)


def regularised_from_the_second_step(model, optimizer, i):
    (loss(model) + 0.01 * i * sum(p.square().sum() for p in model.parameters())).backward()
    optimizer.step()


def clipped_after_a_large_loss(model, optimizer, i):
    (100 * loss(model)).backward()
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    optimizer.step()


def clamped(model, optimizer, i):
    plain(model, optimizer, i)
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.3, 0.3)


def momentum_loaded(model, optimizer, i):
    if i == 1:
        state = optimizer.state_dict()
        state["state"] = {j: {"momentum_buffer": torch.ones_like(p)} for j, p in enumerate(model.parameters())}
        optimizer.load_state_dict(state)
    plain(model, optimizer, i)


PAST = [growing_decay, regularised_from_the_second_step, clipped_after_a_large_loss, clamped]


@pytest.mark.parametrize("step", PAST, ids=lambda step: step.__name__)
def test_weights_that_move_past_the_projection_are_named(step):
    trained = Trained(step)
    assert trained.moved > 1e-4 and not trained.holds
    assert any("the movement of 0 is in remembered directions since task 1" in text for text in trained.said)


def test_momentum_that_is_loaded():
    trained = Trained(momentum_loaded, lambda model: sgd(model, momentum=0.5))
    assert trained.moved > 1e-4 and not trained.holds
    assert any("is in remembered directions since task 1" in text for text in trained.said)


def test_they_are_named_early():
    """After one step, not at the end."""
    model = mlp()
    memory = remembering(model)
    optimizer = sgd(model)
    with memory.protect(optimizer):
        clamped(model, optimizer, 0)
        with pytest.warns(UserWarning, match="in remembered directions since task 1: old tasks may be forgotten"):
            plain(model, optimizer, 1)


def test_at_the_latest_when_protection_ends():
    model = mlp()
    memory = remembering(model)
    with pytest.warns(UserWarning, match="of the movement of 4 is in remembered directions since task 1"):
        with memory.protect(sgd(model)):
            with torch.no_grad():
                model[4].weight.mul_(0.9)


def test_what_holds_is_not_named():
    trained = Trained(plain)
    assert trained.holds and not trained.said


@pytest.mark.parametrize(
    "groups",
    [
        lambda m: [{"params": [m[0].weight, m[2].weight, m[4].weight]}, {"params": biases(m), "lr": 0.2}],
        lambda m: [{"params": [m[0].weight, m[2].weight, m[4].weight]}, {"params": biases(m), "momentum": 0.9}],
        lambda m: [m[0].weight, m[2].weight, m[4].weight],
    ],
    ids=["another rate", "another momentum", "biases left out"],
)
def test_weight_and_bias_that_take_different_steps_have_their_updates_projected(groups):
    def step(model, optimizer, i):
        model.zero_grad()
        plain(model, optimizer, i)

    trained = Trained(step, lambda model: torch.optim.SGD(groups(model), lr=0.1))
    assert trained.holds and trained.moved < 1e-5 and not trained.said


def biases(model: nn.Sequential) -> list[nn.Parameter]:
    return [model[i].bias for i in (0, 2, 4)]


def test_an_optimizer_of_another_model_is_refused():
    memory = remembering(mlp())
    with pytest.raises(
        InputError, match="^optimizer holds no parameter of the model, so its steps cannot be projected"
    ):
        with memory.protect(sgd(mlp())):
            pass


class TestFrozen:
    class Taught(nn.Module):
        """A student beside a teacher that is not trained, but follows it."""

        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = nn.Linear(D, 3), nn.Linear(D, 3).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.student(x) + self.teacher(x)

    def test_a_teacher_that_follows_is_named(self):
        def follow(model, optimizer, i):
            plain(model, optimizer, i)
            model.teacher.weight.data.mul_(0.9)

        trained = Trained(follow, model=self.Taught())
        assert not trained.holds
        assert "teacher.weight has changed, which was not trained since task 1" in " ".join(trained.said)

    def test_only_what_the_outputs_depend_on_counts(self):
        model = self.Taught()
        memory = GradientProjectionMemory(model)
        memory.update(model.student, [OLD], threshold=1.0)
        model.teacher.weight.data.mul_(3)
        assert memory.verify(model.student, OLD).others == []
        assert memory.verify(model, OLD).others == ["teacher.weight"]

    def test_other_heads_may_learn(self):
        model = nn.ModuleDict({"body": nn.Linear(D, 4), "heads": nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])})
        memory = GradientProjectionMemory(model, exclude="heads")
        old, new = (lambda x, head=head: model["heads"][head](model["body"](x)) for head in (0, 1))
        memory.update(old, [OLD], threshold=1.0)
        optimizer = torch.optim.SGD([*model["body"].parameters(), *model["heads"][1].parameters()], lr=0.1)
        with memory.protect(optimizer):
            new(NEW).square().mean().backward()
            optimizer.step()
        verified = memory.verify(old, OLD)
        assert verified.holds and verified.others == []
        assert memory.verify(new, OLD).others == ["heads.1.weight", "heads.1.bias"]

    def test_what_was_named_as_unprotected_is_not_named_again(self):
        class Offset(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.offset = nn.Linear(D, 3), nn.Parameter(torch.zeros(3))

            def forward(self, x: Tensor) -> Tensor:
                return self.a(x) + self.offset

        (said,) = Learned(Offset()).said
        assert said.startswith("not protected, so old tasks may be forgotten through them: offset;")

    def test_a_buffer_changed_behind_the_back_of_autograd(self):
        class Centred(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(D, D)
                self.register_buffer("mean", torch.zeros(D))

            def forward(self, x: Tensor) -> Tensor:
                if self.training:
                    self.mean.data.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
                return self.a(x - self.mean)

        learned = Learned(Centred())
        assert not learned.verified.holds
        assert "mean has changed since task 1: old tasks may be forgotten through it" in learned.said

    def test_statistics_of_a_model_that_is_put_into_training_mode_within(self):
        model = nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
        memory = remembering(model)
        with pytest.warns(UserWarning, match="^running statistics of 1 go on moving"):
            with memory.protect(sgd(model)):
                model.train()
                loss(model).backward()


class TestVerify:
    def test_random_forwards_draw_the_same_numbers(self):
        class Noisy(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x + torch.randn_like(x)

        model = nn.Sequential(nn.Linear(D, 4), Noisy(), nn.Linear(4, 2))
        memory = remembering(model)
        state = torch.get_rng_state()
        verified = memory.verify(model, OLD)
        assert verified.moved == 0 and verified.explained < 1e-4 and verified.holds
        assert torch.equal(torch.get_rng_state(), state)
        with torch.no_grad():
            model[0].weight.mul_(1.5)
        assert not memory.verify(model, OLD).holds

    def test_complex_outputs_and_dataclasses_count(self):
        model = nn.Linear(D, 2)
        memory = remembering(model)
        with torch.no_grad():
            model.weight.mul_(2)

        def spectrum(x):
            return torch.fft.fft(model(x))

        assert memory.verify(spectrum, OLD).moved > 0.1

    def test_outputs_in_which_there_is_nothing_to_compare(self):
        model = nn.Linear(D, 2)
        memory = remembering(model)
        with pytest.raises(InputError, match="^forward returns no floating-point tensors to compare"):
            memory.verify(lambda x: torch.distributions.Normal(model(x), 1), OLD)

    def test_a_weight_that_is_made_of_others_since(self):
        model = mlp()
        memory = remembering(model)
        parametrizations.weight_norm(model[2])
        with pytest.raises(
            InputError, match=r"^the weight of 2 is no parameter of the model any more.*make a new memory"
        ):
            memory.verify(model, OLD)


class TestClosures:
    def test_gradients_from_before_are_cleared_within(self):
        def step(model, optimizer, i):
            loss(model).backward()  # of a step that is not taken

            def closure():
                optimizer.zero_grad()
                loss(model).backward()

            optimizer.step(closure)

        model = mlp()
        memory = remembering(model)
        loss(model).backward()
        optimizer = sgd(model)
        with memory.protect(optimizer):
            step(model, optimizer, 0)

    def test_an_optimizer_whose_updates_are_projected_may_be_given_any_gradient(self):
        def step(model, optimizer, i):
            (loss(model) + sum(p.square().sum() for p in model.parameters())).backward()
            optimizer.step()

        trained = Trained(step, lambda model: torch.optim.AdamW(model.parameters(), lr=0.01))
        assert trained.holds and not trained.said


class TestGradientsOfGradients:
    @pytest.mark.parametrize("n", [2, 50], ids="{} rows".format)
    def test_a_gradient_penalty_is_projected(self, n):
        """Few rows and many take different ways; both give what projecting the plain gradient does."""

        def gradients(protect: bool) -> tuple[nn.Module, GradientProjectionMemory]:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 2)).double()
            memory = GradientProjectionMemory(model)
            memory.update(model, [OLD[:2].double()], threshold=1.0)
            x = torch.randn(n, D).double().requires_grad_()
            with memory.protect() if protect else torch.enable_grad():
                (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
                slope.square().sum().backward()
            return model, memory

        (protected, _), (free, memory) = gradients(True), gradients(False)
        for name, layer in memory.layers.items():
            expected = layer_projector(layer, memory.bases)(layer.module.weight.grad, layer.module.bias.grad)
            found = protected.get_submodule(name)
            assert_close((found.weight.grad, found.bias.grad), expected, atol=1e-12, rtol=1e-10)
            assert found.weight.grad.norm() > 1e-6
        assert free is not protected

    @pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # by vmap
    @pytest.mark.parametrize("n", [2, 50], ids="{} rows".format)
    def test_transforms_of_torch_func(self, n):
        model = mlp().double()
        memory = GradientProjectionMemory(model)
        memory.update(model, [OLD[:2].double()], threshold=1.0)
        x = torch.randn(n, D).double()
        values = {name: p.detach() for name, p in model.named_parameters()}

        def penalty(parameters, x):
            return functional_call(model, parameters, (x,)).square().sum()

        with memory.protect():
            whole = grad(penalty)(values, x)
            each = vmap(grad(penalty), (None, 0))(values, x[:, None])
            _, along = jvp(lambda p: penalty(p, x), (values,), (whole,))
            penalty(dict(model.named_parameters()), x).backward()
        for name, p in model.named_parameters():
            assert_close(whole[name], p.grad)
            assert_close(each[name].sum(0), p.grad)
        assert_close(along, sum(g.square().sum() for g in whole.values()))


class TestUnknownUses:
    def test_a_layer_of_which_only_the_weight_is_used(self):
        class Product(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(D, D, bias=False), nn.Linear(D, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.b(x @ self.a.weight)

        model = Product()
        memory = GradientProjectionMemory(model)
        with pytest.raises(InputError, match=r"^layer a did not run .* or not in a known way \(check\(\) says so\)"):
            memory.update(model, [OLD], threshold=1.0)
        with pytest.warns(UserWarning, match="^the weight of a is also used by matmul, which is not projected"):
            assert memory.check(model, OLD).silent == ["a"]

    def test_another_number_of_groups_than_the_modules(self):
        class Grouped(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(1, 4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return F.conv2d(x, self.conv.weight, groups=4)

        model = Grouped()
        memory = GradientProjectionMemory(model)
        with pytest.raises(InputError, match="^layer conv did not run in the forward pass, or not in a known way"):
            memory.update(model, [torch.randn(2, 4, 5, 5)], threshold=1.0)

    def test_sparse_inputs(self):
        model = nn.Linear(D, 2)
        memory = GradientProjectionMemory(model)
        with pytest.raises(InputError, match="^layer the model is given a sparse tensor; give dense ones"):
            memory.update(model, [OLD.to_sparse()], threshold=1.0)

    def test_a_weight_that_the_model_itself_has_too(self):
        class Lent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(D, 2)
                self.weight = self.a.weight

            def forward(self, x: Tensor) -> Tensor:
                return self.a(x)

        with pytest.raises(InputError, match="^layer a shares its weight with the model itself; exclude both"):
            GradientProjectionMemory(Lent())
