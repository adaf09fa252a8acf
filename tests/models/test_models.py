"""The paper's networks against their definition, and the layers written for speed against torch's."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gradproj import GradientProjectionMemory
from models import MLP, AlexNet, LeNet, ResNet18
from models.layers import Dropout, LocalResponseNorm
from tests import reference

NETWORKS = {
    "MLP": (MLP, (784,)),
    "AlexNet": (lambda: AlexNet([10] * 10), (3, 32, 32)),
    "LeNet": (lambda: LeNet([5] * 20), (3, 32, 32)),
    "ResNet18": (lambda: ResNet18([10] * 5), (3, 32, 32)),
}
PARAMETERS = {"MLP": 89_400, "AlexNet": 6_713_216, "LeNet": 3_036_500, "ResNet18": 1_125_140}


def stage(name: str, n_in: int, n_out: int) -> dict[str, tuple[int, int]]:
    """The convolutions of two basic blocks, with a shortcut where the shape changes."""
    shortcut = {f"{name}.0.shortcut.0": (n_in, n_out)} if n_in != n_out else {}
    return {
        f"{name}.0.conv1": (9 * n_in, n_out),
        f"{name}.0.conv2": (9 * n_out, n_out),
        **shortcut,
        f"{name}.1.conv1": (9 * n_out, n_out),
        f"{name}.1.conv2": (9 * n_out, n_out),
    }


# Of each protected layer, d inputs that one output unit sees, and o output units.
PROTECTED = {
    "MLP": {"fc1": (784, 100), "fc2": (100, 100), "fc3": (100, 10)},
    "AlexNet": {
        "conv1": (3 * 4 * 4, 64),
        "conv2": (64 * 3 * 3, 128),
        "conv3": (128 * 2 * 2, 256),
        "fc1": (1024, 2048),
        "fc2": (2048, 2048),
    },
    "LeNet": {"conv1": (3 * 5 * 5, 20), "conv2": (20 * 5 * 5, 50), "fc1": (3200, 800), "fc2": (800, 500)},
    "ResNet18": {"conv1": (27, 20)}
    | stage("layer1", 20, 20)
    | stage("layer2", 20, 40)
    | stage("layer3", 40, 80)
    | stage("layer4", 80, 160),
}
# Output of each named module on one 32x32 image, without the batch.
SHAPES = {
    "AlexNet": {"conv1": (64, 29, 29), "conv2": (128, 12, 12), "conv3": (256, 5, 5), "fc1": (2048,), "fc2": (2048,)},
    "LeNet": {"conv1": (20, 32, 32), "conv2": (50, 16, 16), "fc1": (800,), "fc2": (500,)},
    "ResNet18": {
        "conv1": (20, 32, 32),
        "layer1": (20, 32, 32),
        "layer2": (40, 16, 16),
        "layer3": (80, 8, 8),
        "layer4": (160, 4, 4),
    },
}


@pytest.fixture(params=NETWORKS)
def name(request) -> str:
    return request.param


@pytest.fixture
def network(name) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name][0]()


@pytest.fixture
def images(name) -> torch.Tensor:
    return torch.randn(3, *NETWORKS[name][1], generator=torch.Generator().manual_seed(0))


def test_parameter_count(name, network):
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]


def test_no_layer_has_a_bias(network):
    layers = [m for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert all(layer.bias is None for layer in layers)


def test_protected_layers_and_their_sizes(name, network):
    memory = GradientProjectionMemory(network, ["heads"] if hasattr(network, "heads") else [])
    sizes = {key: (layer.input_size, len(layer.module.weight)) for key, layer in memory.layers.items()}
    assert sizes == PROTECTED[name]
    assert memory.input_sizes == {key: d for key, (d, _) in PROTECTED[name].items()}
    if name == "ResNet18":
        assert len(sizes) == 20


def test_batch_norm_keeps_no_statistics(network):
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert not any(m.track_running_stats or m.running_mean is not None for m in norms)
    assert all(m.affine for m in norms)


@pytest.mark.parametrize("name", SHAPES, indirect=True)
def test_shapes_on_the_way(name, network, images):
    seen = {}
    for key in SHAPES[name]:
        network.get_submodule(key).register_forward_hook(lambda m, i, out, key=key: seen.update({key: out.shape[1:]}))
    network(images, 0)
    assert seen == SHAPES[name]


@torch.no_grad()
def test_logits_of_the_asked_task_only(name, network, images):
    network.eval()
    n_heads = len(network.heads) if hasattr(network, "heads") else 10
    logits = [network(images, t) for t in range(n_heads)]
    assert {out.shape for out in logits} == {(3, 5 if name == "LeNet" else 10)}
    if name == "MLP":
        assert all(torch.equal(out, logits[0]) for out in logits)  # one head for all
        return
    with torch.no_grad():
        network.heads[1].weight.zero_()
    assert_close(network(images, 1), torch.zeros_like(logits[1]))
    assert torch.equal(network(images, 0), logits[0])
    assert torch.equal(network(images, 2), logits[2])


def test_heads_may_differ_in_classes():
    model = LeNet([5, 3])
    assert [model(torch.zeros(1, 3, 32, 32), t).shape for t in range(2)] == [(1, 5), (1, 3)]


def test_initial_weights_follow_from_the_seed(name, network):
    torch.manual_seed(0)
    again = NETWORKS[name][0]()
    assert_close(again.state_dict(), network.state_dict(), atol=0, rtol=0)


def test_lenet_weights_are_kaiming_uniform():
    torch.manual_seed(0)
    for key, weight in LeNet([5] * 2).named_parameters():
        bound = (6 / weight[0].numel()) ** 0.5  # gain √2 of ReLU times √(3 / fan_in)
        assert weight.abs().max() <= bound, key
        assert weight.abs().max() > 0.97 * bound, key
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), key


@pytest.mark.parametrize("name", ["AlexNet", "MLP", "ResNet18"], indirect=True)
def test_other_weights_are_torchs_default(name, network):
    for key, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            bound = module.weight[0].numel() ** -0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound, key


class TestDropout:
    @pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
    def test_fraction_and_scale(self, p):
        torch.manual_seed(0)
        n = 400_000
        out = Dropout(p)(torch.ones(n))
        dropped = (out == 0).double().mean().item()
        assert dropped == pytest.approx(p, abs=5 * (p * (1 - p) / n) ** 0.5)  # five standard deviations
        kept = out[out != 0]
        assert_close(kept, torch.full_like(kept, 1 / (1 - p)), rtol=1e-4, atol=0)
        assert len(kept.unique()) == 1

    def test_entries_are_dropped_independently(self):
        torch.manual_seed(0)
        kept = (Dropout(0.5)(torch.ones(8, 50_000)) != 0).double()
        correlation = torch.corrcoef(kept) - torch.eye(8)
        assert correlation.abs().max() < 5 / 50_000**0.5
        neighbours = torch.corrcoef(torch.stack([kept.flatten()[:-1], kept.flatten()[1:]]))[0, 1]
        assert neighbours.abs() < 5 / 400_000**0.5

    def test_identity_in_eval_mode(self):
        x = torch.randn(5, 3)
        assert torch.equal(Dropout(0.5).eval()(x), x)

    def test_extremes(self):
        x = torch.randn(5, 3)
        assert torch.equal(Dropout(0.0)(x), x)
        assert torch.equal(Dropout(1.0)(x), torch.zeros(5, 3))

    @pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 5, 7)], ids=str)
    def test_any_number_of_entries(self, shape):
        out = Dropout(0.5)(torch.ones(shape))
        assert out.shape == shape
        assert set(out.flatten().tolist()) <= {0.0, 2.0}

    def test_memory_layout_is_kept(self):
        x = torch.ones(4, 8, 6, 6).to(memory_format=torch.channels_last)
        torch.manual_seed(0)
        out = Dropout(0.5)(x)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert 0.4 < (out == 0).double().mean() < 0.6

    def test_views(self):
        torch.manual_seed(0)
        sliced = Dropout(0.5)(torch.ones(40, 60)[:, ::3])
        expanded = Dropout(0.5)(torch.ones(40, 1).expand(40, 20))
        for out in (sliced, expanded):
            assert 0.4 < (out == 0).double().mean() < 0.6
            assert not torch.equal(out[:, 0], out[:, 1])
            assert not torch.equal(out[0], out[1])

    def test_follows_from_the_seed(self):
        def masks() -> list[torch.Tensor]:
            torch.manual_seed(3)
            return [Dropout(0.5)(torch.ones(100)) for _ in range(2)]

        first, second = masks()
        assert not torch.equal(first, second)
        assert_close([first, second], masks(), atol=0, rtol=0)

    def test_gradient_is_the_mask(self):
        torch.manual_seed(0)
        x = torch.ones(1000, requires_grad=True)
        out = Dropout(0.2)(x)
        out.sum().backward()
        assert torch.equal(x.grad, out.detach())

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_other_precisions(self, dtype):
        out = Dropout(0.5)(torch.ones(100, dtype=dtype))
        assert out.dtype == dtype
        assert set(out.tolist()) == {0.0, 2.0}


class TestLocalResponseNorm:
    @pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9], ids="size={}".format)
    @pytest.mark.parametrize("n_channels", [1, 3, 20], ids="channels={}".format)
    def test_is_torchs(self, n_channels, size):
        x = 10 * torch.randn(2, n_channels, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        fast = LocalResponseNorm(n_channels, size, alpha=0.3, beta=0.75, k=2).double()
        expected = nn.LocalResponseNorm(size, alpha=0.3, beta=0.75, k=2)(x)
        # Its constants are single-precision numbers.
        assert_close(fast(x), expected, rtol=1e-6, atol=0)
        assert_close(expected.numpy(), reference.local_response_norm(x, size, 0.3, 0.75, 2))

    def test_gradient_is_torchs(self):
        x = torch.randn(2, 6, 4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
        fast = LocalResponseNorm(6, 4, alpha=0.3, beta=0.75, k=1)
        slow = nn.LocalResponseNorm(4, alpha=0.3, beta=0.75, k=1)
        gradients = [torch.autograd.grad(norm(x).sin().sum(), x)[0] for norm in (fast, slow)]
        assert_close(*gradients)

    def test_has_nothing_to_learn_or_save(self):
        norm = LocalResponseNorm(6, 4, alpha=0.3, beta=0.75, k=1)
        assert not list(norm.parameters())
        assert not norm.state_dict()


def test_resnet18_for_miniimagenet():
    """Stride 2 in the first convolution, 1440 features; with twenty heads of five classes 1,237,140 parameters."""
    model = ResNet18([5] * 20, side=84, stride=2)
    assert sum(p.numel() for p in model.parameters()) == 1_237_140
    assert model.conv1(torch.zeros(2, 3, 84, 84)).shape == (2, 20, 42, 42)
    assert model.heads[0].in_features == 1440
    assert model(torch.rand(2, 3, 84, 84), 19).shape == (2, 5)
    assert ResNet18(**model.arguments).heads[19].weight.shape == (5, 1440)
