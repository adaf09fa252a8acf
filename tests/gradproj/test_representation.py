"""The inputs of a model's layers as representation matrices, against plain loops over patches."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import gradproj.layers.base
from gradproj.errors import InputError
from gradproj.gatherer import Gatherer
from gradproj.gathering import gather
from gradproj.layers import find_layers
from gradproj.representation import Representation
from tests import reference

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


class Network(nn.Module):
    """A convolution in groups with a bias, a Linear, and a head for each of two tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.ReLU(), nn.Flatten())
        self.fc = nn.Linear(16, 6, bias=False)
        self.heads = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 2)])
        self.double()

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        return self.heads[task](F.relu(self.fc(self.body(x))))


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network()


class TestFindLayers:
    def test_every_linear_and_convolution_by_name(self, network):
        assert list(find_layers(network)) == ["body.0", "fc", "heads.0", "heads.1"]

    def test_excluded_with_all_inside(self, network):
        assert list(find_layers(network, ["heads", "body"])) == ["fc"]
        assert list(find_layers(network, ["heads.1"])) == ["body.0", "fc", "heads.0"]

    def test_an_excluded_name_is_no_beginning_of_a_name(self):
        model = nn.ModuleDict({"fc": nn.Linear(2, 2), "fc2": nn.Linear(2, 2)})
        assert list(find_layers(model, ["fc"])) == ["fc2"]

    def test_unknown_name(self, network):
        with pytest.raises(InputError, match="exclude names 'head', which is not a module of Network"):
            find_layers(network, ["head"])

    def test_sizes_and_keys(self, network):
        layers = find_layers(network)
        assert layers["body.0"].keys == ["body.0[0]", "body.0[1]"]
        assert layers["body.0"].input_size == 1 * 2 * 2 + 1
        assert layers["fc"].keys == ["fc"]
        assert layers["fc"].input_size == 16


def gram(representation: Representation) -> Tensor:
    """R Rᵀ, in whichever form it is kept."""
    if representation.gram is not None:
        return representation.gram
    columns = representation.columns.double()
    return columns @ columns.T


class TestRepresentation:
    def test_few_columns_are_kept_as_they_are(self):
        columns = normal(9, 8)
        representation = Representation(9)
        for part in columns.split(3, dim=1):
            representation.add(part)
        assert representation.n == 8
        assert representation.gram is None
        assert torch.equal(representation.columns, columns)

    @pytest.mark.parametrize("parts", [1, 2, 5, 12, 30], ids="parts of {}".format)
    def test_many_columns_are_kept_as_their_gram_matrix(self, parts):
        columns = normal(9, 30)
        representation = Representation(9)
        for part in columns.split(parts, dim=1):
            representation.add(part)
        assert representation.n == 30
        assert representation.columns is None
        assert_close(representation.gram, columns @ columns.T, atol=1e-12, rtol=0)

    def test_blocks_give_the_same(self, monkeypatch):
        monkeypatch.setattr(gradproj.representation, "BLOCK_ENTRIES", 20)  # two columns at a time
        columns = normal(9, 31)
        representation = Representation(9)
        representation.add(columns)
        assert_close(representation.gram, columns @ columns.T, atol=1e-12, rtol=0)

    def test_single_precision_is_summed_in_double(self):
        columns = normal(4, 50).float()
        representation = Representation(4)
        representation.add(columns)
        assert representation.gram.dtype == torch.float64
        assert_close(representation.gram, columns.double() @ columns.double().T, atol=1e-12, rtol=0)


class TestRepresentations:
    def expected(self, network: Network, images: Tensor) -> dict[str, Tensor]:
        """R Rᵀ of every layer, all images at once, by the reference."""
        first = reference.conv_patches(images, (2, 2), groups=2)
        ones = np.ones((1, first.shape[2]))
        with torch.no_grad():
            hidden = network.body(images)
        columns = {f"body.0[{g}]": np.concatenate([first[g], ones]) for g in range(2)} | {"fc": hidden.T.numpy()}
        return {key: torch.from_numpy(c @ c.T) for key, c in columns.items()}

    @pytest.mark.parametrize("block", [1, 40, 2**24], ids="blocks of {}".format)
    @pytest.mark.parametrize("batch_size", [1, 4, 10], ids="batches of {}".format)
    def test_batches_and_blocks_give_what_all_images_at_once_do(self, network, monkeypatch, batch_size, block):
        monkeypatch.setattr(gradproj.representation, "BLOCK_ENTRIES", block)
        images = normal(10, 2, 3, 3)
        layers = find_layers(network, ["heads"])
        gathered = gather(Gatherer(layers), network, network, images.split(batch_size))
        expected = self.expected(network, images)
        assert gathered.keys() == expected.keys()
        for key, representation in gathered.items():
            assert_close(gram(representation), expected[key], atol=1e-11, rtol=0)

    def test_samples_limit_the_columns_of_each_batch(self, network):
        images = normal(10, 2, 3, 3)
        layers = find_layers(network, ["heads"])
        gathered = gather(Gatherer(layers, {"body.0": 2}), network, network, images.split(5))
        assert {key: r.n for key, r in gathered.items()} == {"body.0[0]": 4 * 4, "body.0[1]": 4 * 4, "fc": 10}
        first_two_of_each = self.expected(network, images[[0, 1, 5, 6]])
        assert_close(gram(gathered["body.0[1]"]), first_two_of_each["body.0[1]"], atol=1e-12, rtol=0)
        assert_close(gram(gathered["fc"]), self.expected(network, images)["fc"], atol=1e-12, rtol=0)

    def test_a_layer_used_twice_contributes_all_its_inputs(self):
        linear = nn.Linear(3, 3, bias=False, dtype=DOUBLE)
        x = normal(2, 3)
        model = nn.Sequential(linear)
        gathered = gather(Gatherer(find_layers(model)), model, lambda x: linear(linear(x)), [x])
        columns = torch.cat([x, linear(x).detach()]).T
        assert_close(gram(gathered["0"]), columns @ columns.T)

    def test_a_layer_that_does_not_run(self, network):
        with pytest.raises(InputError, match=r"layer heads\.1 did not run in the forward pass.*exclude what does not"):
            gather(Gatherer(find_layers(network)), network, network, [normal(2, 2, 3, 3)])

    def test_no_hook_stays(self, network):
        layers = find_layers(network)
        gather(Gatherer(find_layers(network, ["heads"])), network, network, [normal(2, 2, 3, 3)])
        with pytest.raises(RuntimeError, match="shape"):
            gather(Gatherer(layers), network, network, [normal(2, 2, 5, 5)])
        assert not any(layer.module._forward_pre_hooks for layer in layers.values())

    def test_nothing_is_kept_for_backward(self, network):
        gathered = gather(Gatherer(find_layers(network, ["heads"])), network, network, [normal(20, 2, 3, 3)])
        assert not any(gram(representation).requires_grad for representation in gathered.values())


def test_inputs_that_the_model_overwrites_are_remembered_as_they_were():
    fc, x = nn.Linear(8, 8, bias=False).double(), normal(5, 8)

    def residual_in_place(images: Tensor) -> Tensor:
        inputs = images.clone()
        inputs += fc(inputs)
        return inputs

    model = nn.Sequential(fc)
    found = gather(Gatherer(find_layers(model)), model, residual_in_place, [x])["0"]
    assert_close(found.columns, x.T)


def test_a_block_of_patches_stays_within_its_bound(monkeypatch):
    sizes = []
    add = Representation.add
    monkeypatch.setattr(gradproj.layers.base, "BLOCK_ENTRIES", 5000)
    monkeypatch.setattr(
        Representation, "add", lambda self, columns: (sizes.append(columns.numel()), add(self, columns))
    )
    conv = nn.Conv2d(2, 3, 3, padding=1).double()
    model = nn.Sequential(conv)
    gather(Gatherer(find_layers(model)), model, model, [normal(9, 2, 10, 12)])
    assert sizes == 4 * [2 * 19 * 120] + [19 * 120]  # two images at a time, 19 inputs at 120 positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_columns_of_any_length_count_alike(dtype):
    """Their span is the same, bit for bit, but for lengths."""
    columns = torch.randn(5, 4).to(dtype)
    lengths = torch.tensor([1e-30, 1.0, 1e30, 0.0]).to(dtype)
    found = Representation(5, unit=True).add(columns * lengths).held
    assert (found[:, 3] == 0).all()
    largest = found[:, :3].abs().amax(0)
    assert ((largest >= 0.5) & (largest < 1)).all()
    ratios = (columns * lengths)[:, :3].double() / found[:, :3].double()
    assert torch.equal(ratios, ratios[:1].expand_as(ratios)) and torch.equal(ratios.log2(), ratios.log2().round())
