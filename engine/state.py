"""What a method remembers, as it is saved, put back and counted: tensors and plain values in lists and dicts."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradproj.errors import InputError

OWN = "method:"  # the beginning of the names, among a network's weights, of a method's own parameters
BUFFER = "buffer:"  # and of the buffers that the network's own state leaves out
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)  # what a checkpoint reads back


def saved(value: Any) -> Any:
    """A value as tensors, plain values, lists and dicts only; parameters, which training changes in place, as copies.

    Args:
        value: a tensor, parameter, generator, plain value, an object with `state_dict`, or a list, tuple, named tuple,
            dataclass or dict of these. What is not there when a run begins comes back as a list, tuple or dict.
    """
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().clone(), value.requires_grad)
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, torch.Generator):
        return value.get_state()
    value = _as_dict(value)
    if isinstance(value, Mapping):
        return {key: saved(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(saved, value)) if type(value) in (list, tuple) else [saved(part) for part in value]
    if isinstance(value, nn.Module | torch.optim.Optimizer):  # whose tensors training changes in place
        return copy.deepcopy(saved(value.state_dict()))
    if hasattr(value, "state_dict"):
        return saved(value.state_dict())
    if type(value) not in PLAIN:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise InputError(
            f"a method's state holds a {kind}, which cannot be saved; it may hold tensors, parameters, torch "
            "generators, numbers, texts, and lists and dicts of these"
        )
    return value


@torch.no_grad()
def restored(current: Any, value: Any, device: torch.device) -> Any:
    """A saved value as the attribute that it was saved from: objects, and parameters that optimisers hold, are kept.

    Args:
        current: what the attribute is now.
        value: what `saved` gave.
        device: where tensors go.
    """
    if isinstance(current, torch.Generator):
        current.set_state(value.cpu())
        return current
    if isinstance(current, nn.ParameterList):
        parts = list(value.values()) if isinstance(value, Mapping) else value  # an older version's is a dict
        return nn.ParameterList(restored(list(current), parts, device))
    if isinstance(current, nn.ParameterDict):
        return nn.ParameterDict(restored(dict(current), value, device))
    if hasattr(current, "load_state_dict"):
        current.load_state_dict(value)
        return current.to(device) if isinstance(current, nn.Module) else current
    if dataclasses.is_dataclass(current) or hasattr(current, "_asdict"):
        before = _as_dict(current)
        parts = {name: part for name, part in (value or {}).items() if name in before}
        return type(current)(**{name: restored(before[name], part, device) for name, part in parts.items()})
    if isinstance(value, nn.Parameter):
        if isinstance(current, nn.Parameter) and (current.shape, current.device) == (value.shape, device):
            current.copy_(value)
            return current
        return nn.Parameter(value.detach().to(device), value.requires_grad)
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        before = current if isinstance(current, Mapping) else {}
        parts = {key: restored(before.get(key), part, device) for key, part in value.items()}
        if not isinstance(current, dict):
            return parts
        kept = copy.copy(current)  # of its kind, such as a defaultdict
        kept.clear()
        kept.update(parts)
        return kept
    if isinstance(value, (list, tuple)):
        before = [*current, *[None] * len(value)] if isinstance(current, (list, tuple)) else [None] * len(value)
        parts = [restored(before[i], part, device) for i, part in enumerate(value)]
        return tuple(parts) if isinstance(current, tuple) or isinstance(value, tuple) else parts
    return value


def modules(value: Any, place: str = "") -> dict[str, list[str]]:
    """The modules in a value, by where they stand in it, each with the names of its state; parameter lists may grow."""
    if isinstance(value, nn.ParameterList | nn.ParameterDict):
        return {}
    if isinstance(value, nn.Module):
        return {place: sorted(value.state_dict())}
    value = _as_dict(value)
    if isinstance(value, Mapping):
        parts = [modules(part, f"{place}[{key!r}]" if place else str(key)) for key, part in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [modules(part, f"{place}[{i}]") for i, part in enumerate(value)]
    else:
        return {}
    return {name: names for found in parts for name, names in found.items()}


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a value, in a fixed order; of objects, those of their state."""
    value = _as_dict(value)
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part)
    elif isinstance(value, nn.Module):
        yield from (*value.parameters(), *value.buffers())
    elif hasattr(value, "state_dict"):
        yield from tensors(value.state_dict())


def parameters(value: Any) -> list[nn.Parameter]:
    """The parameters among them: what training may move."""
    return [tensor for tensor in tensors(value) if isinstance(tensor, nn.Parameter)]


def of_network(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of what training moves (`Method.weights`), what the network's own state holds."""
    return {name: value for name, value in weights.items() if not name.startswith((OWN, BUFFER))}


def unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """A network's buffers that its own state leaves out (`persistent=False`), under their names among its weights."""
    saved = model.state_dict()
    return {f"{BUFFER}{name}": value for name, value in model.named_buffers() if name not in saved}


def put_buffers(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a network's unsaved buffers the values that they have among its weights: in place, unless the network makes
    a buffer anew or has none yet. What is not among them stays as it is; older versions kept none."""
    device = next(model.parameters()).device
    for name, value in weights.items():
        if name.startswith(BUFFER):
            owner, _, leaf = name.removeprefix(BUFFER).rpartition(".")
            module = model.get_submodule(owner)
            current = module._buffers.get(leaf)
            alike = current is not None and (current.shape, current.dtype) == (value.shape, value.dtype)
            if alike and current.is_contiguous():
                current.copy_(value)
            else:
                module.register_buffer(leaf, value.to(device, copy=True), persistent=False)


def count(value: Any) -> int:
    """How many numbers the floating-point tensors among them hold."""
    return sum(tensor.numel() for tensor in tensors(value) if tensor.is_floating_point())


def _as_dict(value: Any) -> Any:
    """A named tuple, a dataclass or a torch list or dict of parameters as plain ones; anything else as it is."""
    if isinstance(value, nn.ParameterList):
        return list(value)
    if isinstance(value, nn.ParameterDict):
        return dict(value)
    if hasattr(value, "_asdict"):
        return value._asdict()
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value
