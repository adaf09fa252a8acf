"""The memory in Lightning's Trainer."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from gradproj import GradientProjectionMemory, InputError
from tests.gradproj.integrations.small import assert_kept, assert_open, data, loader, network, outputs

lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

from gradproj.integrations.lightning import GradientProjectionCallback  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]
OLD, NEW = (data(seed).tensors[0] for seed in (0, 1))


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()
        self.losses: list[float] = []

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def training_step(self, batch, _index) -> Tensor:
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02)


class PlainSGD(Module):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


class ByHand(Module):
    """Manual optimisation, with two optimisers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        first, second = self.network[:2].parameters(), self.network[2:].parameters()
        return torch.optim.Adam(first, lr=0.02), torch.optim.SGD(second, lr=0.05, momentum=0.9, weight_decay=0.1)


def trainer(callback: GradientProjectionCallback | None, **arguments) -> lightning.Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    settings = quiet | {"accelerator": "cpu", "max_epochs": 4, "callbacks": callback and [callback]} | arguments
    return lightning.Trainer(**settings)


def fit(module: Module, memory: GradientProjectionMemory, seed: int, **arguments) -> None:
    """Train a task; the first one is remembered, by the old inputs."""
    callback = GradientProjectionCallback(memory, threshold=1.0, samples=[OLD], remember=not seed)
    module.losses.clear()
    trainer(callback, **arguments).fit(module, loader(seed))


def assert_learned(module: Module) -> None:
    assert sum(module.losses[-3:]) < 0.9 * sum(module.losses[:3])


@pytest.mark.parametrize("make", [Module, PlainSGD, ByHand], ids=["AdamW", "SGD", "by hand"])
def test_old_outputs_stay_while_the_new_task_is_learned(make):
    module = make()
    memory = GradientProjectionMemory(module)
    fit(module, memory, 0)
    assert_open(module)
    old = outputs(module, module, OLD)
    fit(module, memory, 1)
    assert_learned(module)
    assert_kept(memory, module, old, OLD)
    assert_open(module)


def test_samples_are_drawn_of_the_tasks_own_data():
    """Without samples given, all 24 inputs of the first task, and then 16 of the second."""
    module = Module()
    memory = GradientProjectionMemory(module)
    trainer(GradientProjectionCallback(memory, 1.0)).fit(module, loader(0))
    old = outputs(module, module, OLD)
    assert memory.columns["network.0"] == 4  # three directions and the bias
    trainer(GradientProjectionCallback(memory, 1.0, n_samples=16)).fit(module, loader(1))
    assert (memory.n_updates, memory.columns["network.0"]) == (2, 7)
    assert (outputs(module, module, OLD) - old).norm() <= 1e-5 * old.norm()


@pytest.mark.parametrize("is_protected", [True, False])
def test_mixed_precision(is_protected):
    """Old outputs stay within bfloat16's roundings of inputs, weights and outputs; without protection they do not."""
    module = Module()
    memory = GradientProjectionMemory(module)
    fit(module, memory, 0, precision="bf16-mixed")
    with torch.autocast("cpu", torch.bfloat16):
        old = outputs(module, module, OLD).float()
    if is_protected:
        fit(module, memory, 1, precision="bf16-mixed")
        assert_learned(module)
    else:
        trainer(None, precision="bf16-mixed").fit(module, loader(1))
    with torch.autocast("cpu", torch.bfloat16):
        report = memory.verify(module, OLD)
        moved = (outputs(module, module, OLD).float() - old).norm() / old.norm()
    assert report.moved == pytest.approx(moved.item(), rel=0.1)
    assert (moved <= 3 * torch.finfo(torch.bfloat16).eps, report.holds) == (is_protected, is_protected)


def test_inputs_are_gathered_in_the_trainers_precision():
    module, under_autocast = Module(), []

    def forward(inputs: Tensor) -> Tensor:
        under_autocast.append(torch.is_autocast_enabled("cpu"))
        return module(inputs)

    callback = GradientProjectionCallback(GradientProjectionMemory(module), 1.0, samples=[OLD], forward=forward)
    trainer(callback, precision="bf16-mixed").fit(module, loader(0))
    assert under_autocast and all(under_autocast)


def test_the_first_task_is_trained_as_without_the_callback():
    bare, watched = Module(), Module()
    callback = GradientProjectionCallback(GradientProjectionMemory(watched), 1.0)
    for module, given in ((bare, None), (watched, callback)):
        torch.manual_seed(1)
        trainer(given).fit(module, loader(0))
    torch.testing.assert_close(bare.state_dict(), watched.state_dict(), rtol=0, atol=0)


def test_an_exception_closes_the_protection():
    class Failing(Module):
        def training_step(self, batch, index):
            if memory.n_updates:
                assert memory.is_protecting and not self.network[1].weight.requires_grad
                raise KeyError("broken batch")
            return super().training_step(batch, index)

    module = Failing()
    memory = GradientProjectionMemory(module)
    fit(module, memory, 0)
    with pytest.raises(KeyError, match="broken batch"):
        fit(module, memory, 1)
    assert not memory.is_protecting and memory.n_updates == 1
    assert_open(module)


def test_the_memory_is_in_checkpoints(tmp_path):
    """A second task that is interrupted goes on in a new process from its checkpoint, protected."""
    module = Module()
    memory = GradientProjectionMemory(module)
    fit(module, memory, 0)
    old = outputs(module, module, OLD)
    half = trainer(GradientProjectionCallback(memory, 1.0, remember=False), max_epochs=2)
    half.fit(module, loader(1))
    half.save_checkpoint(tmp_path / "half.ckpt")

    module = Module()
    again = GradientProjectionMemory(module)
    callback = GradientProjectionCallback(again, 1.0, remember=False)
    trainer(callback).fit(module, loader(1), ckpt_path=tmp_path / "half.ckpt")
    assert again.n_updates == 1
    torch.testing.assert_close(again.bases, memory.bases, rtol=0, atol=0)
    assert_kept(again, module, old, OLD)


def test_what_cannot_be_is_said_before_training():
    module = Module()
    memory = GradientProjectionMemory(network())
    with pytest.raises(InputError, match="another model"):
        fit(module, memory, 0)
    with pytest.raises(InputError, match="samples cannot be drawn from a dict"):
        memory = GradientProjectionMemory(module)
        trainer(GradientProjectionCallback(memory, 1.0)).fit(module, {"a": loader(0), "b": loader(1)})
    assert not module.losses
