"""What can go wrong with a run; a command line prints each as one line and exits with its code."""


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what was wrong and what would be right."""

    exit_code = 2


class DataError(InputError):
    """A data set is missing, incomplete or damaged. The message names the set, the file and the way out."""


class DivergenceError(ArithmeticError):
    """Training left the finite numbers. The message names the task, epoch, step and layer."""

    exit_code = 3


class Stopped(BaseException):
    """A signal asked the process to stop. Not an Exception: nothing but the end of the run may catch it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.exit_code = 128 + signal_number
