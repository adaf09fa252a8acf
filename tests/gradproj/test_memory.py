"""GradientProjectionMemory: what it remembers, saves and protects."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from gradproj import GradientProjectionMemory
from gradproj.errors import DivergenceError, InputError
from gradproj.files import save_tensors
from models import MLP, AlexNet, LeNet, ResNet18
from tests import reference

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)).to(dtype)


class TwoHeads(nn.Module):
    """A convolution, BatchNorm, a Linear, LayerNorm, and a head for each of three tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2, bias=False)
        self.bn = nn.BatchNorm2d(3, track_running_stats=False)
        self.fc = nn.Linear(27, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(3))
        self.double()

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        x = F.relu(self.bn(self.conv(x))).flatten(1)
        return self.heads[task](self.norm(F.relu(self.fc(x))))


@pytest.fixture
def network() -> TwoHeads:
    torch.manual_seed(0)
    return TwoHeads()


@pytest.fixture
def memory(network) -> GradientProjectionMemory:
    """After one task."""
    memory = GradientProjectionMemory(network, exclude=["heads"])
    memory.update(network, [normal(5, 2, 4, 4)], 0.9)
    return memory


class TestUpdate:
    def test_bases_are_those_of_the_layers_inputs(self, network):
        memory = GradientProjectionMemory(network, exclude=["heads"])
        expected = {"conv": torch.empty(8, 0), "fc": torch.empty(27, 0)}
        for task, epsilon in enumerate([{"conv": 0.8, "fc": 0.95}, {"conv": 0.9, "fc": 0.97}]):
            images = normal(6, 2, 4, 4, seed=task)
            memory.update(lambda x, t=task: network(x, t), [images], epsilon)
            network.eval()
            with torch.no_grad():
                hidden = F.relu(network.bn(network.conv(images))).flatten(1)
            inputs = {"conv": reference.conv_patches(images, (2, 2))[0], "fc": hidden.T}
            for name, columns in inputs.items():
                expected[name] = reference.extend_basis(expected[name], columns, epsilon[name])
                assert reference.span_distance(memory.bases[name], expected[name]) < 1e-10
        assert memory.columns == {name: basis.shape[1] for name, basis in expected.items()}
        assert memory.input_sizes == {"conv": 8, "fc": 27}

    def test_first_task_by_the_released_rule_later_ones_as_published(self, network):
        released = GradientProjectionMemory(network, ["heads"], rank_rule="released")
        paper = GradientProjectionMemory(network, ["heads"])
        for memory in (released, paper):
            memory.update(network, [normal(6, 2, 4, 4)], 0.9)
        assert released.columns == {name: k - 1 for name, k in paper.columns.items()}
        released.update(network, [normal(6, 2, 4, 4)], 0.9)  # Eq. 9 on the same images takes what was left out
        assert released.columns == paper.columns

    def test_one_threshold_for_all_layers(self, network):
        one, by_name = (GradientProjectionMemory(network, ["heads"]) for _ in range(2))
        one.update(network, [normal(6, 2, 4, 4)], 0.9)
        by_name.update(network, [normal(6, 2, 4, 4)], {"conv": 0.9, "fc": 0.9})
        assert_close(one.bases, by_name.bases, atol=0, rtol=0)

    def test_inputs_are_those_of_eval_mode_and_modes_stay_as_they_were(self):
        drop = nn.Dropout(0.5)
        model = nn.Sequential(drop, nn.Linear(20, 2, bias=False, dtype=DOUBLE))
        memory = GradientProjectionMemory(model)
        rows = normal(3, 20)
        memory.update(model, [rows], 1.0)
        assert_close(memory.bases["1"] @ (memory.bases["1"].T @ rows.T), rows.T)
        assert model.training
        assert drop.training

    def test_draws_no_randomness(self, network, memory):
        before = torch.get_rng_state()
        memory.update(network, [normal(5, 2, 4, 4, seed=1)], 0.9)
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_failed_update_changes_nothing(self, network, memory):
        before = copy.deepcopy(memory.state_dict())
        with pytest.raises(ValueError, match="threshold is 1.5"):
            memory.update(network, [normal(5, 2, 4, 4, seed=1)], {"conv": 0.99, "fc": 1.5})
        with pytest.raises(DivergenceError, match="inputs of layer conv are infinite or NaN"):
            memory.update(network, [torch.full((5, 2, 4, 4), torch.nan, dtype=DOUBLE)], 0.99)
        assert_close(memory.state_dict()["bases"], before["bases"], atol=0, rtol=0)
        assert memory.n_updates == before["n_updates"]
        assert network.training

    def test_full_layers(self, network, memory):
        assert memory.full_layers == []
        memory.update(network, [normal(50, 2, 4, 4)], {"conv": 1.0, "fc": 0.5})
        assert memory.full_layers == ["conv"]

    def test_nothing_to_protect(self):
        with pytest.raises(InputError, match="Sequential has no trained layer that can be protected"):
            GradientProjectionMemory(nn.Sequential(nn.ReLU()))


class TestFiles:
    @pytest.fixture
    def path(self, tmp_path, memory):
        memory.save(tmp_path / "memory.pt")
        return tmp_path / "memory.pt"

    def test_round_trip(self, path, network, memory):
        loaded = GradientProjectionMemory(network, exclude=["heads"])
        loaded.load(path)
        found, expected = loaded.state_dict(), memory.state_dict()
        assert found.pop("hosts") == expected.pop("hosts") == {"conv": ["conv"], "fc": ["fc"]}
        assert_close(found, expected, atol=0, rtol=0)
        for each in (memory, loaded):  # and both go on alike
            each.update(network, [normal(5, 2, 4, 4, seed=1)], 0.95)
        found, expected = loaded.state_dict(), memory.state_dict()
        assert found.pop("hosts") == expected.pop("hosts") == {"conv": ["conv"], "fc": ["fc"]}
        assert_close(found, expected, atol=0, rtol=0)

    @pytest.mark.parametrize(
        ("model", "wrong"),
        [
            (nn.ModuleDict({"conv": nn.Conv2d(2, 3, 2, bias=False), "fc": nn.Linear(28, 6, bias=False)}), "fc"),
            (nn.ModuleDict({"conv": nn.Conv2d(2, 3, 2), "fc": nn.Linear(27, 6, bias=False)}), "conv"),
            (nn.ModuleDict({"conv": nn.Conv2d(2, 3, 2, bias=False), "fc3": nn.Linear(27, 6, bias=False)}), "fc, fc3"),
        ],
        ids=["size", "bias", "name"],
    )
    def test_another_model(self, path, model, wrong):
        other = GradientProjectionMemory(model)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(InputError, match=f"memory is of another model: layers {wrong} differ in name or size"):
            other.load(path)
        assert_close(other.state_dict(), before, atol=0, rtol=0)

    @pytest.mark.parametrize("keep", [0.0, 0.01, 0.3, 0.9, 0.999], ids="first {} of it".format)
    def test_cut_off(self, path, memory, keep):
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])
        with pytest.raises(InputError, match="memory.pt is damaged"):
            memory.load(path)

    @pytest.mark.parametrize("place", [0.0, 0.01, 0.1, 0.4, 0.7, 0.99], ids="at {} of it".format)
    def test_one_bit_flipped(self, path, memory, place):
        content = bytearray(path.read_bytes())
        content[int(place * len(content))] ^= 4
        path.write_bytes(content)
        with pytest.raises(InputError, match="memory.pt is damaged"):
            memory.load(path)

    def test_missing(self, tmp_path, memory):
        with pytest.raises(InputError, match="cannot read .*none.pt: No such file"):
            memory.load(tmp_path / "none.pt")

    def test_of_another_program(self, tmp_path, memory):
        torch.save(memory.state_dict(), tmp_path / "plain.pt")
        with pytest.raises(InputError, match="plain.pt is damaged or not of this program's format"):
            memory.load(tmp_path / "plain.pt")

    def test_of_this_program_but_no_memory(self, tmp_path, memory):
        save_tensors(tmp_path / "weights.pt", {"model": memory.model.state_dict()})
        with pytest.raises(InputError, match="weights.pt holds no memory"):
            memory.load(tmp_path / "weights.pt")

    def test_folder_that_cannot_be_written(self, tmp_path, memory):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="cannot write .*file"):
            memory.save(tmp_path / "file" / "memory.pt")


class TestNormalisation:
    def frozen(self, network: nn.Module) -> list[str]:
        return [name for name, p in network.named_parameters() if not p.requires_grad]

    def test_learns_on_the_first_task_only(self, network):
        memory = GradientProjectionMemory(network, exclude=["heads"])
        with memory.protect():
            assert self.frozen(network) == []
        memory.update(network, [normal(5, 2, 4, 4)], 0.9)
        with memory.protect():
            assert self.frozen(network) == ["bn.weight", "bn.bias", "norm.weight", "norm.bias"]
        assert self.frozen(network) == []

    def test_restored_after_an_exception(self, network, memory):
        with pytest.raises(KeyboardInterrupt), memory.protect():
            raise KeyboardInterrupt
        assert self.frozen(network) == []

    def test_what_the_user_froze_stays_frozen(self, network, memory):
        network.bn.weight.requires_grad_(False)
        with memory.protect():
            pass
        assert self.frozen(network) == ["bn.weight"]

    def test_also_after_loading(self, tmp_path, network, memory):
        memory.save(tmp_path / "memory.pt")
        loaded = GradientProjectionMemory(network, exclude=["heads"])
        loaded.load(tmp_path / "memory.pt")
        with loaded.protect():
            assert "bn.weight" in self.frozen(network)


class SmallMLP(nn.Module):
    """One head for all tasks, protected like the rest, as in permuted MNIST."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(30, 25, bias=False), nn.Linear(25, 20, bias=False)
        self.fc3 = nn.Linear(20, 4, bias=False)

    def forward(self, x: Tensor, task: int) -> Tensor:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class SmallAlexNet(nn.Module):
    """Convolutions, BatchNorm without running averages, dropout, pooling, heads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 6, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(6, track_running_stats=False)
        self.conv2 = nn.Conv2d(6, 10, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(10, track_running_stats=False)
        self.fc = nn.Linear(40, 30, bias=False)
        self.bn3 = nn.BatchNorm1d(30, track_running_stats=False)
        self.drop = nn.Dropout(0.3)
        self.heads = nn.ModuleList(nn.Linear(30, 3, bias=False) for _ in range(3))

    def forward(self, x: Tensor, task: int) -> Tensor:
        x = self.drop(F.relu(self.bn1(self.conv1(x))))
        x = F.max_pool2d(self.drop(F.relu(self.bn2(self.conv2(x)))), 2, ceil_mode=True)
        return self.heads[task](self.drop(F.relu(self.bn3(self.fc(x.flatten(1))))))


class BiasesAndGroups(nn.Module):
    """Every layer has a bias, one convolution has groups, dilation and circular padding; GroupNorm and LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, groups=2, padding=1, padding_mode="circular")
        self.norm1 = nn.GroupNorm(2, 8)
        self.conv2 = nn.Conv2d(8, 8, 2, dilation=2)
        self.fc1 = nn.Linear(32, 24)
        self.norm2 = nn.LayerNorm(24)
        self.fc2 = nn.Linear(24, 18)
        self.heads = nn.ModuleList(nn.Linear(18, 3) for _ in range(3))

    def forward(self, x: Tensor, task: int) -> Tensor:
        x = F.max_pool2d(torch.tanh(self.norm1(self.conv1(x))), 2)
        x = torch.tanh(self.conv2(F.interpolate(x, 4)))
        return self.heads[task](torch.tanh(self.fc2(self.norm2(torch.tanh(self.fc1(x.flatten(1)))))))


# name: (model, shape of an image, learning rate)
NETWORKS = {
    "MLP": (SmallMLP, (30,), 0.1),
    "convolutions and BatchNorm": (SmallAlexNet, (4, 7, 7), 0.1),
    "biases and groups": (BiasesAndGroups, (4, 6, 6), 0.1),
    "models.MLP": (MLP, (784,), 0.1),
    "models.AlexNet": (lambda: AlexNet([3] * 3), (3, 32, 32), 0.01),
    "models.LeNet": (lambda: LeNet([3] * 3), (3, 32, 32), 0.01),
    "models.ResNet18": (lambda: ResNet18([3] * 3, width=4), (3, 32, 32), 0.1),
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", NETWORKS)
def test_no_interference(name, dtype):
    """With ε = 1, the outputs on the samples of an old task do not move while new tasks are learned."""
    make, shape, lr = NETWORKS[name]
    torch.manual_seed(0)
    model = make().to(dtype)
    memory = GradientProjectionMemory(model, exclude=["heads"] if hasattr(model, "heads") else [])
    # Few images, so that they leave room in every layer.
    images = [normal(4, *shape, seed=t, dtype=dtype) for t in range(3)]
    labels = torch.tensor([0, 1, 2, 0])

    @torch.no_grad()
    def outputs(batch: Tensor, t: int) -> Tensor:
        model.eval()
        return model(batch, t)

    remembered: list[Tensor] = []
    for t in range(3):
        weights = copy.deepcopy(model.state_dict())
        on_others = outputs(normal(4, *shape, seed=9, dtype=dtype), 0)
        with memory.protect():
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(parameters, lr=lr)
            for _ in range(3):
                model.train()
                optimizer.zero_grad()
                F.cross_entropy(model(images[t], t), labels).backward()
                optimizer.step()
        for s, old in enumerate(remembered):
            assert_close(outputs(images[s], s), old, atol=TOLERANCE[dtype], rtol=0, msg=lambda m, s=s: f"task {s}: {m}")
        # It did learn: weights moved, and with them the outputs on anything else.
        layers = memory.layers.items()
        assert any(not torch.equal(layer.module.weight, weights[f"{name}.weight"]) for name, layer in layers)
        assert (outputs(normal(4, *shape, seed=9, dtype=dtype), 0) - on_others).abs().max() > 10 * TOLERANCE[dtype]
        memory.update(lambda batch, t=t: model(batch, t), [images[t]], 1.0)
        remembered.append(outputs(images[t], t))


def test_before_the_first_update_training_is_plain(network):
    memory = GradientProjectionMemory(network, exclude=["heads"])
    images = normal(4, 2, 4, 4)
    network(images).square().sum().backward()
    plain = [p.grad for p in network.parameters()]
    network.zero_grad()
    with memory.protect():
        network(images).square().sum().backward()
    assert_close([p.grad for p in network.parameters()], plain, atol=0, rtol=0)
