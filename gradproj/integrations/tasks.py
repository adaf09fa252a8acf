"""What the integrations share: a task begins, and is remembered where it ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from gradproj.batches import Forward, as_batches
from gradproj.errors import InputError, warn_caller
from gradproj.memory import GradientProjectionMemory


class TaskBoundaries:
    """Protects what a memory holds while a task is trained, and has it remember the task afterwards.

    Args:
        memory: of the model that is trained, or of a part of it.
        threshold: ε, as in `memory.update`.
        samples: the batches to remember a task by; by default random ones of its training data.
        n_samples: how many those are, over all processes.
        remember: False for a task that is only protected in: the last one, or one that `memory.update` remembers later,
            so that `memory.verify` can look at old tasks before that.
        forward: runs the model on one batch; by default the memory's model is called with it.
        freeze_unprotected: as in `memory.protect`.
        update: further arguments of `memory.update`, such as mask=… or max_columns=….
    """

    def __init__(
        self,
        memory: GradientProjectionMemory,
        threshold: float | Mapping[str, float],
        samples: Any | None = None,
        n_samples: int = 300,
        remember: bool = True,
        forward: Forward | None = None,
        freeze_unprotected: bool = False,
        **update: Any,
    ) -> None:
        super().__init__()
        if n_samples < 1:
            raise InputError(f"n_samples is {n_samples}; it must be 1 or more")
        if samples is not None and iter(as_batches(samples)) is samples:
            raise InputError("samples can run only once, but are needed again; give a list or a DataLoader")
        self.memory, self.threshold, self.samples, self.n_samples = memory, threshold, samples, n_samples
        self.remember, self.forward = remember, forward or memory.model
        self.freeze_unprotected, self.update = freeze_unprotected, update

    def begin(self, model: nn.Module, optimizers: Any, loader: Any) -> None:
        """Open the protection; before the first task, look at what it will do.

        Args:
            model: the one that is trained.
            optimizers: that will train it.
            loader: of the task's training data.
        Raises:
            InputError: the memory is of another model, layers of it do not run, or samples cannot be had.
        """
        self.memory.stop()  # an exception may have left it open
        trained = {id(p) for p in model.parameters()}
        layers = self.memory.layers.values()
        if any(p is not None and id(p) not in trained for layer in layers for p in layer.parameters):
            raise InputError("the memory is of another model than the one that is trained; make it of that one")
        if self.remember:
            self._look(self._batches(loader, 1))
        self.memory.start(optimizers, self.freeze_unprotected)

    def end(self, loader: Any) -> None:
        """Close the protection and remember the task whose training data a loader gives."""
        self.memory.stop()
        if self.remember:
            self.memory.update(self.forward, self._batches(loader, self.n_samples), self.threshold, **self.update)

    def take_over(self, state: Mapping[str, Any]) -> None:
        """Load the memory that a checkpoint holds."""
        if state["n_updates"] < self.memory.n_updates:
            warn_caller(
                f"the memory goes back from {self.memory.n_updates} tasks to the checkpoint's {state['n_updates']}: "
                "those between are protected no longer"
            )
        self.memory.stop()
        self.memory.load_state_dict(state)

    def _look(self, batches: Any) -> None:
        """Find out before a task is trained what would be found at its end."""
        batch = next(iter(as_batches(batches)), None)
        if batch is None:
            raise InputError("there is no sample to remember the task by")
        if not self.memory.n_updates:
            found = self.memory.check(self.forward, batch, self.threshold, self.update.get("mask"))
            if found.silent:
                raise InputError(f"layer {', '.join(found.silent)} did not run on a batch; exclude what does not run")

    def _batches(self, loader: Any, n: int) -> Any:
        return self.samples if self.samples is not None else batches_of(loader, n)


def batches_of(loader: Any, n: int) -> list[Any]:
    """Batches like a loader's own of n random samples of its data, or of its first ones where it is a stream.

    In a process group each process gets its share. The random state of the process stays as it is.

    Raises:
        InputError: it is no DataLoader that makes batches of samples.
    """
    if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
        raise InputError(f"samples cannot be drawn from a {type(loader).__name__}; give samples=[batch, …] of the task")
    size = min(n, getattr(loader.batch_sampler, "batch_size", None) or n)
    is_group = distributed.is_available() and distributed.is_initialized()
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if is_group else (0, 1)
    data: Any = loader.dataset
    if not isinstance(data, IterableDataset):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
        data = Subset(data, order[:n][rank::world].tolist())
    with same_random_state():
        return list(islice(DataLoader(data, size, collate_fn=loader.collate_fn), -(-n // size)))


@contextmanager
def same_random_state() -> Iterator[None]:
    """Within this context torch's random numbers on the CPU are drawn without effect on later ones."""
    with torch.random.fork_rng(devices=[]):
        yield
