"""The methods by name. A new one is a file with a subclass of Method, and its entry here."""

from __future__ import annotations

from torch import nn

from engine.method import Method
from engine.options import Options
from gradproj.errors import InputError
from methods.a_gem import AGEM
from methods.er import ER
from methods.ewc import EWC
from methods.gpm import GPM
from methods.hat import HAT
from methods.multitask import Multitask
from methods.naive import Naive
from methods.ogd import OGD
from methods.owm import OWM
from methods.single import Single

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (GPM, Naive, Multitask, Single, EWC, AGEM, ER, OWM, OGD, HAT)
}


def make_method(model: nn.Module, options: Options) -> Method:
    """The method that `options.method` names, on a model.

    Raises:
        InputError: there is none of that name, or it does not fit the model.
    """
    if options.method not in METHODS:
        raise InputError(f"method is {options.method!r}; it must be one of: {', '.join(METHODS)}")
    return METHODS[options.method](model, options)
