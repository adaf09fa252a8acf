"""What the two processes of test_distributed.py do: `python -m tests.gradproj.distributed_cases FOLDER RANK N`."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gradproj import GradientProjectionMemory
from gradproj.distributed import alone
from gradproj.errors import InputError
from gradproj.files import save_tensors

SHARES = (22, 8)  # samples of each process
CASES: dict[str, Callable[[int], Any]] = {}


def case(function: Callable[[int], Any]) -> Callable[[int], Any]:
    """Add a function of a process's rank to what is run; what it returns, or its error, is saved."""
    CASES[function.__name__] = function
    return function


class Mixed(nn.Module):
    """Columns and R Rᵀ, groups, shared inputs, a table that is also the head's weight, attention inside a parent."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.mix = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.wide = nn.Linear(8 * 5, 40)
        self.wider = nn.Linear(40, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2).relu()
        x = x + (self.query(x) * self.key(x)).tanh()
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.wider(self.wide(x.flatten(1)).relu()))


def model(kind: Callable[[], nn.Module] = Mixed, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same in every process."""
    torch.manual_seed(0)
    return kind().to(dtype)


def tokens(task: int) -> Tensor:
    """The samples (30, 5) of a task, those of all processes; each task uses other words."""
    generator = torch.Generator().manual_seed(10 + task)
    return torch.randint(6 * task, 6 * task + 6, (sum(SHARES), 5), generator=generator)


def share(samples: Tensor, rank: int) -> list[Tensor]:
    """A process's batches, of at most 9 samples."""
    return list(samples.split(SHARES)[rank].split(9))


def update(memory: GradientProjectionMemory, batches: Callable[[int], Iterable[Tensor]], **how: Any) -> dict[str, Any]:
    """The bases after two tasks."""
    with torch.no_grad():
        for task, epsilon in ((0, 0.9), (1, 0.95)):
            memory.update(memory.model, batches(task), epsilon, **how)
    return memory.bases


def made(dtype: torch.dtype = torch.float32, **how: Any) -> GradientProjectionMemory:
    return GradientProjectionMemory(model(dtype=dtype), **how)


@case
def float32(rank: int) -> Any:
    return update(made(exact=True), lambda task: share(tokens(task), rank))


@case
def bfloat16(rank: int) -> Any:
    return update(made(torch.bfloat16), lambda task: share(tokens(task), rank))


@case
def several_passes(rank: int) -> Any:
    return update(made(), lambda task: share(tokens(task), rank), max_memory=8 * 50**2)


@case
def one_without_batches(rank: int) -> Any:
    return update(made(), lambda task: [] if rank else [tokens(task)], max_memory=8 * 50**2)


@case
def hosts_of_one_without_batches(rank: int) -> Any:
    memory = made()
    update(memory, lambda task: [] if rank else [tokens(task)])
    with memory.protect():
        memory.model(tokens(1)).square().sum().backward()
    grad, basis = memory.model.attention.out_proj.weight.grad, memory.bases["attention.out_proj"].float()
    bias = memory.model.attention.out_proj.bias.grad
    return (torch.cat([grad, bias[:, None]], dim=1) @ basis).norm() / grad.norm()


@case
def none_with_batches(rank: int) -> Any:
    update(made(), lambda _task: [])


@case
def an_error_in_one(rank: int) -> Any:
    def batches(_task: int) -> Iterable[Tensor]:
        yield tokens(0)
        if rank:
            raise OSError("the disk is gone")

    update(made(), batches)


class Parted(nn.Module):
    """Layers of which one runs for some samples only; two that are given the same input, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == SHARES[0]:
            return self.a(x) + self.b(x) + self.c(x)
        return self.a(x) + self.b(x * torch.arange(4))


def parted_samples() -> Tensor:
    return torch.randn(sum(SHARES), 4, generator=torch.Generator().manual_seed(3))


@case
def layers_that_run_in_one(rank: int) -> Any:
    memory = GradientProjectionMemory(model(Parted), exact=True)
    memory.update(memory.model, [parted_samples().split(SHARES)[rank]], 0.8)
    return memory.bases


@case
def all_columns(rank: int) -> Any:
    memory = GradientProjectionMemory(model(Parted))
    gathered = memory.gather(memory.model, [parted_samples().split(SHARES)[rank]], keep_columns=True)
    return gathered["a"].columns


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)).eval()


@case
def buffers(rank: int) -> Any:
    """More batches in one process than in the other, through a wrapper that gives all the first one's buffers."""
    inner = model(normalised)
    inner[1].running_mean += rank
    wrapped = DistributedDataParallel(inner)
    memory = GradientProjectionMemory(inner, exact=True)
    memory.update(lambda x: wrapped(x), share(torch.linspace(-1, 1, 150).view(30, 5).sin(), rank), 0.9)
    return memory.bases | {"synchronises": torch.tensor(wrapped.require_forward_param_sync)}


@case
def other_models(rank: int) -> Any:
    torch.manual_seed(rank)
    memory = GradientProjectionMemory(nn.Linear(4, 2))
    memory.update(memory.model, [torch.eye(4)], 0.9)


@case
def other_models_alone(rank: int) -> Any:
    torch.manual_seed(rank)
    memory = GradientProjectionMemory(nn.Linear(4, 2, bias=False))
    with alone():
        memory.update(memory.model, [torch.eye(4)[: rank + 1]], 1.0)
    return memory.columns[""]


@case
def protected(rank: int) -> Any:
    """Two tasks by AdamW, the wrapped model's memory made of it or of what is inside."""
    found = {}
    for of in ("wrapped", "inner"):
        inner = model(lambda: nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 4)))
        wrapped = DistributedDataParallel(inner, find_unused_parameters=True)
        memory = GradientProjectionMemory(wrapped if of == "wrapped" else inner)
        generator = torch.Generator().manual_seed(5)
        old, new = torch.randn(2, 8, 6, generator=generator)
        memory.update(wrapped, [old[rank::2]], 1.0)
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
        losses = []
        with memory.protect(optimizer):
            for _ in range(20):
                optimizer.zero_grad()
                loss = (wrapped(new[rank::2]) - 1).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        if not rank:  # one alone must not wait for the others
            verified = [memory.verify(forward, old) for forward in (wrapped, inner)]
            found[f"{of} moved"] = [v.moved for v in verified]
            found[f"{of} holds"] = [v.holds for v in verified]
        found[f"{of} losses"] = losses
        found[f"{of} weights"] = {name: p.clone() for name, p in inner.state_dict().items()}
    return found


@case
def gradients(rank: int) -> Any:
    """Projected by each process, then averaged."""
    inner = model(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))
    wrapped = DistributedDataParallel(copy.deepcopy(inner))
    data = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(6))
    memory = GradientProjectionMemory(wrapped.module)
    memory.update(wrapped, [data[0][rank::2]], 0.8)
    with memory.protect():
        F.mse_loss(wrapped(data[1][rank::2]), torch.ones(6, 3)).backward()
    return {name: p.grad for name, p in wrapped.module.named_parameters()}


@case
def sharded(rank: int) -> Any:
    refused = {}
    for name, shard in (
        ("fully_shard", fully_shard),
        ("FullyShardedDataParallel", lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu"))),
    ):
        net = model(normalised)
        memory = GradientProjectionMemory(net)
        try:
            GradientProjectionMemory(shard(net))
        except InputError as error:
            refused[name] = str(error)
        if name == "fully_shard":  # in place, after the memory was made
            for what, use in (("update", lambda m=memory: m.update(m.model, [], 0.9)), ("protect", memory.protect)):
                try:
                    with use() or copy:
                        pass
                except InputError as error:
                    refused[f"{name} before {what}"] = str(error)
    return refused


def main(folder: str, rank: str, n: str) -> None:
    """Run all cases one after another."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=int(rank), world_size=int(n))
    results: dict[str, Any] = {}
    for name, function in CASES.items():
        try:
            results[name] = function(int(rank))
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
        save_tensors(Path(folder, f"results-{rank}.pt"), results)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
