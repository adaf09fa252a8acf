"""Gradient Projection Memory: continual learning without forgetting, on any PyTorch model."""

from gradproj.errors import DivergenceError, InputError
from gradproj.memory import GradientProjectionMemory
from gradproj.subspace import extend_basis

__version__ = "0.2.0"
__all__ = ["DivergenceError", "GradientProjectionMemory", "InputError", "extend_basis"]
