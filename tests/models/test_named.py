"""Networks of torchvision by name: heads, BatchNorm on batch statistics, and what is refused."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gradproj.errors import InputError
from models.named import BATCH_NORM, Named


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vgg11", "mobilenet_v3_small", "vit_b_16", "googlenet", "densenet121"])
def test_heads_replace_the_last_layer(name):
    torch.manual_seed(0)
    size = 224 if name == "vit_b_16" else 64
    model = Named(name, [2, 3])
    for mode in (True, False):
        model.train(mode)
        assert [model(torch.zeros(2, 3, size, size), t).shape for t in (0, 1)] == [(2, 2), (2, 3)]
    assert not any(isinstance(m, nn.Linear) and m.out_features == 1000 for m in model.modules())
    assert not any(m.track_running_stats for m in model.modules() if isinstance(m, BATCH_NORM))
    assert not [name for name in model.state_dict() if "running" in name]


def test_one_head_for_all():
    model = Named("resnet18", [4]).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images, 0), model(images, 7))
    assert model.arguments == {"name": "resnet18", "n_classes": [4]}


def test_no_such_network(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        InputError, match=r"'resnet17', and timm is not installed; torchvision has resnet18, .* and \d+ others"
    ):
        Named("resnet17", [2])
    with pytest.raises(InputError, match="squeezenet1_0 does not end in a Linear layer, so it cannot be given other"):
        Named("squeezenet1_0", [2])


def test_of_timm(monkeypatch):
    class Tiny(nn.Module):
        num_features = 3

        def __init__(self, num_classes):
            super().__init__()
            assert num_classes == 0
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images):
            return self.norm(images).mean((2, 3))

    def create_model(name, **arguments):
        if name != "tiny":
            raise RuntimeError(f"Unknown model\n({name})")
        return Tiny(**arguments)

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    model = Named("tiny", [2, 5])
    assert model(torch.randn(4, 3, 2, 2), 1).shape == (4, 5)
    assert not model.features.norm.track_running_stats
    with pytest.raises(
        InputError, match=r"neither torchvision nor timm makes a network 'other' \(Unknown model \(other\)"
    ):
        Named("other", [2])
