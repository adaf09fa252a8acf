"""How far an old task's layer outputs moved, against the products written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradproj import interference
from gradproj.layers import find_layers
from tests import tiny
from tests.tiny import run


def moved(model, images, change):
    """The interference on `images` of a change to a model's weights."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += change(name, p)
    layers = find_layers(model)
    after = {name: value.clone() for name, value in model.state_dict().items()}
    found = interference.interference(model, layers, before, lambda: model(images))
    for name, value in model.state_dict().items():  # left as it was
        assert torch.equal(value, after[name])
    return found


def test_ratio_and_histogram_are_those_of_the_change_times_the_old_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    images = torch.randn(20, 4, dtype=torch.float64)
    w1, b1, w2, b2 = (p.detach().clone().numpy() for p in model.parameters())
    steps = {name: 0.1 * torch.randn(p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
    found = moved(model, images, lambda name, p: steps[name])
    x = images.numpy()
    hidden = np.maximum(x @ w1.T + b1, 0)  # the old network's, not the new one's
    for name, inputs, w, b in (("0", x, w1, b1), ("2", hidden, w2, b2)):
        change = inputs @ steps[f"{name}.weight"].numpy().T + steps[f"{name}.bias"].numpy()
        usual = np.sqrt(np.mean((inputs @ w.T + b) ** 2))
        assert found[name]["ratio"] == pytest.approx(np.sqrt(np.mean(change**2)) / usual)
        expected = np.histogram((change / usual).clip(-0.5, 0.5), interference.EDGES)[0]
        assert found[name]["counts"] == expected.tolist()
        assert sum(found[name]["counts"]) == change.size


def test_a_convolution_that_did_not_move_does_not_interfere():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 3, groups=2))
    found = moved(model, torch.randn(6, 3, 9, 9), lambda name, p: 0.5 * p if name.startswith("2.") else 0 * p)
    assert found["0"]["ratio"] == 0.0
    assert found["2"]["ratio"] == pytest.approx(0.5, rel=1e-5)  # ΔW = W / 2, so ΔW x = W x / 2


class Keywords(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, dilation=2)


def test_a_function_called_by_keywords():
    torch.manual_seed(0)
    model, images = nn.Sequential(Keywords(2, 3, 3)), torch.randn(6, 2, 9, 9)
    usual = model(images).square().mean().sqrt()
    steps = {name: 0.1 * torch.randn_like(p) for name, p in model.named_parameters()}
    change = F.conv2d(images, steps["0.weight"], steps["0.bias"], dilation=2).square().mean().sqrt()
    ratio = moved(model, images, lambda name, p: steps[name])["0"]["ratio"]
    assert ratio == pytest.approx(float((change / usual).detach()), rel=1e-5)


def test_hooks_on_the_outputs_change_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5))
    model[0].register_forward_hook(lambda module, args, output: 0.1 * output)  # as a gate
    assert moved(model, torch.randn(6, 4), lambda name, p: 0.5 * p)["0"]["ratio"] == pytest.approx(0.5, rel=1e-5)


@pytest.mark.filterwarnings("ignore:not protected")
def test_layers_of_every_kind():
    """ΔW = W / 2 everywhere, so ΔW x = W x / 2 at each layer's own old inputs."""
    torch.manual_seed(0)
    for model, batch in (
        (nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), torch.randn(2, 3, 8)),
        (nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 2)), torch.tensor([[1, 2]])),
        (nn.Sequential(nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular")), torch.randn(2, 3, 9)),
        (nn.Sequential(nn.ConvTranspose1d(3, 4, 3, stride=2)), torch.randn(2, 3, 9)),
    ):
        found = moved(model, batch, lambda name, p: 0.5 * p)
        assert found.keys() == find_layers(model).keys()
        for ratio in found.values():
            assert ratio["ratio"] == pytest.approx(0.5, rel=1e-4)


def run_tiny(folder, **changes):
    return run(tiny.options(folder, **changes), tiny.benchmark(), tiny.Network())


def test_gpm_interferes_less_than_naive(tmp_path):
    ratios = {}
    for name in ("gpm", "naive"):
        found = run_tiny(tmp_path, method=name, n_epochs=8)["interference"]
        ratios[name] = {layer: found[layer]["ratio"] for layer in found}
    assert ratios["gpm"].keys() == ratios["naive"].keys() == {"fc1", "fc2"}
    assert all(ratios["gpm"][layer] < 0.7 * ratios["naive"][layer] for layer in ratios["gpm"]), ratios


def test_a_continued_run_knows_the_first_network(tmp_path):
    first = run_tiny(tmp_path)["interference"]
    assert first["fc1"]["ratio"] > 0
    (tiny.run_folder(tmp_path) / "summary.json").unlink()
    assert run_tiny(tmp_path)["interference"] == first


@pytest.mark.parametrize("method", ["single", "multitask"])
def test_methods_without_one_network_for_all_tasks_have_none(tmp_path, method):
    assert run_tiny(tmp_path, method=method)["interference"] == {}
