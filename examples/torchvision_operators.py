"""Declares two of torchvision's operators where they are missing, beside a torch that it was not built for."""

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:  # "operator torchvision::nms does not exist"
    library = torch.library.Library("torchvision", "FRAGMENT")  # kept: they live as long as it does
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
except ImportError:
    pass  # where there is none, none is used
