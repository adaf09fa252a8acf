"""Classes by where they are, so that what a run used can be found again."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from gradproj.errors import InputError


def describe(thing: type) -> str:
    """Where a class is: its module and name."""
    return f"{thing.__module__}.{thing.__qualname__}"


def find(place: str) -> Any:
    """The class at a place that `describe` named."""
    module, _, name = place.rpartition(".")
    return getattr(importlib.import_module(module), name)


def describe_model(model: nn.Module) -> dict[str, Any]:
    """What `make_model` needs to build the model again."""
    return {
        "class": describe(type(model)),
        "arguments": getattr(model, "arguments", None),
    }


def make_model(description: dict[str, Any]) -> nn.Module:
    """A model from its class and constructor arguments."""
    try:
        made = find(description["class"])(**description["arguments"])
    except (ImportError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"cannot build the model {description} ({error!r}); give load_run the model") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"{description['class']} is not a model")
    return made
