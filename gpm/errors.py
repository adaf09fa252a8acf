"""The exceptions that a user's input can cause; a command line prints them as one line and exits with code 2."""


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what was wrong and what would be right."""


class DataError(InputError):
    """A data set is missing, incomplete or damaged. The message names the set, the file and the way out."""
