"""Torchvision, which these libraries import, beside any torch."""

import runpy

from tests import ROOT

BEFOREHAND = runpy.run_path(str(ROOT / "examples" / "beforehand.py"))  # kept, for as long as it is needed
