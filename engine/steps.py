"""One epoch of training steps, in the fastest form that fits: by hand, as a CUDA graph, or one operation at a time.

All three compute the same steps; `--step eager` asks for the last, which fits everything.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine import distributed
from engine.contract import check_order, check_step, declares
from engine.fused import FusedChain, chain_outputs
from engine.method import Method
from engine.seeds import derived_seed, generator
from engine.task import Split, Task, batches

CHAIN_SCALES = (1.0, 1e-3, 1e3, 1e6)  # of images, at which a chain must be one: activations may bend elsewhere
WARM_UP_STEPS = 3  # eager steps before a capture: they make cuBLAS and cuDNN allocate and choose what they need


class Steps(Protocol):
    """Goes through a task's training images once."""

    def epoch(self, order: Tensor) -> float:
        """Train on the images in `order` (n,) at the learning rates that the optimiser has; returns the mean loss."""
        ...


def make_steps(method: Method, optimizer: torch.optim.Optimizer, t: int, task: Task) -> Steps:
    """The fastest form of a task's training steps that fits the method, the model and the device."""
    device, options = task.train.images.device.type, method.options
    if distributed.is_shared():
        return SharedSteps(method, optimizer, t, task.train)
    if options.step == "auto" and device == "cpu" and declares(type(method), "plain_step") and options.amp == "off":
        if is_plain_sgd(optimizer) and is_plain_chain(method.model, optimizer, t, task.train.images[:2]):
            return FusedSteps(method, optimizer, task.train)
    # Of other optimisers a rehearsal of the graph would leave traces in what they remember.
    says = any(declares(type(method), step) for step in ("plain_step", "graph_step"))
    may_record = says and type(optimizer) is torch.optim.SGD
    if options.step == "auto" and device == "cuda" and may_record:
        return GraphSteps(method, optimizer, t, task.train)
    return EagerSteps(method, optimizer, t, task.train)


def is_plain_sgd(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of an optimiser is W ← W - lr G and nothing else."""
    if type(optimizer) is not torch.optim.SGD or len(optimizer.param_groups) > 1:  # groups may have rates of their own
        return False
    (group,) = optimizer.param_groups
    return not (group["momentum"] or group["weight_decay"] or group["maximize"])


def is_plain_chain(model: nn.Module, optimizer: torch.optim.Optimizer, t: int, images: Tensor) -> bool:
    """Whether a model is the chain of Linear layers and ReLUs that its `relu_chain` says, and all of it is trained.

    Its forward may have been changed since (another activation, perhaps one that is alike for small values; dropout),
    some of its weights frozen, or hooks put on them.
    """
    layers = getattr(model, "relu_chain", None)
    if layers is None or any(layer.bias is not None for layer in layers):
        return False
    trained = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    if trained != {layer.weight for layer in layers}:
        return False
    hooked = [p for p in trained if p._backward_hooks or p._post_accumulate_grad_hooks]
    hooked += [module for module in model.modules() if module._backward_hooks or module._backward_pre_hooks]
    if hooked:
        return False
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for scale in CHAIN_SCALES:
            logits = chain_outputs([layer.weight for layer in layers], scale * images)[-1]
            if not torch.allclose(model.train()(scale * images, t), logits, rtol=1e-3, atol=1e-5 * scale):
                return False
    return True


class FusedSteps:
    """The steps of a chain of Linear layers, written out by hand (engine/fused.py)."""

    def __init__(self, method: Method, optimizer: torch.optim.Optimizer, train: Split) -> None:
        self.model, self.optimizer, self.batch_size = method.model, optimizer, method.options.batch_size_train
        names = {layer: name for name, layer in method.model.named_modules()}
        layers = method.model.relu_chain
        projectors = {
            i: method.projectors[names[layer]] for i, layer in enumerate(layers) if names[layer] in method.projectors
        }
        self.chain = FusedChain(layers, projectors, train)

    def epoch(self, order: Tensor) -> float:
        (group,) = self.optimizer.param_groups
        return self.chain.epoch(order, list(batches(len(order), self.batch_size)), group["lr"])


class EagerSteps:
    """Forward, backward and optimiser by autograd, with the method's say at each moment."""

    def __init__(self, method: Method, optimizer: torch.optim.Optimizer, t: int, train: Split) -> None:
        self.method, self.optimizer, self.t, self.train = method, optimizer, t, train
        self.begun = False

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Learn from a batch; returns its mean loss, still on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.method.backward(images, labels, self.t)
        if self.t == 0 and not self.begun:  # later all layers may be full
            check_step(self.method, self.optimizer, loss)
            self.begun = True
        self.optimizer.step()
        self.method.after_step(self.t)
        return loss

    def epoch(self, order: Tensor) -> float:
        return self.walk(order, self.step)

    def walk(self, order: Tensor, step: Callable[[Tensor, Tensor], Tensor]) -> float:
        """Take every batch through `step`; the only synchronisation is the mean loss at the end."""
        self.method.model.train()
        images, labels = self.train
        order = order.to(labels.device)
        total = torch.zeros((), dtype=torch.float64, device=labels.device)
        for start, stop in batches(len(order), self.method.options.batch_size_train):
            index = order[start:stop]
            total += step(images[index], labels[index]) * (stop - start)
        return total.item() / len(order)


class SharedSteps(EagerSteps):
    """Eager steps on batches that several processes share."""

    def epoch(self, order: Tensor) -> float:
        torch.manual_seed((torch.initial_seed() + distributed.rank()) % 2**63)  # each draws dropout of its own
        return super().epoch(order)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        start, stop, weight = distributed.share_of(len(images))
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.method.backward(images[start:stop], labels[start:stop], self.t)
        loss = distributed.average_gradients(self.method.parameters(self.t), loss, weight)
        self.optimizer.step()
        self.method.after_step(self.t)
        return loss


class GraphSteps(EagerSteps):
    """Eager steps recorded once as a CUDA graph for each batch size, then replayed without Python or launch cost."""

    def __init__(self, method: Method, optimizer: torch.optim.Optimizer, t: int, train: Split) -> None:
        super().__init__(method, optimizer, t, train)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}
        self.rates: list[float] = []
        self.captures = True

    def epoch(self, order: Tensor) -> float:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        if rates != self.rates:  # a graph holds its learning rates, so with others (a few times a task) it is made anew
            self.graphs, self.rates = {}, rates
        return self.walk(order, self.replay)

    def replay(self, images: Tensor, labels: Tensor) -> Tensor:
        """A step, by the graph of its batch size; eagerly if no graph can be captured."""
        if self.captures and len(images) not in self.graphs:
            try:
                self.graphs[len(images)] = self.capture(images, labels)
            except RuntimeError as error:  # the end of a capture fails too, and hides what went wrong in it
                reason = (str(error.__context__ or error).splitlines() or ["unknown reason"])[0]
                warnings.warn(f"no CUDA graph ({reason}); training eagerly", stacklevel=2)
                self.captures, self.graphs = False, {}
                forget_capture()
        if not self.captures:  # outside the except clause, whose error would keep the failed attempt's tensors alive
            return self.step(images, labels)
        graph, graph_images, graph_labels, loss = self.graphs[len(images)]
        graph_images.copy_(images)
        graph_labels.copy_(labels)
        graph.replay()
        return loss

    def capture(self, images: Tensor, labels: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        """Record one step on static copies of a batch; recording runs nothing, and the rehearsal leaves no trace."""
        images, labels = images.clone(), labels.clone()
        with self.rehearsal():
            for _ in range(WARM_UP_STEPS):
                self.step(images, labels)
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):  # back on it also after a failure
            loss = self.step(images, labels)
        return graph, images, labels, loss

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Within this context steps run on a side stream; weights, buffers, momenta and random state come back."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        changed = [*parameters, *self.method.model.buffers()]
        before = [value.detach().clone() for value in changed]
        momenta = [self.optimizer.state[p].get("momentum_buffer") for p in parameters]
        momenta_before = [None if m is None else m.clone() for m in momenta]
        random_state = torch.cuda.get_rng_state()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                yield
        finally:
            torch.cuda.current_stream().wait_stream(side)
            with torch.no_grad():
                for value, old in zip(changed, before, strict=True):
                    value.copy_(old)
                for parameter, old in zip(parameters, momenta_before, strict=True):
                    buffer = self.optimizer.state[parameter].get("momentum_buffer")
                    if buffer is not None:  # the buffer of a first step starts from zero
                        buffer.zero_() if old is None else buffer.copy_(old)
            torch.cuda.set_rng_state(random_state)


def forget_capture() -> None:
    """Give the device's generator a state of its own again: after a failed capture it takes itself to be captured, and
    would refuse the next eager dropout."""
    random = torch.cuda.default_generators[torch.cuda.current_device()]
    random.graphsafe_set_state(random.clone_state())


FIRST_RATE = "first_lr"  # of a parameter group, what its rate is when a task begins


def begin_rates(optimizer: torch.optim.Optimizer) -> None:
    """Let a task's parameter groups begin at their own rates, also where the optimiser served tasks before."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault(FIRST_RATE, group["lr"])


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, before: float | None, start: float) -> None:
    """Give parameter groups the schedule's rate; one that began at another than `start` falls in proportion, and one
    whose rate the method has changed from there.

    Args:
        optimizer: of the task.
        lr: of the next epoch.
        before: of the last one; None where an older version did not say.
        start: of the task's first epoch.
    """

    def usual(group: dict[str, Any], lr: float) -> float:
        first = group.get(FIRST_RATE, group.get("initial_lr", start))  # older versions had the second alone
        return lr if first == start else first * (lr / start)

    for group in optimizer.param_groups:
        own = before is not None and group["lr"] != usual(group, before)
        group["lr"] = group["lr"] * (lr / before) if own else usual(group, lr)


def seeded_order(method: Method, t: int, epoch: int, labels: Tensor) -> Tensor:
    """Seed an epoch's random choices by its place alone, so that a resumed run makes the same; returns its order."""
    seed = method.options.seed
    torch.manual_seed(derived_seed(seed, "train", t, epoch))
    order = method.order(labels, generator(seed, "order", t, epoch))
    check_order(method, order, len(labels))
    return order
