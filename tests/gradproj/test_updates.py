"""Whatever batches come, update remembers the same: masks, dicts, loaders, several passes, random columns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from gradproj import GradientProjectionMemory
from gradproj.errors import InputError
from gradproj.gathering import filled
from tests.gradproj.learned import OLD, D, mlp


class TestBatches:
    @pytest.mark.parametrize(
        "batches",
        [
            [OLD],
            OLD,
            {"input": OLD},
            [{"input": OLD}],
            [(OLD, torch.zeros(3))],
            [[OLD, torch.zeros(3)]],
            torch.utils.data.DataLoader(torch.utils.data.TensorDataset(OLD, torch.zeros(3)), batch_size=2),
            (OLD[i : i + 1] for i in range(3)),
            OLD.split(2),
        ],
        ids=["list", "tensor", "dict", "dicts", "pairs", "lists", "loader", "generator", "split"],
    )
    def test_of_any_kind(self, batches):
        memory = GradientProjectionMemory(model := mlp())
        memory.update(model, batches, threshold=1.0)
        assert memory.columns == {"0": 3, "2": 3, "4": 3}

    def test_what_of_a_pair_a_model_needs(self):
        class Net(nn.Linear):
            def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
                assert labels is None
                return super().forward(x)

        net = Net(D, 2)
        memory = GradientProjectionMemory(net)
        memory.update(net, [(OLD, torch.zeros(3))], threshold=1.0)
        assert memory.columns == {"": 3}

    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            ((OLD, torch.zeros(3)), "batches is a tuple, which could be one batch or several; give a list"),
            (OLD.numpy(), "batches is of type ndarray; give batches in a list"),
            ("images", "batches is of type str"),
            (None, "batches is of type NoneType"),
            ([{"pixels": OLD}], "forward cannot take a batch of type dict .*pixels.*give a function"),
            (["images"], "forward cannot take a batch of type str"),
        ],
        ids=["tuple", "array", "text", "none", "wrong key", "texts"],
    )
    def test_that_cannot_be_used(self, batches, message):
        memory = GradientProjectionMemory(model := mlp())
        with pytest.raises(InputError, match=f"^{message}"):
            memory.update(model, batches, threshold=1.0)
        assert memory.n_updates == 0

    @pytest.mark.parametrize("mask", ["mask", lambda batch: batch["mask"]], ids=["key", "function"])
    def test_masked_rows_do_not_count(self, mask):
        memory = GradientProjectionMemory(model := mlp())
        batch = {"input": OLD, "mask": torch.tensor([1, 0, 1])}
        memory.update(lambda b: model(b["input"]), [batch], threshold=1.0, mask=mask)
        assert memory.columns["0"] == 2

    def test_a_mask_of_nothing_known(self):
        memory = GradientProjectionMemory(model := mlp())
        with pytest.raises(InputError, match="^mask 'mask' cannot be read from a batch of type Tensor"):
            memory.update(model, [OLD], threshold=1.0, mask="mask")
        with pytest.raises(InputError, match="^mask must give a tensor"):
            memory.update(model, [OLD], threshold=1.0, mask=lambda _: 3)

    def test_random_rows_in_bounded_memory(self):
        model = nn.Sequential(nn.Linear(D, 4))
        memory = GradientProjectionMemory(model)
        many = torch.cat([torch.zeros(500, D), torch.randn(500, D)])  # the first ones hold nothing but a bias's 1
        memory.update(model, [many], threshold=1.0, rows=20)
        assert memory.columns == {"0": D + 1}

    def test_a_limit_of_columns_says_what_is_lost(self):
        model = nn.Sequential(nn.Linear(D, 4, bias=False))
        memory = GradientProjectionMemory(model)
        x = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0, 0.0]))
        with pytest.warns(
            UserWarning, match=r"^0 has 2 columns, the most allowed; they hold 0\.9286 of its inputs' energy"
        ):
            memory.update(model, [x], threshold=0.99, max_columns=2)
        assert memory.columns == {"0": 2}


class TestPasses:
    def test_as_many_as_fit(self):
        """The same bases in several passes over the batches."""
        model, batches = mlp(), [torch.randn(30, D), torch.randn(30, D)]
        one, some = GradientProjectionMemory(model), GradientProjectionMemory(model)
        calls = []
        one.update(model, batches, threshold=0.9)
        some.update(lambda x: (calls.append(1), model(x))[1], batches, threshold=0.9, max_memory=8 * 9 * 9)
        assert len(calls) == 1 + 3 * 2  # a look, and a pass for each layer
        for key in one.bases:
            assert_close(one.bases[key], some.bases[key])

    def test_what_can_run_once_only(self):
        memory = GradientProjectionMemory(model := mlp())
        with pytest.raises(InputError, match="^the layers' inputs need .* GiB, so the batches must run 3 times, but"):
            memory.update(model, iter([OLD]), threshold=0.9, max_memory=8 * 9 * 9)

    def test_layers_that_see_the_same_share_it(self):
        class Heads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q, self.k, self.v = nn.Linear(D, 4), nn.Linear(D, 4), nn.Linear(D, 4, bias=False)

            def forward(self, x: Tensor) -> Tensor:
                return self.q(x) * self.k(x) + self.v(x)

        memory = GradientProjectionMemory(model := Heads())
        gathered = memory.gather(model, [torch.randn(20, D), torch.randn(20, D)])
        assert gathered["q"] is gathered["k"]
        assert gathered["v"] is not gathered["q"]  # it has no bias
        memory.extend(gathered, 0.9)
        assert memory.bases["q"] is memory.bases["k"]

    @pytest.mark.parametrize("n", [4, 60], ids=["columns", "R Rᵀ"])
    @pytest.mark.parametrize(
        "when", ["a second application", "another batch", "the first batch", "a is ahead", "twice the same"]
    )
    def test_layers_that_part_keep_their_own(self, when, n):
        class Parting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

            def forward(self, batch) -> Tensor:
                x, y = batch
                if when == "a is ahead":
                    self.a(x.cos())
                out = self.a(x) + self.b(x if y is None else y)
                if when == "twice the same":
                    self.a(x)
                if when != "a second application":
                    return out
                result = self.b(out)
                out.relu_()  # what b was given is not there any more
                return result

        memory = GradientProjectionMemory(model := Parting())
        one, other = torch.randn(n, D), torch.randn(n, D)
        batches = [(one, None), (other, one)] if when == "another batch" else [(one, None), (other, None)]
        if when == "the first batch":
            batches = [(one, other), (other, None)]
        seen = {"a": [], "b": []}
        hooks = [
            getattr(model, name).register_forward_hook(
                lambda _, args, __, name=name: seen[name].append(args[0].clone())
            )
            for name in seen
        ]
        gathered = memory.gather(lambda batch: model(batch), batches)
        for hook in hooks:
            hook.remove()
        for name, parts in seen.items():
            columns = torch.cat([torch.cat(parts), torch.ones(len(torch.cat(parts)), 1)], dim=1).T.double()
            assert_close(gathered[name].outer, columns @ columns.T)
            assert gathered[name].n == columns.shape[1]

    def test_an_input_changed_in_place_is_not_shared(self):
        class Changing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q, self.k = nn.Linear(D, 4), nn.Linear(D, 4)

            def forward(self, x: Tensor) -> Tensor:
                x = x.clone()
                first = self.q(x)
                return first + self.k(x.relu_())

        memory = GradientProjectionMemory(model := Changing())
        gathered = memory.gather(model, [OLD])
        expected = torch.cat([OLD.relu(), torch.ones(3, 1)], dim=1).T.double()
        assert_close(gathered["k"].outer, expected @ expected.T)


def test_passes_hold_what_fits():
    groups = [(["a"], 2), (["b", "c"], 4), (["d"], 5), (["e"], 1), (["f"], 9), (["g"], 1)]
    assert filled(groups, 6) == [["a", "b", "c"], ["d", "e"], ["f"], ["g"]]
