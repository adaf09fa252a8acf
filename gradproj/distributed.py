"""One memory for all processes of a group: each sees its share of the samples, and all come to the same bases."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from gradproj.errors import InputError
from gradproj.gatherer import Gatherer, Source
from gradproj.representation import Representation, SeenRows

_alone = 0  # nested `alone` blocks
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an entry


@contextmanager
def alone() -> Iterator[None]:
    """Within this context memories sum nothing over processes: each is given all samples, or has a model of its own."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


def n_processes() -> int:
    """How many processes share a memory."""
    if _alone or not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def exchanged(value: Any) -> list[Any]:
    """A small value of each process, in the order of their ranks."""
    values = [value] * n_processes()
    if len(values) > 1:
        distributed.all_gather_object(values, value)
    return values


@contextmanager
def all_or_none() -> Iterator[None]:
    """An error of one process in this block is raised in all, so that none waits for another in vain.

    Raises:
        InputError: another process failed.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    reasons = exchanged(error and " ".join(f"{type(error).__name__}: {error}".split())[:300])
    if error is not None:
        raise error
    for rank, reason in enumerate(reasons):
        if reason:
            raise InputError(f"process {rank} cannot go on ({reason}), so no process can")


@contextmanager
def local_forwards() -> Iterator[None]:
    """Within this context DistributedDataParallel's forward waits for no other process, whose batches may be fewer."""
    found: dict[DistributedDataParallel, bool] = {}

    def look(module: nn.Module, _: Any) -> None:
        if isinstance(module, DistributedDataParallel) and module not in found:
            found[module] = module.require_forward_param_sync
            module.require_forward_param_sync = False

    handle = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()
        for module, before in found.items():
            module.require_forward_param_sync = before


def refuse_sharded(model: nn.Module) -> None:
    """Raise InputError where parameters are spread over processes, so that none sees a layer's whole gradient."""
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise InputError("DataParallel runs copies whose gradients nothing projects; use DistributedDataParallel")
        if type(module).__name__ == "FullyShardedDataParallel":
            raise InputError(
                f"{name or type(model).__name__} is sharded by FullyShardedDataParallel: a process holds only a part "
                "of its weights, which cannot be projected; use DistributedDataParallel"
            )
    sharded = [name for name, p in model.named_parameters() if hasattr(p, "device_mesh")]  # a DTensor
    if sharded:
        raise InputError(
            f"{sharded[0]} and {len(sharded) - 1} more parameters are DTensors (fully_shard or tensor parallelism): a "
            "process holds only a part of a weight, which cannot be projected; use DistributedDataParallel"
        )


@torch.no_grad()
def check_same_model(model: nn.Module) -> None:
    """Give all processes the first one's buffers, as DistributedDataParallel does at each training step.

    Raises:
        InputError: their parameters differ.
    """
    if n_processes() == 1:
        return
    if len(set(exchanged([checksum(p) for p in model.parameters()].__repr__()))) > 1:
        raise InputError(
            "the processes' models differ, so they cannot share a memory: train one model with "
            "DistributedDataParallel, or give each its own memory within gradproj.distributed.alone()"
        )
    for buffer in model.buffers():
        distributed.broadcast(buffer, src=0)


def checksum(parameter: Tensor) -> int:
    """A sum of an exact kind, the same in whatever order a machine adds."""
    entries = torch.view_as_real(parameter) if parameter.is_complex() else parameter
    entries = entries.detach().contiguous().flatten()
    return int(entries.view(INTEGERS[entries.element_size()]).sum(dtype=torch.int64))


def merge(gatherer: Gatherer, n_batches: int, model: nn.Module) -> int:
    """Let a gatherer hold what all processes have gathered, each of its share; returns the number of all batches.

    Columns are put together while they are fewer than the layer's inputs, as one process would keep them; from then on
    R Rᵀ of all samples is the sum of the processes'. So each comes to the bases that one process would.

    Args:
        gatherer: of this process, perhaps with nothing gathered.
        n_batches: of this process.
        model: whose modules are the same in all processes.
    """
    if n_processes() == 1:
        return n_batches
    modules = list(model.modules())
    places = {module: i for i, module in enumerate(modules)}
    labels = {id(source): i for i, source in enumerate(gatherer.sources.values())}
    shares = exchanged(
        {
            "batches": n_batches,
            "columns": gatherer.columns,
            "hosts": {name: [places[m] for m in found if m in places] for name, found in gatherer.hosts.items()},
            "labels": {name: labels[id(source)] for name, source in gatherer.sources.items()},
            "parts": {name: [_extent(part) for part in source.parts] for name, source in gatherer.sources.items()},
        }
    )
    gatherer.columns = {key: sum(share["columns"][key] for share in shares) for key in gatherer.columns}
    for share in shares:
        for name, found in share["hosts"].items():
            known = gatherer.hosts.setdefault(name, [])
            known += [modules[i] for i in found if modules[i] not in known]
    groups: dict[tuple[int | None, ...], list[str]] = {}  # layers that share their source in every process
    for name in gatherer.layers:
        groups.setdefault(tuple(share["labels"].get(name) for share in shares), []).append(name)
    sources: list[Source] = []
    for label, names in groups.items():
        if any(place is not None for place in label):  # it ran somewhere
            source = gatherer.sources.get(names[0]) or Source(gatherer.empty_parts(gatherer.layers[names[0]]))
            sources.append(
                Source(copy.deepcopy(source.parts) if len(source.members) > len(names) else source.parts, names)
            )
    for source in sources:
        name = source.members[0]
        for i, part in enumerate(source.parts):
            extents = [share["parts"][name][i] if name in share["parts"] else (0, None) for share in shares]
            _sum(part, extents, gatherer.layers[name].device)
    gatherer.sources = {name: source for source in sources for name in source.members}
    return sum(share["batches"] for share in shares)


def _extent(part: Representation | SeenRows) -> tuple[int, torch.dtype | None]:
    """How much a part holds: n, and the dtype of its columns, if it has any."""
    columns = getattr(part, "columns", None)
    return part.n, None if columns is None else columns.dtype


def _sum(part: Representation | SeenRows, extents: list[tuple[int, torch.dtype | None]], device: torch.device) -> None:
    """Let a part hold what all processes' parts, of these extents, do."""
    n = sum(n for n, _ in extents)
    if isinstance(part, SeenRows):
        rows = part.seen.to(device, torch.uint8)
        distributed.all_reduce(rows, distributed.ReduceOp.MAX)
        part.seen = rows.bool()
    elif n and (part.keep_columns or n < part.d):
        part.columns = torch.cat([_broadcast(part, i, *extent, device) for i, extent in enumerate(extents)], dim=1)
    elif n:
        part.gram = part.outer if part.n else torch.zeros(part.d, part.d, dtype=torch.float64, device=device)
        part.columns = None
        distributed.all_reduce(part.gram)
    part.n = n


def _broadcast(part: Representation, rank: int, n: int, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """The columns (d, n) of the process of some rank."""
    if not n:
        return torch.empty(part.d, 0, device=device, dtype=torch.get_default_dtype() if dtype is None else dtype)
    mine = rank == distributed.get_rank()
    columns = part.held.contiguous() if mine else torch.empty(part.d, n, dtype=dtype, device=device)
    distributed.broadcast(columns, src=rank)
    return columns
