"""What a method is: its hyperparameters, what it remembers, and the few moments of training at which methods differ."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import state
from engine.contract import check_class, check_defaults, check_loss, check_network
from engine.fingerprint import frozen_parameters
from engine.heads import task_modules
from engine.options import Options, check, complete
from engine.task import Task
from gradproj import GradientProjectionMemory
from gradproj.errors import InputError
from gradproj.layers import Layer, find_layers
from gradproj.normalization import frozen, normalization_parameters
from gradproj.projection import LayerProjector

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Method:
    """A way to learn tasks one after another. Every moment has a default: plain training.

    Args:
        model: called as `model(images, task)`; `engine.heads` says how it tells which modules are of single tasks.
        options: the run's hyperparameters; the method's own have their defaults where `options` lacks them.
    Raises:
        InputError: the method cannot be used with this model or these options.

    Attributes:
        name: on the command line and in folders.
        title: as papers print it.
        place: in the order of colours in pictures; a new method has the next free one.
        flags: the method's own hyperparameters, each an `engine.options.flag`; read as `self.options.NAME`.
        reads: of the hyperparameters that only some methods read (`threshold`, …), those that this one does.
        defaults: of hyperparameters that differ from the script's, by name; under a benchmark's name, those for it.
        heads: the benchmarks it is for: those with "one" head for all tasks, with "many", or "any".
        joint: it learns all tasks at once, joined into one (`engine.task.join`), instead of in turn.
        mixes_tasks: it puts images of several tasks into one tensor, so that they must have one shape and dtype.
        knows_n_tasks: what it does on a task depends on how many there are, so that a run with more tasks cannot go on
            from one with fewer.
        plain_step: a step is SGD on the cross-entropy with projected gradients and nothing else, so that it may be
            taken by hand-written code. A class that changes `loss`, `backward` or `after_step` has none.
        graph_step: a step takes no decision on the host, so that it may be captured as a CUDA graph. A subclass that
            changes one of these says it anew.
        learns_when_full: layers go on learning where every direction of their memory is taken.
        task_identity: at test it uses which task an image is of beyond the choice of a head.
        one_network: the same weights are tested on all tasks, so that their interference can be measured.
        state: names of the attributes that a continued run needs: tensors, parameters, generators, plain values, a
            GradientProjectionMemory, and lists and dicts of these. Replace tensors instead of changing them in place.
        given: the names of the model's parameters as it came, before a method adds some of its own.
        given_frozen: those of them that were frozen.
        memory: the bases, of methods that have some.
        projectors: by layer name, while learning.
        lr: of the epoch at hand.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    place: ClassVar[int | None] = None
    flags: ClassVar[Mapping[str, Any]] = NOTHING
    reads: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[Mapping[str, Any]] = NOTHING
    heads: ClassVar[Literal["one", "many", "any"]] = "any"
    joint: ClassVar[bool] = False
    mixes_tasks: ClassVar[bool] = False
    knows_n_tasks: ClassVar[bool] = False
    plain_step: ClassVar[bool] = False
    graph_step: ClassVar[bool] = False
    learns_when_full: ClassVar[bool] = False
    task_identity: ClassVar[bool] = False
    one_network: ClassVar[bool] = True
    state: ClassVar[tuple[str, ...]] = ()
    memory: GradientProjectionMemory | None = None
    projectors: Mapping[str, LayerProjector] = NOTHING

    def __init__(self, model: nn.Module, options: Options) -> None:
        check_class(type(self))
        check_network(model)
        self.model = model
        check_defaults(type(self), type(options))
        self.options = complete(options, type(self))
        check(self.options)
        self.refuse(self.options)
        self.lr = self.options.lr
        self.given = frozenset(name for name, _ in model.named_parameters())
        self.given_frozen = frozenset(frozen_parameters(model))
        self.task_modules = task_modules(model, self.options.n_tasks)
        if reason := why_not(type(self), many_heads=bool(self.task_modules)):
            found = "a head for each task" if self.task_modules else "one for all"
            raise InputError(f"{self.name} {reason}; {type(model).__name__} has {found}")

    @classmethod
    def refuse(cls, options: Options) -> None:
        """Raise InputError for options that the method cannot use; asked before data and network are made."""

    def before_task(self, t: int, task: Task) -> None:
        """Task t begins; not called again when a run is continued within it."""

    def learning(self, t: int, task: Task) -> AbstractContextManager[None]:
        """Surrounds the training of task t; entered anew when a run is continued within a task."""
        return _nothing()

    def testing(self, t: int) -> AbstractContextManager[None]:
        """Surrounds all that is done with the network as it is tested on task t."""
        return _nothing()

    def parameters(self, t: int) -> list[nn.Parameter]:
        """What training on task t moves; asked for inside `learning`."""
        return self.trainable([t])

    def optimizer(self, t: int, lr: float) -> torch.optim.Optimizer:
        """Made once a task. When the schedule divides lr, the rates of all parameter groups are divided with it."""
        return torch.optim.SGD(self.parameters(t), lr=lr, momentum=self.options.momentum)

    def order(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The order of an epoch's images; each batch takes the next `options.batch_size_train` of them."""
        return torch.randperm(len(labels), generator=generator)

    def loss(self, images: Tensor, labels: Tensor, t: int) -> Tensor:
        """The loss of a batch, to be minimised."""
        return F.cross_entropy(self.model(images, t), labels)

    def backward(self, images: Tensor, labels: Tensor, t: int) -> Tensor:
        """Leave the gradients of a batch in the parameters, which have none yet; returns its mean loss."""
        with self.precision(images.device):
            loss = self.loss(images, labels, t)
        check_loss(self, loss)
        loss.backward()
        return loss.detach()

    def after_step(self, t: int) -> None:
        """The optimiser has moved."""

    def after_task(self, t: int, task: Task) -> None:
        """Task t is learned, its best weights are in the model."""

    def memory_floats(self) -> int:
        """How many numbers the method keeps of the past besides the network itself: by default those of its state."""
        return state.count({name: getattr(self, name) for name in self.state})

    def state_dict(self) -> dict[str, Any]:
        """What the method must save to go on: tensors and plain values only."""
        return {name: state.saved(getattr(self, name)) for name in self.state}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a saved state; raises InputError where it is that of another version of the method."""
        if missing := [name for name in self.state if name not in saved]:
            raise InputError(
                f"the saved state has no {', '.join(missing)} of {self.name}: another version of it wrote that; go on "
                "with that version, or begin anew in another folder"
            )
        device = next(self.model.parameters()).device
        for name in self.state:
            setattr(self, name, state.restored(getattr(self, name, None), saved[name], device))

    def weights(self) -> dict[str, Tensor]:
        """A copy of all that training moves: the model's state and buffers, and the method's own parameters."""
        own = enumerate(state.parameters({name: getattr(self, name) for name in self.state}))
        all_weights = self.model.state_dict() | {f"{state.OWN}{i}": p.detach() for i, p in own}
        return {name: value.clone() for name, value in (all_weights | state.unsaved_buffers(self.model)).items()}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Put `weights` back."""
        self.model.load_state_dict(state.of_network(weights))
        state.put_buffers(self.model, weights)
        for i, p in enumerate(state.parameters({name: getattr(self, name) for name in self.state})):
            p.copy_(weights[f"{state.OWN}{i}"])

    def precision(self, device: torch.device) -> torch.autocast:
        """A context in which a forward pass runs as --amp says."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.options.amp == "bf16")

    def trainable(self, tasks: Collection[int]) -> list[nn.Parameter]:
        """The parameters that are not frozen: all shared ones, and of those of single tasks, some tasks'."""
        others = [modules for t, modules in enumerate(self.task_modules) if t not in tasks]
        left_out = {id(p) for modules in others for module in modules for p in module.parameters()}
        left_out -= {id(p) for t in tasks for module in self._modules_of(t) for p in module.parameters()}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in left_out]

    def _modules_of(self, t: int) -> list[nn.Module]:
        return self.task_modules[t] if t < len(self.task_modules) else []

    def frozen_normalization(self, t: int) -> AbstractContextManager[None]:
        """A context in which, from the second task on, shared normalisation layers' scales and shifts get no gradient,
        as under GPM."""
        return frozen(normalization_parameters(self.model, self.task_module_names) if t else ())

    @property
    def task_module_names(self) -> list[str]:
        """The names of the modules that belong to single tasks: what no method protects."""
        own = {id(module) for modules in self.task_modules for module in modules}
        return [name for name, module in self.model.named_modules() if id(module) in own]

    def shared_layers(self) -> dict[str, Layer]:
        """The layers that all tasks share, by name."""
        return find_layers(self.model, exclude=self.task_module_names)


def why_not(method: type[Method], many_heads: bool) -> str | None:
    """Why a method cannot be used where each task has a head of its own, or where none has; None if it can."""
    if method.heads == "many" and not many_heads:
        return "is for networks with a head for each task"
    if method.heads == "one" and many_heads:
        return "is for networks with one head that all tasks share"
    return None


@contextmanager
def _nothing() -> Iterator[None]:
    yield
