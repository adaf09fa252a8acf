"""Torchvision, which these libraries import, beside any torch."""

import runpy

from tests import ROOT

OPERATORS = runpy.run_path(str(ROOT / "examples" / "torchvision_operators.py"))  # kept, for as long as they are needed
