"""What can go wrong; a command line prints each as one line and exits with its code."""


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what was wrong and what would be right."""

    exit_code = 2


class DivergenceError(ArithmeticError):
    """Training left the finite numbers. The message names the task, epoch, step and layer."""

    exit_code = 3
