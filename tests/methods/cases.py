"""What every method is tested for, by inheritance, and the plain loop that its slow form is written into."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from engine.method import Method, why_not
from engine.options import Options
from engine.seeds import generator
from engine.task import Task
from gradproj.errors import InputError
from methods import METHODS
from tests import reference, tiny
from tests.tiny_nets import Residual, SingleHead, method, picture_task

STEPS, LR = 5, 0.05


class Kind(NamedTuple):
    """A network and its tasks."""

    model: Callable[[], nn.Module]
    task: Callable[[int], Task]


def pictures_network() -> nn.Module:
    """Convolutions with BatchNorm and a bias, a head for each task; without dropout, so that steps can be compared."""
    model = Residual()
    model.drop = nn.Identity()
    return model


KINDS = {"one": Kind(SingleHead, tiny.task), "many": Kind(pictures_network, picture_task)}


def rows(layer: nn.Module, part: str = "data") -> Tensor:
    """A layer's weights, or their gradients (`grad`), as one matrix [W, b] (o, d)."""
    weight = getattr(layer.weight, part).flatten(1)
    return weight if layer.bias is None else torch.cat([weight, getattr(layer.bias, part)[:, None]], dim=1)


def put(layer: nn.Module, matrix: Tensor, part: str = "data") -> None:
    """The inverse: make [W, b], or its gradient, this matrix."""
    weight = layer.weight[0].numel()
    getattr(layer.weight, part).copy_(matrix[:, :weight].view_as(layer.weight))
    if layer.bias is not None:
        getattr(layer.bias, part).copy_(matrix[:, weight])


class Slow:
    """Full-batch SGD on one tiny task after another. A method's equations, as its paper has them, go into a subclass.

    Attributes:
        layers: the Linear and convolution layers that all tasks share, by name.
        norms: the parameters of the normalisation layers.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.model, self.options = model, options
        heads = set(model.heads.modules()) if hasattr(model, "heads") else set()
        modules = {name: m for name, m in model.named_modules() if m not in heads}
        self.layers = {name: m for name, m in modules.items() if isinstance(m, (nn.Linear, nn.Conv2d))}
        self.norms = [p for m in modules.values() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]

    def learn(self, t: int, task: Task) -> None:
        self.before(t, task)
        for step in range(STEPS):
            torch.manual_seed(step)
            self.step(t, *task.train)
        self.after(t, task)

    def before(self, t: int, task: Task) -> None:
        """Task t begins."""

    def step(self, t: int, images: Tensor, labels: Tensor) -> None:
        """p ← p - lr ∂L/∂p."""
        self.model.zero_grad()
        self.gradients(t, images, labels)
        with torch.no_grad():
            for p in self.trained(t):
                if p.grad is not None:
                    p -= LR * p.grad

    def trained(self, t: int) -> list[nn.Parameter]:
        """The shared parameters and the head of task t."""
        others = [p for j, h in enumerate(getattr(self.model, "heads", [])) if j != t for p in h.parameters()]
        return [p for p in self.model.parameters() if all(p is not other for other in others)]

    def gradients(self, t: int, images: Tensor, labels: Tensor) -> None:
        """Leave ∂L/∂p in the parameters."""
        F.cross_entropy(self.output(images, t), labels).backward()

    def after(self, t: int, task: Task) -> None:
        """Task t is learned."""

    def output(self, images: Tensor, t: int) -> Tensor:
        """What the network says of images of task t."""
        return self.model(images, t)

    def floats(self) -> int:
        """How many numbers are kept of the past."""
        return 0

    def inputs(self, images: Tensor, t: int) -> dict[str, Tensor]:
        """R (d, n) of each layer: its inputs as columns, with the constant 1 of a bias as the last row."""
        found = {}

        def listen(name: str, layer: nn.Module) -> Any:
            def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                if isinstance(layer, nn.Conv2d):
                    patches = reference.conv_patches(args[0], layer.kernel_size, padding=layer.padding)
                    columns = torch.from_numpy(patches[0])
                else:
                    columns = args[0].T
                found[name] = (
                    columns if layer.bias is None else torch.cat([columns, columns.new_ones(1, columns.shape[1])])
                )

            return layer.register_forward_pre_hook(hook)

        handles = [listen(name, layer) for name, layer in self.layers.items()]
        with torch.no_grad():
            self.output(images, t)
        for handle in handles:
            handle.remove()
        return found


class SlowGPM(Slow):
    """Eqs. 5 to 9 of the GPM paper."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        self.bases = {name: rows(layer).new_zeros(rows(layer).shape[1], 0) for name, layer in self.layers.items()}

    def trained(self, t: int) -> list[nn.Parameter]:
        """Normalisation learns on the first task only."""
        return [p for p in super().trained(t) if t == 0 or all(p is not norm for norm in self.norms)]

    def step(self, t: int, images: Tensor, labels: Tensor) -> None:
        self.model.zero_grad()
        self.gradients(t, images, labels)
        with torch.no_grad():
            for name, layer in self.layers.items():
                G = rows(layer, "grad")
                put(layer, G - G @ self.removed(name), "grad")
            for p in self.trained(t):
                p -= LR * p.grad

    def removed(self, name: str) -> Tensor:
        """M Mᵀ (d, d): what of a gradient is taken away."""
        return self.bases[name] @ self.bases[name].T

    def after(self, t: int, task: Task) -> None:
        self.remember(t, self.inputs(self.samples(t, task), t))

    def samples(self, t: int, task: Task) -> Tensor:
        """The training images that the memory is made from."""
        order = torch.randperm(len(task.train.labels), generator=generator(self.options.seed, "samples", t))
        return task.train.images[order[: self.options.n_samples]]

    def remember(self, t: int, inputs: dict[str, Tensor]) -> None:
        for name, R in inputs.items():
            self.bases[name] = torch.from_numpy(reference.extend_basis(self.bases[name], R, self.epsilon(t)))

    def epsilon(self, t: int) -> float:
        return self.options.threshold[0] + self.options.threshold_step * t

    def floats(self) -> int:
        return sum(basis.numel() for basis in self.bases.values())


class MethodCase:
    """A method against its plain equations, and from its saved state on.

    Attributes:
        name: of the method.
        slow: its plain equations.
        changes: hyperparameters of these tests.
    """

    name: ClassVar[str]
    slow: ClassVar[type[Slow]]
    changes: ClassVar[dict[str, Any]] = {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """`kind` is each kind of network that the method is for."""
        if "kind" in metafunc.fixturenames:
            fitting = [k for k in KINDS if not why_not(METHODS[self.name], many_heads=k == "many")]
            metafunc.parametrize("kind", [KINDS[k] for k in fitting], ids=fitting)

    def make(self, kind: Kind, **changes: Any) -> Method:
        return method(kind.model(), self.name, **self.changes | changes)

    def test_equations(self, kind: Kind) -> None:
        """Weights, outputs and memory after each of three tasks."""
        fast = self.make(kind)
        slow, plain = self.slow(kind.model(), fast.options), Slow(kind.model(), fast.options)
        for t in range(3):
            for learner in (slow, plain):
                learner.learn(t, kind.task(t))
            train(fast, t, kind.task(t))
            assert_close(dict(fast.model.named_parameters()), dict(slow.model.named_parameters()))
            for j in range(t + 1):
                images = kind.task(j).test.images
                with fast.testing(j):
                    fast.model.eval()
                    assert_close(fast.model(images, j), slow.output(images, j))
        assert fast.memory_floats() == slow.floats()
        change = max(
            (p - q).abs().max() for p, q in zip(fast.model.parameters(), plain.model.parameters(), strict=True)
        )
        assert change > 1e-3 or self.slow is Slow, "these tasks do not tell the method from plain training"

    def test_goes_on_from_its_state(self, kind: Kind) -> None:
        """Between tasks and within one, through a file, to the same numbers bit for bit."""
        fast, continued = self.make(kind), self.make(kind)
        train(fast, 0, kind.task(0))
        continued.load_state_dict(through_a_file(fast.state_dict()))
        continued.load_weights(through_a_file(fast.weights()))
        for learner in (fast, continued):
            train(learner, 1, kind.task(1))
        resumed = self.make(kind)
        task = kind.task(2)
        fast.before_task(2, task)
        with fast.learning(2, task):
            optimizer = fast.optimizer(2, LR)
            steps(fast, 2, task, optimizer, range(2))
            kept = through_a_file([fast.state_dict(), fast.weights(), optimizer.state_dict()])
            steps(fast, 2, task, optimizer, range(2, STEPS))
        fast.after_task(2, task)
        resumed.load_state_dict(kept[0])
        resumed.load_weights(kept[1])
        with resumed.learning(2, task):
            optimizer = resumed.optimizer(2, LR)
            optimizer.load_state_dict(kept[2])
            steps(resumed, 2, task, optimizer, range(2, STEPS))
        resumed.after_task(2, task)
        train(continued, 2, task)
        for other in (continued, resumed):
            assert_close(other.weights(), fast.weights(), atol=0, rtol=0)
            states = [comparable(through_a_file(learner.state_dict())) for learner in (other, fast)]
            assert_close(*states, atol=0, rtol=0)
            assert other.memory_floats() == fast.memory_floats()

    def test_the_state_of_another_version_is_refused(self, kind: Kind) -> None:
        learner = self.make(kind)
        for name in learner.state:
            saved = {other: value for other, value in learner.state_dict().items() if other != name}
            with pytest.raises(InputError, match=f"^the saved state has no {name} of {self.name}: another version"):
                learner.load_state_dict(saved)

    def test_networks_that_it_is_not_for(self) -> None:
        """Are refused in one line."""
        for name, kind in KINDS.items():
            if reason := why_not(METHODS[self.name], many_heads=name == "many"):
                with pytest.raises(InputError, match=f"^{self.name} {reason}; "):
                    self.make(kind)


def train(learner: Method, t: int, task: Task) -> None:
    """Learn a task as the engine would, in full batches."""
    learner.before_task(t, task)
    with learner.learning(t, task):
        steps(learner, t, task, learner.optimizer(t, LR), range(STEPS))
    learner.after_task(t, task)


def steps(learner: Method, t: int, task: Task, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    """Some steps on all of a task's images, each with random numbers of its own."""
    learner.model.train()
    for step in numbers:
        torch.manual_seed(step)
        optimizer.zero_grad()
        learner.backward(*task.train, t)
        optimizer.step()
        learner.after_step(t)


def comparable(state: Any) -> Any:
    """A state with numbers in the place of texts, which assert_close does not compare."""
    if isinstance(state, dict):
        return {name: comparable(part) for name, part in state.items()}
    if isinstance(state, list):
        return list(map(comparable, state))
    return list(state.encode()) if isinstance(state, str) else state


def through_a_file(value: Any) -> Any:
    """What a checkpoint would give back."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
