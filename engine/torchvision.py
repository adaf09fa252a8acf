"""torchvision, also where its compiled part does not fit the installed torch."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_DECLARED: list[torch.library.Library] = []  # a declaration lasts as long as its Library object


def import_torchvision(part: str) -> ModuleType:
    """`torchvision.datasets` or another part; from then on, import statements find all parts too.

    A torchvision whose compiled part does not fit fails on import, because it describes operators that this would have
    defined. Data sets, transforms and networks need none of them, so after such a failure, and only then, they are
    declared (not implemented).
    """
    try:
        return importlib.import_module(f"torchvision.{part}")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    _declare_missing_operators()
    for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
        del sys.modules[module]  # half imported
    return importlib.import_module(f"torchvision.{part}")


def _declare_missing_operators() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, arguments in (
        ("nms", "Tensor dets, Tensor scores, float iou_threshold"),
        ("qnms", "Tensor dets, Tensor scores, float iou_threshold"),
    ):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}({arguments}) -> Tensor")
    _DECLARED.append(library)
