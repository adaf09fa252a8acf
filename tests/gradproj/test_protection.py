"""What training gives while layers are protected, against G (I - M Mᵀ) of gradients without protection."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from gradproj import GradientProjectionMemory
from gradproj.layers import find_layers
from tests.gradproj.projected import (
    DOUBLE,
    PRECISIONS,
    TOLERANCE,
    normal,
    orthonormal,
    project_by_reference,
    projected_gradients,
)

LAYERS = {
    "linear, batch < outputs": (lambda b: nn.Linear(7, 9, bias=b), (4, 7)),
    "linear, batch > outputs": (lambda b: nn.Linear(7, 2, bias=b), (30, 7)),
    "linear, one sample": (lambda b: nn.Linear(7, 9, bias=b), (1, 7)),
    "linear, wide": (lambda b: nn.Linear(150, 20, bias=b), (4, 150)),
    "linear, wide, batch > outputs": (lambda b: nn.Linear(150, 3, bias=b), (30, 150)),
    "linear, three axes, few rows": (lambda b: nn.Linear(7, 12, bias=b), (2, 3, 7)),
    "linear, three axes, many rows": (lambda b: nn.Linear(7, 3, bias=b), (5, 4, 7)),
    "conv": (lambda b: nn.Conv2d(3, 4, 2, bias=b), (2, 3, 5, 4)),
    "conv, stride, padding, dilation": (
        lambda b: nn.Conv2d(2, 4, 3, stride=2, padding=2, dilation=2, bias=b),
        (3, 2, 6, 5),
    ),
    "conv, groups": (lambda b: nn.Conv2d(4, 6, 2, groups=2, bias=b), (2, 4, 5, 4)),
    "conv, depthwise": (lambda b: nn.Conv2d(3, 6, 3, groups=3, padding=1, bias=b), (2, 3, 4, 4)),
    "conv, circular": (lambda b: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", bias=b), (2, 2, 5, 4)),
    "conv, one axis": (lambda b: nn.Conv1d(4, 6, 3, groups=2, bias=b), (2, 4, 8)),
    "conv, three axes": (lambda b: nn.Conv3d(2, 3, 2, bias=b), (2, 2, 3, 3, 3)),
}


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of a loss that is curved in its output, by parameter name; x's own under "input"."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    model(x).sin().square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return {name: None if grad is None else grad.clone() for name, grad in found.items()} | {"input": x.grad}


@PRECISIONS
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0], ids="k={}d".format)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("name", LAYERS)
def test_backward_gives_projected_gradients(name, bias, share, dtype):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    model = nn.Sequential(make(bias)).to(dtype)
    layers, x = find_layers(model), normal(*shape, dtype=dtype)
    layer = layers["0"]
    k = round(share * layer.input_size)
    bases = {key: orthonormal(layer.input_size, k, seed=i) for i, key in enumerate(layer.keys)}

    plain = gradients(model, x)
    with torch.no_grad():
        plain_output = model(x)
    with projected_gradients(layers, bases):
        assert_close(model(x), plain_output)
        projected = gradients(model, x)
    after = gradients(model, x)

    parts = project_by_reference(plain["0.weight"], plain.get("0.bias"), list(bases.values()))
    expected = dict(zip(["0.weight", "0.bias"], parts, strict=True))
    tolerance = TOLERANCE[dtype] * max(1.0, plain["0.weight"].abs().max().item())
    assert_close(projected["input"], plain["input"], atol=tolerance, rtol=0)
    for parameter in plain.keys() - {"input"}:
        found = projected[parameter]
        if found is None:  # a full layer has no gradient at all
            assert k == layer.input_size
            found = torch.zeros_like(plain[parameter])
        assert_close(found, expected[parameter], atol=tolerance, rtol=0)
        assert_close(after[parameter], plain[parameter], atol=0, rtol=0)  # the context leaves nothing behind


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck_of_the_input(name, bias):
    make, shape = LAYERS[name]
    if len(shape) == 2 and shape[1] > 10:
        shape = (2, shape[1])  # as many evaluations as entries
    torch.manual_seed(0)
    model = nn.Sequential(make(bias)).double()
    layers = find_layers(model)
    bases = {key: orthonormal(layers["0"].input_size, 2) for key in layers["0"].keys}
    with projected_gradients(layers, bases):
        assert torch.autograd.gradcheck(model, normal(*shape).requires_grad_())


class Network(nn.Module):
    """Convolution with groups and bias, then Linear layers with and without bias, one of them unprotected."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 2, groups=2)
        self.fc1 = nn.Linear(24, 12, bias=False)
        self.fc2 = nn.Linear(12, 5)
        self.head = nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).flatten(1)
        return self.head(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network()


@pytest.fixture
def memory(network) -> GradientProjectionMemory:
    """Half full, every basis different."""
    memory = GradientProjectionMemory(network, exclude=["head"])
    memory.bases = {key: orthonormal(d, d // 2, seed=i) for i, (key, d) in enumerate(memory.input_sizes.items())}
    return memory


def moved_inside(before: Network, after: Network, memory: GradientProjectionMemory) -> dict[str, float]:
    """By key, how far the weights moved inside the span of the basis: ‖[ΔW, Δb] M‖."""
    distance = {}
    for name, layer in memory.layers.items():
        old, new = before.get_submodule(name), after.get_submodule(name)
        rows = (new.weight - old.weight).flatten(1)
        if old.bias is not None:
            rows = torch.cat([rows, (new.bias - old.bias)[:, None]], dim=1)
        for key, part in zip(layer.keys, rows.chunk(layer.groups), strict=True):
            distance[key] = (part @ memory.bases[key]).norm().item()
    return distance


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5, images: int = 4) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            network(normal(images, 4, 3, 3, seed=step)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("images", [2, 40], ids="batch={}".format)
@pytest.mark.parametrize("momentum", [0.0, 0.9], ids="momentum={}".format)
def test_sgd_moves_weights_orthogonally_to_the_bases(network, memory, momentum, images):
    before = copy.deepcopy(network)
    with projected_gradients(memory.layers, memory.bases):
        train(network, torch.optim.SGD(network.parameters(), lr=0.01, momentum=momentum), images=images)
    assert max(moved_inside(before, network, memory).values()) < 1e-14
    for name, p in before.named_parameters():
        assert not torch.equal(p, network.get_parameter(name)), name  # and yet everything learned


def test_gradients_accumulate(network, memory):
    batches = [normal(3, 4, 3, 3, seed=seed) for seed in range(3)]

    def accumulated() -> list[Tensor]:
        network.zero_grad()
        for batch in batches:
            network(batch).square().sum().backward()
        return [p.grad.clone() for p in network.parameters()]

    plain = dict(zip((name for name, _ in network.named_parameters()), accumulated(), strict=True))
    with projected_gradients(memory.layers, memory.bases):
        projected = dict(zip(plain, accumulated(), strict=True))
    for name, layer in memory.layers.items():
        bases = [memory.bases[key] for key in layer.keys]
        expected = project_by_reference(plain[f"{name}.weight"], plain.get(f"{name}.bias"), bases)
        assert_close(projected[f"{name}.weight"], expected[0], atol=1e-11, rtol=0)
    assert_close(projected["head.weight"], plain["head.weight"])  # unprotected


def test_a_layer_that_runs_twice_is_projected_both_times():
    linear = nn.Linear(5, 5, bias=False, dtype=DOUBLE)
    model = nn.Sequential(linear, nn.Tanh(), linear)
    layers = {name: layer for name, layer in find_layers(model).items() if name == "0"}
    basis = orthonormal(5, 2)
    with projected_gradients(layers, {"0": basis}):
        model(normal(3, 5)).square().sum().backward()
    assert_close(linear.weight.grad @ basis, torch.zeros(5, 2, dtype=DOUBLE), atol=1e-13, rtol=0)


def test_no_gradient_reaches_a_full_layer_but_all_that_passes_through(network, memory):
    memory.bases["fc1"] = orthonormal(24, 24)
    x = normal(4, 4, 3, 3)
    plain = copy.deepcopy(network)
    plain(x).square().sum().backward()
    with projected_gradients(memory.layers, memory.bases):
        network(x).square().sum().backward()
    assert network.fc1.weight.grad is None
    assert_close(network.head.weight.grad, plain.head.weight.grad)
    expected = project_by_reference(plain.conv.weight.grad, plain.conv.bias.grad, [*memory.bases.values()][:2])
    assert_close(network.conv.weight.grad, expected[0], atol=1e-12, rtol=0)


def is_plain(network: Network) -> bool:
    """Whether the gradients are those of the network without any protection."""
    x, fresh = normal(4, 4, 3, 3), Network()
    fresh.load_state_dict(network.state_dict())
    for model in (network, fresh):
        model.zero_grad()
        model(x).square().sum().backward()
    return all(torch.equal(p.grad, network.get_parameter(name).grad) for name, p in fresh.named_parameters())


def test_protection_ends_with_the_context_also_by_an_exception(network, memory):
    with projected_gradients(memory.layers, memory.bases):
        assert not is_plain(network)
    assert is_plain(network)
    with pytest.raises(KeyboardInterrupt), projected_gradients(memory.layers, memory.bases):
        raise KeyboardInterrupt
    assert is_plain(network)


def test_protections_do_not_nest(network, memory):
    with projected_gradients({"fc2": memory.layers["fc2"]}, memory.bases):
        with pytest.raises(RuntimeError, match=r"layer fc2 is replaced already: two protections cannot nest"):
            with projected_gradients(memory.layers, memory.bases):
                pass
    assert is_plain(network)


def test_a_copy_made_within_the_context_is_usable(network, memory):
    with projected_gradients(memory.layers, memory.bases):
        state = copy.deepcopy(network.state_dict())
    fresh = Network()
    fresh.load_state_dict(state)
    assert_close(fresh(normal(2, 4, 3, 3)), network(normal(2, 4, 3, 3)))


@pytest.mark.parametrize("images", [2, 40], ids="batch={}".format)
def test_autocast(network, memory, images):
    network.float()
    x = normal(images, 4, 3, 3).float()

    def found() -> dict[str, Tensor]:
        network.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = network(x).square().mean()
        loss.backward()
        return {name: p.grad.clone() for name, p in network.named_parameters()}

    plain = found()
    with projected_gradients(memory.layers, memory.bases):
        projected = found()
    for name, layer in memory.layers.items():
        assert projected[f"{name}.weight"].dtype == torch.float32
        bases = [memory.bases[key] for key in layer.keys]
        weight, bias = projected[f"{name}.weight"], projected.get(f"{name}.bias")
        expected, _ = project_by_reference(plain[f"{name}.weight"], plain.get(f"{name}.bias"), bases)
        assert_close(
            weight, expected, atol=2**-8 * plain[f"{name}.weight"].abs().max().item(), rtol=0
        )  # bfloat16's eps
        again, _ = project_by_reference(weight, bias, bases)
        assert_close(weight, again, atol=1e-6, rtol=0)  # orthogonal to float32's all the same


OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "SGD with weight decay": lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_protect_update_holds_for_any_optimizer(network, memory, name):
    before, unprotected = copy.deepcopy(network), copy.deepcopy(network)
    optimizer = OPTIMIZERS[name](network.parameters())
    with memory.protect(), memory.protect_update(optimizer):
        train(network, optimizer)
    assert max(moved_inside(before, network, memory).values()) < 1e-13
    assert not torch.equal(network.fc1.weight, before.fc1.weight)

    # Projected gradients alone are not enough for these, or else this test would show nothing.
    optimizer = OPTIMIZERS[name](unprotected.parameters())
    with projected_gradients(find_layers(unprotected, ["head"]), memory.bases):
        train(unprotected, optimizer)
    assert max(moved_inside(before, unprotected, memory).values()) > 1e-6

    # Outside the context the optimiser is free again.
    network.load_state_dict(before.state_dict())
    train(network, optimizer := OPTIMIZERS[name](network.parameters()))
    assert max(moved_inside(before, network, memory).values()) > 1e-6


@torch.no_grad()
def test_protect_update_moves_weights_by_the_projected_step(network, memory):
    before = copy.deepcopy(network)
    plain = copy.deepcopy(network)
    train(plain, torch.optim.Adam(plain.parameters(), lr=0.01), steps=1)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    with memory.protect_update(optimizer):
        train(network, optimizer, steps=1)
    for name, layer in memory.layers.items():
        old, free, held = (model.get_submodule(name) for model in (before, plain, network))
        bias = None if old.bias is None else free.bias - old.bias
        step, _ = project_by_reference(free.weight - old.weight, bias, [memory.bases[key] for key in layer.keys])
        assert_close(held.weight - old.weight, step, atol=1e-14, rtol=0)
    assert_close(network.head.weight, plain.head.weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("batch", [16, 4096], ids=["input side", "gradient side"])
def test_tf32_does_not_leak_into_the_basis(monkeypatch, batch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    layer = nn.Linear(1024, 512, bias=False).cuda()
    basis = orthonormal(1024, 360).cuda()
    with projected_gradients(layers := find_layers(nn.Sequential(layer)), dict.fromkeys(layers, basis)):
        layer(torch.randn(batch, 1024, device="cuda")).square().sum().backward()
    assert (layer.weight.grad.double() @ basis).norm() < 1e-5 * layer.weight.grad.norm()
