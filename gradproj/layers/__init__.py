"""Kinds of layers that can be protected, a file each: what a layer's rows are, and what columns they see."""

from gradproj.layers.base import Layer
from gradproj.layers.find import find_layers, kept_modules

__all__ = ["Layer", "find_layers", "kept_modules"]
