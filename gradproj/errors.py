"""What can go wrong; a command line prints each as one line and exits with its code."""

import sys
import warnings

OURS = ("gradproj", "contextlib", "torch.")  # beginnings of the names of modules that are not the caller


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what was wrong and what would be right."""

    exit_code = 2


class DivergenceError(ArithmeticError):
    """Training left the finite numbers. The message names the task, epoch, step and layer."""

    exit_code = 3


def one_line(error: BaseException, most: int = 200) -> str:
    """What an error says, in one line of at most so many letters; its kind where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


class FullLayerWarning(UserWarning):
    """Layers have no direction left that is free, so they learn no more."""


def warn_caller(text: str, category: type[UserWarning] = UserWarning) -> None:
    """Warn of something at the line outside this library that led to it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(OURS):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)
