"""What can be wrong with images."""

from gradproj.errors import InputError


class DataError(InputError):
    """A data set is missing, incomplete or damaged. The message names the set, the file and the way out."""
