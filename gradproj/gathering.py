"""Gathering what layers see of a task, in one pass over its batches or in as many as their matrices need."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from gradproj.batches import Forward, Mask, as_batches, in_eval_mode, masks, runner
from gradproj.distributed import all_or_none, check_same_model, merge, refuse_sharded
from gradproj.errors import DivergenceError, InputError
from gradproj.gatherer import Gatherer
from gradproj.layers import Layer
from gradproj.representation import Representation, SeenRows


def gather(
    gatherer: Gatherer, model: nn.Module, forward: Forward, batches: Iterable[Any], mask: Mask | None = None
) -> dict[str, Representation | SeenRows]:
    """Run batches through a model in eval mode and gather what its layers see, together with the other processes.

    Args:
        gatherer: of the layers, with nothing gathered; it then also knows where their weights are applied.
        model: that the layers are of.
        forward: called once with each batch.
        batches: what `forward` takes.
        mask: which positions count.
    Returns:
        one Representation, or the rows seen, for each key of each layer; layers that see the same share one.
    Raises:
        InputError: there were no batches, layers did not run, or a process failed.
        DivergenceError: a layer's inputs are infinite or NaN.
    """
    refuse_sharded(model)
    check_same_model(model)
    n_batches, run = 0, runner(forward, model)
    with all_or_none(), in_eval_mode(model):
        for batch in batches:
            gatherer.run(run, batch, masks(mask, batch))
            n_batches += 1
    if not merge(gatherer, n_batches, model):
        raise InputError("there are no batches to read representations from; give at least one")
    if silent := gatherer.silent:
        raise InputError(
            f"layer{'s' if len(silent) > 1 else ''} {', '.join(silent)} did not run in the forward pass, or not in a "
            f"known way (check() says so), so what {'they see' if len(silent) > 1 else 'it sees'} is unknown: "
            "exclude what does not run, or give images; exclude and freeze what is used otherwise, or it may forget"
        )
    for key, part in gatherer.seen.items():
        if not part.is_finite:
            raise DivergenceError(
                f"the inputs of layer {key} are infinite or NaN: the network has diverged, or the data are"
            )
    return gatherer.seen


def passes(
    layers: Mapping[str, Layer],
    model: nn.Module,
    forward: Forward,
    batches: Any,
    samples: Mapping[str, int] | None,
    mask: Mask | None,
    max_memory: int,
    unit: Collection[str] = (),
) -> Iterator[tuple[dict[str, Layer], Iterable[Any]]]:
    """Which layers to gather in each pass over the batches, so that their matrices fit, and the batches.

    Args:
        layers: by name.
        model, forward, batches, samples, mask, max_memory: as in `GradientProjectionMemory.update`.
        unit: as for the Gatherer.
    Raises:
        InputError: the batches can run only once and would have to run more often.
    """
    batches = as_batches(batches)
    need = {name: sum(8 * d * d for d in layer.sizes.values()) for name, layer in layers.items()}
    if sum(need.values()) <= max_memory:
        yield dict(layers), batches
        return
    gatherer = Gatherer(layers, samples, count_only=True, unit=unit)
    with all_or_none(), in_eval_mode(model):
        first = next(iter(batches), None)
        if first is not None:
            gatherer.run(runner(forward, model), first, masks(mask, first))
    merge(gatherer, 1, model)
    shares = {id(source): source for source in gatherer.sources.values()}
    groups = [source.members for source in shares.values()]
    groups += [[name] for name in layers if name not in gatherer.sources]  # they did not run, as will be said
    found = filled([(members, need[members[0]]) for members in groups], max_memory)
    if len(found) > 1 and iter(batches) is batches:
        total = sum(need[members[0]] for members in groups) / 2**30
        raise InputError(
            f"the layers' inputs need {total:.1f} GiB, so the batches must run {len(found)} times, but they can "
            "run only once: give a list or a DataLoader, or a larger max_memory"
        )
    if iter(batches) is batches:
        raise InputError("max_memory is so small that batches must run twice; give a list or a DataLoader")
    for names in found:
        yield {name: layers[name] for name in names}, batches


def filled(groups: Iterable[tuple[list[str], int]], room: int) -> list[list[str]]:
    """The layers of each pass, in their order.

    Args:
        groups: layers that share a matrix, and the bytes it needs.
        room: bytes for each pass; a group that needs more has a pass to itself.
    """
    passes: list[list[str]] = [[]]
    left = room
    for members, need in groups:
        if passes[-1] and need > left:
            passes.append([])
            left = room
        passes[-1] += members
        left -= need
    return passes
