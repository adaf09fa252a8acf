"""What the integrations share: samples of a task, and what is refused before it trains."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from gradproj import GradientProjectionMemory, InputError
from gradproj.integrations import tasks
from gradproj.integrations.tasks import TaskBoundaries, batches_of
from tests.gradproj.integrations.small import assert_open, data, loader, network


class Stream(IterableDataset):
    def __iter__(self):
        yield from data(0)


class TestSamples:
    def test_as_many_different_ones_as_wanted_in_batches_like_the_loaders(self):
        batches = batches_of(loader(0), 12)
        assert [len(inputs) for inputs, _ in batches] == [8, 4]
        rows = {tuple(row) for row in data(0).tensors[0].tolist()}
        drawn = [tuple(row) for inputs, _ in batches for row in inputs.tolist()]
        assert len(set(drawn)) == 12 and set(drawn) < rows
        assert drawn != list(map(tuple, data(0).tensors[0][:12].tolist()))

    def test_all_where_there_are_fewer(self):
        assert sum(len(inputs) for inputs, _ in batches_of(loader(0), 300)) == 24

    def test_of_a_stream_the_first_ones(self):
        batches = batches_of(DataLoader(Stream(), batch_size=8), 12)
        assert torch.equal(torch.cat([inputs for inputs, _ in batches]), data(0).tensors[0][:16])

    def test_with_a_batch_sampler_of_the_users_own(self):
        sampler = BatchSampler(SequentialSampler(data(0)), 5, drop_last=False)
        assert [len(x) for x, _ in batches_of(DataLoader(data(0), batch_sampler=sampler), 12)] == [5, 5, 2]
        fixed = DataLoader(data(0), batch_sampler=[[0, 1], [2, 3]])
        assert sum(len(x) for x, _ in batches_of(fixed, 12)) == 12

    def test_random_numbers_stay_as_they_are(self):
        class Noisy(list):
            def __getitem__(self, index):
                return torch.randn(3)

        torch.manual_seed(0)
        expected = torch.randn(4)
        torch.manual_seed(0)
        batches_of(DataLoader(Noisy(range(9)), batch_size=4), 6)
        assert torch.equal(torch.randn(4), expected)

    def test_each_process_has_its_share(self, monkeypatch):
        shares = []
        for rank in (0, 1):
            monkeypatch.setattr(tasks.distributed, "is_initialized", lambda: True)
            monkeypatch.setattr(tasks.distributed, "get_rank", lambda _rank=rank: _rank)
            monkeypatch.setattr(tasks.distributed, "get_world_size", lambda: 2)
            shares.append({tuple(row) for x, _ in batches_of(loader(0), 13) for row in x.tolist()})
        assert [len(share) for share in shares] == [7, 6] and not shares[0] & shares[1]

    @pytest.mark.parametrize("other", [[1, 2], None, DataLoader(data(0), batch_size=None)])
    def test_not_of_other_things(self, other):
        with pytest.raises(InputError, match=r"samples cannot be drawn from a \w+; give samples"):
            batches_of(other, 4)


class TestRefusals:
    def boundaries(self, model: nn.Module, **arguments) -> TaskBoundaries:
        return TaskBoundaries(GradientProjectionMemory(model), 1.0, **arguments)

    def begin(self, model: nn.Module, boundaries: TaskBoundaries) -> None:
        boundaries.begin(model, torch.optim.Adam(model.parameters()), loader(0))

    def test_another_model(self):
        with pytest.raises(InputError, match="of another model"):
            self.begin(network(), self.boundaries(network()))

    def test_a_layer_that_does_not_run(self):
        model = network()
        model.spare = nn.Linear(2, 2)
        boundaries = self.boundaries(model, forward=lambda batch: model[:4](batch[0]))
        with pytest.raises(InputError, match="layer spare did not run"):
            self.begin(model, boundaries)
        assert_open(model)

    def test_a_forward_that_does_not_fit(self):
        model = network()
        with pytest.raises(InputError, match="forward cannot take a batch of type list"):
            self.begin(model, self.boundaries(model, forward=lambda batch: model(batch.images)))

    def test_samples_that_run_once_or_are_none(self):
        with pytest.raises(InputError, match="samples can run only once"):
            self.boundaries(network(), samples=iter(loader(0)))
        model = network()
        with pytest.raises(InputError, match="no sample to remember"):
            self.begin(model, self.boundaries(model, samples=[]))
        with pytest.raises(InputError, match="n_samples is 0"):
            self.boundaries(model, n_samples=0)

    def test_a_threshold_out_of_range_is_said_before_training(self):
        model = network()
        boundaries = TaskBoundaries(GradientProjectionMemory(model), 1.5)
        with pytest.raises(InputError, match="threshold is 1.5"):
            self.begin(model, boundaries)


def test_a_weight_that_leaks_is_said_before_the_first_task():
    class Leaking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x):
            return self.layer(x) @ self.layer.weight

    model = Leaking()
    boundaries = TaskBoundaries(GradientProjectionMemory(model), 0.9)
    with pytest.warns(UserWarning, match="weight of layer is also used"):
        boundaries.begin(model, torch.optim.SGD(model.parameters()), loader(0))
    boundaries.memory.stop()


def test_a_memory_that_goes_back_is_said():
    model = network()
    boundaries = TaskBoundaries(GradientProjectionMemory(model), 1.0, samples=[data(0).tensors[0]])
    state = boundaries.memory.state_dict()
    boundaries.end(None)
    with pytest.warns(UserWarning, match="back from 1 tasks to the checkpoint's 0"):
        boundaries.take_over(state)
    assert not boundaries.memory.n_updates


def test_several_optimizers():
    """Each is projected that needs it; none is warned of."""
    model = network()
    memory = GradientProjectionMemory(model)
    memory.update(model, data(0).tensors[0], 1.0)
    old = model(data(0).tensors[0]).detach()
    parts = [torch.optim.AdamW(model[:2].parameters(), lr=0.01), torch.optim.Adam(model[2:].parameters(), lr=0.01)]
    memory.start(parts)
    for _ in range(3):
        model(data(1).tensors[0]).square().mean().backward()
        for optimizer in parts:
            optimizer.step()
    memory.stop()
    assert (model(data(0).tensors[0]) - old).norm() <= 1e-5 * old.norm()
