"""Gradient Projection Memory: continual learning without forgetting, on any PyTorch model."""

from gpm.errors import DataError, InputError
from gpm.memory import GradientProjectionMemory
from gpm.runfolder import load_run
from gpm.subspace import extend_basis

__all__ = ["DataError", "GradientProjectionMemory", "InputError", "extend_basis", "load_run"]
