"""Kinds of layers that can be protected, a file each: what a layer's rows are, and what columns they see."""

from gradproj.layers.base import Layer
from gradproj.layers.find import Selection, find_layers, kept_modules, listed, selected

__all__ = ["Layer", "Selection", "find_layers", "kept_modules", "listed", "selected"]
