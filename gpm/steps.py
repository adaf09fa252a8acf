"""One epoch of training steps, in the fastest form that fits: by hand, as a CUDA graph, or one operation at a time.

All three compute the same steps; `--step eager` asks for the last, which fits everything.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from gpm.fused import FusedChain
from gpm.methods.base import Method
from gpm.options import Options
from gpm.task import Split, Task, batches

WARM_UP_STEPS = 3  # eager steps before a capture: they make cuBLAS and cuDNN allocate and choose what they need


class Steps(Protocol):
    """Goes through a task's training images once."""

    def epoch(self, order: Tensor, lr: float) -> float:
        """Train on the images in `order` (n,) at a learning rate; returns the mean loss over them while training."""
        ...


def make_steps(method: Method, optimizer: torch.optim.Optimizer, t: int, task: Task, options: Options) -> Steps:
    """The fastest form of a task's training steps that fits the method, the model and the device."""
    device = task.train.images.device
    chain = getattr(method.model, "relu_chain", None)
    plain_sgd = options.momentum == 0 and options.amp == "off"
    if options.step == "auto" and device.type == "cpu" and chain and plain_sgd and method.has_plain_step:
        return FusedSteps(method, task.train, options.batch_size_train)
    if options.step == "auto" and device.type == "cuda" and method.has_plain_step:
        return GraphSteps(method, optimizer, t, task.train, options)
    return EagerSteps(method, optimizer, t, task.train, options)


class FusedSteps:
    """The steps of a chain of Linear layers, written out by hand (gpm/fused.py)."""

    def __init__(self, method: Method, train: Split, batch_size: int) -> None:
        self.model, self.batch_size = method.model, batch_size
        names = {layer: name for name, layer in method.model.named_modules()}
        layers = method.model.relu_chain
        projectors = {
            i: method.projectors[names[layer]] for i, layer in enumerate(layers) if names[layer] in method.projectors
        }
        self.chain = FusedChain(layers, projectors, train)

    def epoch(self, order: Tensor, lr: float) -> float:
        """See Steps."""
        return self.chain.epoch(order, list(batches(len(order), self.batch_size)), lr)


class EagerSteps:
    """Forward, backward and optimiser by autograd, with the method's say at each moment."""

    def __init__(
        self, method: Method, optimizer: torch.optim.Optimizer, t: int, train: Split, options: Options
    ) -> None:
        self.method, self.optimizer, self.t, self.train = method, optimizer, t, train
        self.batch_size, self.amp = options.batch_size_train, options.amp

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Learn from a batch; returns its mean loss, still on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp == "bf16"):
            loss = self.method.loss(images, labels, self.t)
        if loss.requires_grad:  # not where every layer is full: nothing is left to learn
            loss.backward()
        self.method.after_backward(self.t)
        self.optimizer.step()
        self.method.after_step(self.t)
        return loss.detach()

    def epoch(self, order: Tensor, lr: float) -> float:
        """See Steps."""
        set_learning_rate(self.optimizer, lr)
        return self.walk(order, self.step)

    def walk(self, order: Tensor, step: Callable[[Tensor, Tensor], Tensor]) -> float:
        """Take every batch through `step`; the only synchronisation is the mean loss at the end."""
        self.method.model.train()
        images, labels = self.train
        order = order.to(labels.device)
        total = torch.zeros((), dtype=torch.float64, device=labels.device)
        for start, stop in batches(len(order), self.batch_size):
            index = order[start:stop]
            total += step(images[index], labels[index]) * (stop - start)
        return total.item() / len(order)


class GraphSteps(EagerSteps):
    """Eager steps recorded once as a CUDA graph for each batch size, then replayed without Python or launch cost."""

    def __init__(
        self, method: Method, optimizer: torch.optim.Optimizer, t: int, train: Split, options: Options
    ) -> None:
        super().__init__(method, optimizer, t, train, options)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}
        self.lr: float | None = None
        self.captures = True

    def epoch(self, order: Tensor, lr: float) -> float:
        """See Steps. A graph holds its learning rate, so a new rate (a few times a task) is captured anew."""
        if lr != self.lr:
            set_learning_rate(self.optimizer, lr)
            self.graphs, self.lr = {}, lr
        return self.walk(order, self.replay)

    def replay(self, images: Tensor, labels: Tensor) -> Tensor:
        """A step, by the graph of its batch size; eagerly if no graph can be captured."""
        if not self.captures:
            return self.step(images, labels)
        if len(images) not in self.graphs:
            try:
                self.graphs[len(images)] = self.capture(images, labels)
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph ({str(error).splitlines()[0]}); training eagerly", stacklevel=2)
                self.captures = False
                return self.step(images, labels)
        graph, graph_images, graph_labels, loss = self.graphs[len(images)]
        graph_images.copy_(images)
        graph_labels.copy_(labels)
        graph.replay()
        return loss

    def capture(self, images: Tensor, labels: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        """Record one step on static copies of a batch, leaving weights, optimiser and random state as they were."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        momenta = [self.optimizer.state[p].get("momentum_buffer") for p in parameters]
        momenta_before = [None if m is None else m.clone() for m in momenta]
        random_state = torch.cuda.get_rng_state(images.device)
        images, labels = images.clone(), labels.clone()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                self.step(images, labels)
        torch.cuda.current_stream().wait_stream(side)

        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with torch.cuda.graph(graph):
                loss = self.step(images, labels)
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)
                for parameter, value in zip(parameters, momenta_before, strict=True):
                    buffer = self.optimizer.state[parameter].get("momentum_buffer")
                    if buffer is not None:  # the buffer of a first step starts from zero
                        buffer.zero_() if value is None else buffer.copy_(value)
            torch.cuda.set_rng_state(random_state, images.device)
        return graph, images, labels, loss


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
