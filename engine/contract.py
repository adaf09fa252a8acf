"""Whether a method keeps the contract of `engine.method.Method`: what its class declares, and what its moments give."""

from __future__ import annotations

import dataclasses
import inspect
import keyword
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine import state
from engine.options import Options, default_of, told
from gradproj import GradientProjectionMemory
from gradproj.errors import InputError

SWITCHES = "joint mixes_tasks knows_n_tasks plain_step graph_step learns_when_full task_identity one_network".split()
STEP = ("loss", "backward", "after_step")  # the moments of a step


def broken(method: Any, text: str) -> InputError:
    """The error of a method, or its class, that breaks the contract."""
    name = method.__qualname__ if isinstance(method, type) else method.name
    return InputError(f"method {name}: {text}")


def check_class(method: Any) -> None:
    """Raise InputError, in one line, where a method's class declares what the engine cannot use."""
    if not isinstance(getattr(method, "name", None), str) or not method.name.strip():
        raise broken(method, "it has no name; give its class one, such as name = 'mine'")
    names = "a tuple of names, such as ('old',)"
    wanted = {
        "title": (isinstance(method.title, str), "text"),
        "place": (
            method.place is None or (type(method.place) is int and method.place >= 0),
            "a number from 0, or None",
        ),
        "heads": (method.heads in ("one", "many", "any"), "'one', 'many' or 'any'"),
        "reads": (_are_names(method.reads), names),
        "state": (_are_names(method.state), names),
        **{switch: (isinstance(getattr(method, switch), bool), "True or False") for switch in SWITCHES},
    }
    for what, (fine, kind) in wanted.items():
        if not fine:
            raise broken(method, f"{what} is {getattr(method, what)!r}; it must be {kind}")
    if not inspect.ismethod(method.refuse):
        raise broken(method, "refuse must be a classmethod")
    _check_flags(method)
    fields = Options.__dataclass_fields__
    some = [name for name, field in fields.items() if told(field)["read_by_some"]]
    if unknown := [name for name in method.reads if name not in some]:
        raise broken(method, f"reads names {', '.join(unknown)}; it may name {', '.join(some)}")
    if not isinstance(method.defaults, Mapping):
        raise broken(method, f"defaults is {method.defaults!r}; it must be a dict of values by name")


def check_defaults(method: Any, options: type[Options]) -> None:
    """Raise InputError where a method has a default of what is no hyperparameter of a script.

    Args:
        method: its class.
        options: the script's hyperparameters.
    """
    known = options.__dataclass_fields__.keys() | Options.__dataclass_fields__.keys() | method.flags.keys()
    for name, value in method.defaults.items():
        parts = [name]
        if name not in known and isinstance(value, Mapping):  # those for a benchmark, perhaps another one
            parts = list(value) if name == options.benchmark else []
        for part in parts:
            if part not in known:
                raise broken(
                    method,
                    f"defaults has {part}, which is no hyperparameter here, nor a flag of its own; what the script of "
                    "one benchmark alone has stands under that benchmark's name",
                )


def _are_names(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(part, str) for part in value)


def _check_flags(method: Any) -> None:
    if not isinstance(method.flags, Mapping) or not all(
        isinstance(f, dataclasses.Field) for f in method.flags.values()
    ):
        raise broken(method, "flags must be a dict of engine.options.flag(…) by name")
    for name, field in method.flags.items():
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise broken(method, f"the flag {name!r} must be a name as Python has them")
        if name in Options.__dataclass_fields__ or hasattr(Options, name) or name in ("config", "help"):
            raise broken(method, f"the flag {name} is one of every run; `defaults` gives it another default")
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise broken(method, f"the flag {name} has no default; give flag(…) one")
        if field.default is True:
            raise broken(method, f"the flag {name} could not be turned off; name it after what it turns on")
        if field.default == ():
            raise broken(method, f"the flag {name} has an empty default, which says nothing of its values' kind")


def check_flags_agree(methods: Mapping[str, Any]) -> None:
    """Raise InputError where methods have a flag of one name whose values are of different kinds."""
    known: dict[str, tuple[str, str]] = {}
    for method in methods.values():
        for name, field in method.flags.items():
            kind = type(default_of(field)).__name__
            other, there = known.setdefault(name, (method.name, kind))
            if kind != there:
                raise broken(method, f"its --{name} is of kind {kind}, {other}'s of kind {there}; call it otherwise")


def check_script(options: type[Options]) -> None:
    """Raise InputError where a script's class of hyperparameters holds values that a dataclass would pass over."""
    if options is Options:
        return
    if "__dataclass_fields__" not in vars(options):
        raise InputError(f"{options.__qualname__} is no dataclass; write @dataclass(kw_only=True) above it")
    fields = {field.name for field in dataclasses.fields(Options)} - inspect.get_annotations(options).keys()
    for name, value in vars(options).items():
        if name in fields:
            typed = f"{name}: {type(value).__name__} = {value!r}"
            raise InputError(f"{options.__qualname__} has {name} without a type, so it has no effect; write {typed}")


def check_network(model: nn.Module) -> None:
    """Raise InputError where a network has nothing to train, or parameters without a shape."""
    parameters = dict(model.named_parameters())
    if not parameters:
        raise InputError(f"{type(model).__name__} has no parameters, so there is nothing to train")
    if lazy := [name for name, p in parameters.items() if isinstance(p, nn.parameter.UninitializedParameter)]:
        raise InputError(
            f"{type(model).__name__}: {', '.join(lazy)} has no shape yet; run the network on a batch first"
        )


def check_instance(method: Any) -> None:
    """Raise InputError where a method, just made, lacks what it says it must save, or uses a name of the engine's."""
    if missing := [name for name in method.state if not hasattr(method, name)]:
        raise broken(method, f"state names {', '.join(missing)}, which it has not; set it in __init__")
    if not isinstance(method.memory, GradientProjectionMemory | None):
        kind = type(method.memory).__name__
        raise broken(method, f"memory is a {kind}; the name is a GradientProjectionMemory's, so call it otherwise")


def check_modules(method: Any, made: Mapping[str, list[str]]) -> None:
    """Raise InputError where a method's state holds modules that a continued run, which makes it anew, would lack.

    Args:
        method: as it is by now.
        made: `state_modules` of it as `__init__` made it.
    """
    for place, names in state_modules(method).items():
        if made.get(place) != names:
            how = "which has grown since" if place in made else "which __init__ did not make"
            raise broken(
                method,
                f"its state has a module in {place}, {how}, so that a continued run would lack it; keep its "
                "state_dict() instead, or make it in __init__",
            )


def state_modules(method: Any) -> dict[str, list[str]]:
    """The modules in a method's state, by where they stand in it."""
    return state.modules({name: getattr(method, name) for name in method.state})


def declares(method: type, step: str) -> bool:
    """Whether a class says `plain_step` or `graph_step` of its own step: one that changes a moment of the step has no
    plain step, in which no moment is called, and has to say `graph_step` anew."""
    classes = method.__mro__
    if step == "plain_step":
        root = [each for each in classes if all(moment in vars(each) for moment in STEP)][-1]  # Method
        changed = any(getattr(method, moment) is not getattr(root, moment) for moment in STEP)
    else:
        said = next(i for i, each in enumerate(classes) if step in vars(each))
        changed = any(moment in vars(each) for each in classes[:said] for moment in STEP)
    return bool(getattr(method, step)) and not changed


def check_optimizer(method: Any, optimizer: Any) -> None:
    """Raise InputError where what a method trains with is no optimiser that takes steps by gradients alone."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise broken(method, f"optimizer() gives a {type(optimizer).__name__}; it must be a torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise broken(method, "LBFGS asks for the loss several times a step, which the engine does not; use another")


def check_loss(method: Any, loss: Any) -> None:
    """Raise InputError where a loss is no number to differentiate."""
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
        raise broken(method, f"loss() gives {_described(loss)}; it must be one number that depends on the weights")


def check_step(method: Any, optimizer: torch.optim.Optimizer, loss: Any) -> None:
    """Raise InputError where a first backward pass gives no mean loss, or leaves no gradient."""
    if not isinstance(loss, Tensor) or loss.ndim:
        raise broken(method, f"backward() gives {_described(loss)}; it must be the batch's mean loss, a tensor ()")
    if all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
        raise broken(method, "backward() leaves no gradient in what its optimiser moves")


def check_order(method: Any, order: Any, n: int) -> None:
    """Raise InputError where an epoch's order does not name training images."""
    whole = isinstance(order, Tensor) and order.ndim == 1 and len(order) and order.dtype == torch.int64
    if not whole or not 0 <= order.min() <= order.max() < n:
        raise broken(method, f"order() must give places of training images: int64 (n,), each from 0 to {n - 1}")


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a tensor {tuple(value.shape)}" + " without a gradient" * (not value.requires_grad)
