"""The methods by name. A new one is a file with a subclass of Method, and its entry here."""

from __future__ import annotations

from torch import nn

from gpm.errors import InputError
from gpm.methods.a_gem import AGEM
from gpm.methods.base import Method
from gpm.methods.er import ER
from gpm.methods.ewc import EWC
from gpm.methods.gpm import GPM
from gpm.methods.hat import HAT
from gpm.methods.multitask import Multitask
from gpm.methods.naive import Naive
from gpm.methods.ogd import OGD
from gpm.methods.owm import OWM
from gpm.methods.single import Single
from gpm.options import Options

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
