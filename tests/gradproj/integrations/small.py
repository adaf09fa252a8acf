"""A small network, tasks that use half of its inputs' directions, and what must hold of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gradproj import GradientProjectionMemory
from gradproj.batches import in_eval_mode

D, OUT = 6, 4


def data(seed: int, n: int = 24) -> TensorDataset:
    """Inputs of three directions, other ones for every seed, and targets."""
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 3, generator=random) @ torch.randn(3, D, generator=random)
    return TensorDataset(inputs, torch.randn(n, OUT, generator=random))


def loader(seed: int) -> DataLoader:
    return DataLoader(data(seed), batch_size=8, shuffle=True)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, OUT))


@torch.no_grad()
def outputs(run: Callable[[Any], Any], model: nn.Module, batch: Any) -> Tensor:
    """What a model gives in eval mode."""
    with in_eval_mode(model):
        return run(batch)


def assert_open(model: nn.Module) -> None:
    """Nothing is left of a protection."""
    assert all(p.requires_grad for p in model.parameters())
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def assert_kept(memory: GradientProjectionMemory, run: Callable[[Any], Any], old: Tensor, batch: Any) -> None:
    """Outputs on an old task's batch are what they were."""
    now = outputs(run, memory.model, batch)
    assert (now - old).norm() <= 1e-5 * old.norm()
    report = memory.verify(run, batch)
    assert report.holds, str(report)
