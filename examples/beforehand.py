"""What the examples need first: the clone's folder on the path, and a torchvision that can be imported.

Two of torchvision's operators are declared where they are missing, beside a torch that it was not built for.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
try:
    import torchvision  # noqa: F401
except RuntimeError:  # "operator torchvision::nms does not exist"
    library = torch.library.Library("torchvision", "FRAGMENT")  # kept: they live as long as it does
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
except ImportError:
    pass  # where there is none, none is used
