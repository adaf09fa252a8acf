"""Batches of any kind: tensors, tuples, dicts, loaders; moved to the model, masked, handed to its forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradproj.distributed import local_forwards
from gradproj.errors import InputError, one_line

Forward = Callable[[Any], Any]
Mask = Callable[[Any], Tensor | None] | str
ANYTHING = [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]  # (*inputs, **arguments)


def as_batches(batches: Any) -> Iterable[Any]:
    """Some batches, or the one batch that a tensor or a dict is, as an iterable of them.

    Raises:
        InputError: they are neither.
    """
    if isinstance(batches, (Tensor, Mapping)):
        return [batches]
    if isinstance(batches, tuple) and not _alike(batches):
        raise InputError(
            "batches is a tuple, which could be one batch or several; give a list: [batch], with the tuple as its "
            "batch, or [batch, batch, …]"
        )
    if isinstance(batches, str) or hasattr(batches, "__array__") or not isinstance(batches, Iterable):
        raise InputError(
            f"batches is of type {type(batches).__name__}; give batches in a list or a DataLoader, or a tensor"
        )
    return batches


def _alike(parts: tuple[Any, ...]) -> bool:
    """Whether some tensors can be batches of one kind, as `tensor.split` makes them, rather than inputs and labels."""
    return all(isinstance(part, Tensor) for part in parts) and len({(p.shape[1:], p.dtype) for p in parts}) <= 1


def runner(forward: Forward, model: nn.Module) -> Forward:
    """A function that runs one batch: on the model's device, with one line for a batch that does not fit.

    Args:
        forward: takes a batch; or a module, which is called with what of a batch it takes: the entries of a dict by
            name, of a tuple as many as it needs (so that labels beside the inputs are left out), or all where its
            forward takes (*inputs).
        model: whose device is meant.
    """
    call = (lambda batch: call_module(forward, batch)) if isinstance(forward, nn.Module) else forward
    devices = {p.device for p in (*model.parameters(), *model.buffers())}
    device = devices.pop() if len(devices) == 1 else None

    def run(batch: Any) -> Any:
        batch = batch if device is None else moved(batch, device)
        try:
            with local_forwards():
                return call(batch)
        except (AttributeError, TypeError) as error:
            if isinstance(batch, Tensor):
                raise
            reason = one_line(error)
            raise InputError(
                f"forward cannot take a batch of type {type(batch).__name__} ({reason}); give a function that runs the "
                "model on one"
            ) from error

    return run


def call_module(module: nn.Module, batch: Any) -> Any:
    """Call a module with what of a batch it takes."""
    if isinstance(batch, Mapping):
        return module(**batch)
    if not isinstance(batch, (list, tuple)):
        return module(batch)
    inner: Any = module
    parameters = list(inspect.signature(inner.forward).parameters.values())
    while [p.kind for p in parameters] == ANYTHING and isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module  # inside DistributedDataParallel and its like
        parameters = list(inspect.signature(inner.forward).parameters.values())
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_all = not needed and any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if takes_all and [p.kind for p in parameters] != ANYTHING:  # that is a wrapper of who knows what
        return module(*batch)
    return module(*batch[: max(1, len(needed))])


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(moved(value, device) for value in batch)
    return batch


def masks(mask: Mask | None, batch: Any) -> Tensor | None:
    """Which samples, or positions of them, of a batch count; None for all.

    Raises:
        InputError: the mask gives something else.
    """
    if mask is None:
        return None
    try:
        found = batch[mask] if isinstance(mask, str) else mask(batch)
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"mask {mask!r} cannot be read from a batch of type {type(batch).__name__}: {error}"
        ) from error
    if found is None:
        return None
    if not isinstance(found, Tensor) or found.ndim not in (1, 2):
        raise InputError("mask must give a tensor of shape (batch,) or (batch, positions)")
    if isinstance(batch, Tensor) and len(batch) not in (*found.shape, found.numel()):
        raise InputError(
            f"mask is {tuple(found.shape)}, but the batch is {tuple(batch.shape)}; give each sample a value"
        )
    return found.bool()


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within this context a model is in eval mode; afterwards each module is in the mode it had.

    Its own `train` takes it there, which may do more, such as merge low-rank weights and part them again.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():  # parents first, whose `train` is their children's too
            if module.training != mode:
                module.train(mode)
        for module, mode in modes.items():  # where a `train` does not do as it is told
            module.training = mode
