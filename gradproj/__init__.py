"""Gradient Projection Memory: continual learning without forgetting, on any PyTorch model."""

from gradproj.errors import InputError
from gradproj.memory import GradientProjectionMemory
from gradproj.subspace import extend_basis

__all__ = ["GradientProjectionMemory", "InputError", "extend_basis"]
