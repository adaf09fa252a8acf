"""Networks of torchvision, and of timm where it is installed, by their names: features, and a head for each task."""

from __future__ import annotations

import difflib
import warnings

from torch import Tensor, nn

from engine.torchvision import import_torchvision
from gradproj.errors import InputError, one_line

BATCH_NORM = nn.modules.batchnorm._BatchNorm


class Named(nn.Module):
    """A network for images, its last layer replaced by heads; untrained.

    Its BatchNorm normalises by the statistics of the batch, as the paper's networks do: running statistics would be
    those of the newest task.

    Args:
        name: of a classifier in torchvision.models, else in timm.
        n_classes: classes of each task, one head for each entry; with a single entry all tasks share the head.
    Raises:
        InputError: there is no such network, or it has no last layer that can be replaced.
    """

    def __init__(self, name: str, n_classes: list[int]) -> None:
        super().__init__()
        self.name = name
        self.arguments = dict(name=name, n_classes=n_classes)  # for engine.load_run
        self.features, n_features = features(name)
        self.heads = nn.ModuleList(nn.Linear(n_features, n) for n in n_classes)

    def forward(self, images: Tensor, task: int) -> Tensor:
        """Logits (batch, classes of `task`) of images (batch, 3, height, width)."""
        head = self.heads[task if len(self.heads) > 1 else 0]
        return head(self.features(images))


def features(name: str) -> tuple[nn.Module, int]:
    """A network without its last layer, and the size of what it gives."""
    models = import_torchvision("models")
    if name in models.list_models(module=models):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of how its weights may begin one day
            network = models.get_model(name, weights=None)
        layers = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
        if not layers or network.get_submodule(layers[-1]).out_features != 1000:  # ImageNet's classes
            raise InputError(f"{name} does not end in a Linear layer, so it cannot be given other heads")
        parent, _, last = layers[-1].rpartition(".")
        n_features = network.get_submodule(layers[-1]).in_features
        setattr(network.get_submodule(parent), last, nn.Identity())
        for auxiliary in ("aux1", "aux2", "AuxLogits"):  # of GoogLeNet and Inception, in training alone
            if hasattr(network, auxiliary):
                setattr(network, auxiliary, None)
                network.aux_logits = False
    else:
        network = from_timm(name, models)
        n_features = network.num_features
    for module in network.modules():
        if isinstance(module, BATCH_NORM):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return network, n_features


def from_timm(name: str, models) -> nn.Module:
    """One of timm's networks without its last layer."""
    try:
        import timm
    except ImportError as error:
        known = models.list_models(module=models)
        near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5) or known[:3]
        raise InputError(
            f"torchvision has no network {name!r}, and timm is not installed; torchvision has {', '.join(near)} and "
            f"{len(known) - len(near)} others (torchvision.models.list_models())"
        ) from error
    try:
        return timm.create_model(name, num_classes=0)
    except Exception as error:  # of a dozen kinds
        reason = one_line(error)
        raise InputError(f"neither torchvision nor timm makes a network {name!r} ({reason})") from error
