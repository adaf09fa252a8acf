"""What a memory covers, costs and keeps, as reports for people: before the first task, and after training."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradproj.batches import Forward, in_eval_mode, masks, runner
from gradproj.errors import InputError
from gradproj.layers import Layer
from gradproj.layers.uses import Uses, plain_paths
from gradproj.normalization import is_normalization
from gradproj.representation import Gatherer, Mask, Representation, SeenRows
from gradproj.subspace import extend_basis

if TYPE_CHECKING:
    from gradproj.memory import GradientProjectionMemory

DECOMPOSED = 1024  # inputs of a layer up to which `inspect` decomposes what it sees
ROUNDINGS = 16  # a movement of so many roundings is still explained by them
HELD = 1e-5  # inputs of which no larger share is outside a basis are all inside, as single precision sees it


def table(memory: GradientProjectionMemory) -> str:
    """A memory as a table: for each subspace its layer's kind, d, k and share; then what is frozen or not protected."""
    sizes, columns = memory.input_sizes, memory.columns
    lines = [("layer", "kind", "d", "k", "share", "state")]
    for layer in memory.layers.values():
        for key in layer.keys:
            full = columns[key] == sizes[key]
            state = "full: learns no more" if full else "protected"
            share = f"{100 * columns[key] / sizes[key]:.0f} %"
            lines.append((key or "(model)", layer.kind, str(sizes[key]), str(columns[key]), share, state))
    names = set(memory.unprotected)
    modules = dict(memory.model.named_modules())
    for name, module in modules.items():
        own = [n for n, p in module.named_parameters(recurse=False) if p.requires_grad]
        left = [n for n in own if f"{name}.{n}".lstrip(".") in names]
        if left:
            lines.append((name or "(model)", type(module).__name__, "", "", "", f"not protected: {', '.join(left)}"))
        elif own and is_normalization(module):
            lines.append((name, type(module).__name__, "", "", "", "frozen from the second task on"))
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, the first being headings; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = [all(not c or c[0].isdigit() or c[0] in "-–" for c in column[1:]) for column in zip(*lines, strict=True)]
    rows = [
        "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([rows[0], "  ".join("-" * w for w in widths), *rows[1:]])


@dataclass(frozen=True)
class Check:
    """What a memory will do, as a look at one batch tells.

    Attributes:
        silent: layers that do not run; `update` refuses them, so exclude them.
        full: keys of layers that will have no free direction after a task like this.
        leaks: weights of protected layers that are also used otherwise, a phrase each.
        unprotected: parameters that are trained without protection.
        columns: by key, how many columns the batch gives.
        gigabytes: that matrices of inputs and bases take, at most.
        seconds: that an update with this batch takes, about.
    """

    silent: list[str]
    full: list[str]
    leaks: list[str]
    unprotected: list[str]
    columns: dict[str, int]
    gigabytes: float
    seconds: float
    layers: str = field(repr=False, default="")

    def __str__(self) -> str:
        lists = {
            "do not run, so exclude them": self.silent,
            "will be full after a task like this, and then learn no more": self.full,
            "used where no projection covers them": self.leaks,
            "trained without protection": self.unprotected,
        }
        said = [f"{what}: {', '.join(names)}" for what, names in lists.items() if names]
        cost = f"an update takes about {self.seconds:.1f} s and {self.gigabytes:.2f} GiB"
        return "\n".join([self.layers, *(said or ["every trained parameter is protected"]), cost])


def inspect(
    memory: GradientProjectionMemory, forward: Forward, batch: Any, thresholds: Mapping[str, float], mask: Mask | None
) -> Check:
    """Run a batch without learning from it; see `GradientProjectionMemory.check`."""
    gatherer = Gatherer(memory.layers)
    leaks: dict[str, None] = {}
    run = runner(forward, memory.model)

    def other(layer: Layer, function: str) -> None:
        leaks[f"the weight of {layer.name or 'the model'} is also used by {function}, which is not projected"] = None

    with in_eval_mode(memory.model):
        gatherer.run(run, batch, masks(mask, batch))
        with plain_paths(), torch.enable_grad(), Uses(memory.layers.values(), lambda *_: None, other):
            run(batch)
    silent = [name for name, layer in memory.layers.items() if not any(gatherer.columns[key] for key in layer.keys)]
    seen = {
        key: part
        for name, source in gatherer.sources.items()
        for key, part in zip(memory.layers[name].keys, source.parts, strict=True)
    }
    names = {key: name for name, layer in memory.layers.items() for key in layer.keys}
    full = [key for key, part in seen.items() if _will_be_full(memory.bases[key], part, thresholds[names[key]])]
    rate = products_per_second()
    matrices = {id(part): part for part in seen.values() if isinstance(part, Representation)}.values()
    work = sum(2 * p.d * p.n * min(p.d, p.n) + 10 * min(p.d, p.n) ** 3 for p in matrices)
    entries = sum(p.d * min(p.d, p.n) for p in matrices) + 3 * max((min(p.d, p.n) ** 2 for p in matrices), default=0)
    return Check(
        silent, full, list(leaks), memory.unprotected, gatherer.columns, 8 * entries / 2**30, work / rate, table(memory)
    )


def _will_be_full(basis: Tensor, seen: Representation | SeenRows, threshold: float) -> bool:
    if isinstance(seen, SeenRows):
        return bool(seen.seen.all())
    if seen.n < seen.d or seen.d > DECOMPOSED:
        return seen.n >= seen.d and threshold == 1
    return extend_basis(basis, seen, threshold).shape[1] == seen.d


def products_per_second() -> float:
    """Multiplications and additions of a float64 matrix product that this machine does in a second."""
    matrix = torch.ones(384, 384, dtype=torch.float64)
    matrix @ matrix
    began = time.perf_counter()
    matrix @ matrix
    return 2 * len(matrix) ** 3 / (time.perf_counter() - began)


@dataclass(frozen=True)
class Movement:
    """How far one layer has moved on some inputs, relative to its output W x there.

    Attributes:
        moved: ‖ΔW x‖ / ‖W x‖.
        inside: the part of that in the directions that the basis holds; rounding, if all is well.
        explained: what rounding of the weights, once a step, makes of that, about.
        outside: ‖R - M Mᵀ R‖ / ‖R‖, the share of the inputs that the basis does not hold.
    """

    moved: float
    inside: float
    explained: float
    outside: float


@dataclass(frozen=True)
class Verification:
    """How far a model has moved since it was last remembered.

    Attributes:
        moved: of the model's outputs on the batch, ‖Δy‖ / ‖y‖.
        explained: what rounding of the weights, once a step, and of the outputs makes of that, about.
        layers: by name.
        others: parameters without protection, and buffers, that have moved.
    """

    moved: float
    explained: float
    layers: dict[str, Movement]
    others: list[str]

    @property
    def holds(self) -> bool:
        """Whether nothing has moved that is remembered: what the bases hold of the inputs, and what has no basis."""
        still = not self.others and all(m.inside <= m.explained for m in self.layers.values())
        all_held = all(m.outside <= HELD for m in self.layers.values())
        return still and (self.moved <= self.explained or not all_held)

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("layer", "moved", "inside the basis", "of it rounding", "inputs outside")]
        for name, m in self.layers.items():
            lines.append((name or "(model)", *(f"{x:.1e}" for x in (m.moved, m.inside, m.explained, m.outside))))
        end = f"outputs moved by {self.moved:.1e} of themselves; rounding explains {self.explained:.1e}"
        others = [f"moved without protection: {', '.join(self.others)}"] if self.others else []
        verdict = "the guarantee holds" if self.holds else "the guarantee does NOT hold"
        if self.holds and self.moved > self.explained:
            verdict += ": what the bases hold has not moved; outputs moved by the inputs outside them"
        return "\n".join([aligned(lines), end, *others, verdict])


@torch.no_grad()
def verification(
    memory: GradientProjectionMemory,
    reference: Mapping[str, Tensor],
    steps: int,
    forward: Forward,
    batch: Any,
    mask: Mask | None,
) -> Verification:
    """Compare a model with what it was when it was last remembered; see `GradientProjectionMemory.verify`.

    Args:
        memory: of the model.
        reference: its trained parameters and its buffers as they were then.
        steps: that optimisers have taken since.
        forward, batch, mask: as in `verify`.
    """
    model = memory.model
    run, which = runner(forward, model), masks(mask, batch)
    there = current(model)
    grown = [name for name, value in reference.items() if name in there and there[name].shape != value.shape]
    reference = {name: value for name, value in reference.items() if name not in grown}
    now = {name: value.detach().clone() for name, value in there.items() if name in reference}
    names = {id(p): name for name, p in model.named_parameters()}
    covered = {names[id(p)] for layer in memory.layers.values() for p in layer.parameters if p is not None}
    if resized := [name for name in grown if name in covered]:
        raise InputError(f"{', '.join(resized)} had another shape when it was remembered, so nothing can be compared")
    changes = {
        name: [None if p is None else now[names[id(p)]] - reference[names[id(p)]].to(p) for p in layer.parameters]
        for name, layer in memory.layers.items()
    }
    generator = torch.Generator().manual_seed(0)
    trained = set(names.values())
    shaken = {n: _rounded(value, now[n], max(1, steps), generator) for n, value in reference.items() if n in trained}
    noise = {
        name: [None if p is None else shaken[names[id(p)]] - reference[names[id(p)]] for p in layer.parameters]
        for name, layer in memory.layers.items()
    }
    found: dict[str, Movement] = {}
    roundings: list[float] = []  # of one output, by what layers compute in

    def use(layer: Layer, function: Any, arguments: Mapping[str, Any]) -> None:
        roundings.append(torch.finfo(_computed_in(layer)).eps / 2)
        for inputs in layer.inputs(function, arguments):
            seen = layer.seen(inputs, function, arguments)
            movement = _movement(memory, layer, seen, changes[layer.name], noise[layer.name])
            if layer.name not in found or movement.moved > found[layer.name].moved:
                found[layer.name] = movement

    with in_eval_mode(model), plain_paths():
        after = list(outputs(run(batch), which))
        with put(model, reference):
            with Uses(memory.layers.values(), use):
                before = list(outputs(run(batch), which))
            with put(model, shaken):
                rounded = list(outputs(run(batch), which))
    length = norm(before) or 1.0
    moved = norm([a - b for a, b in zip(after, before, strict=True)]) / length
    by_weights = norm([a - b for a, b in zip(rounded, before, strict=True)]) / length
    explained = ROUNDINGS * max(by_weights, *roundings, 0.0)
    others = [n for n, v in now.items() if n not in covered and not torch.equal(v, reference[n].to(v))]
    others = [n for n in others if not n.endswith("num_batches_tracked")]
    others += [
        n for n, p in model.named_parameters() if p.requires_grad and n not in reference
    ]  # grown, or frozen then
    return Verification(moved, explained, found, others)


def _movement(
    memory: GradientProjectionMemory,
    layer: Layer,
    seen: Iterable[Mapping[str, Tensor]],
    change: Sequence[Tensor | None],
    noise: Sequence[Tensor | None],
) -> Movement:
    """Of one application of a layer, all its subspaces together.

    Args:
        memory: whose bases.
        layer: with the parameters as they were.
        seen: by it, block by block.
        change, noise: of weight and bias: how they have moved, and what rounding alone would have done.
    """
    parameters, delta, shaken = (
        [None if p is None else p.to(layer.device).double() for p in given]
        for given in (layer.parameters, change, noise)
    )
    moved, inside, rounding, whole, held, energy = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for block in seen:
        for key, columns in block.items():
            basis = memory.bases[key].to(columns.device)
            if basis.ndim == 1:  # an embedding: rows that were looked up
                assert parameters[0] is not None and delta[0] is not None and shaken[0] is not None
                looked_up = torch.isin(columns, basis)
                moved += delta[0][columns].square().sum().item()
                inside += delta[0][columns[looked_up]].square().sum().item()
                rounding += shaken[0][columns].square().sum().item()
                whole += parameters[0][columns].square().sum().item()
                held, energy = held + looked_up.sum().item(), energy + len(columns)
                continue
            columns = columns.double()
            part = basis @ (basis.T @ columns)
            moved += (_rows_of(layer, key, delta) @ columns).square().sum().item()
            inside += (_rows_of(layer, key, delta) @ part).square().sum().item()
            rounding += (_rows_of(layer, key, shaken) @ columns).square().sum().item()
            whole += (_rows_of(layer, key, parameters) @ columns).square().sum().item()
            held, energy = held + part.square().sum().item(), energy + columns.square().sum().item()
    outside = max(0.0, 1 - held / energy) ** 0.5 if energy else 0.0
    scale = whole**0.5 or 1.0
    return Movement(moved**0.5 / scale, inside**0.5 / scale, ROUNDINGS * rounding**0.5 / scale, outside)


def _computed_in(layer: Layer) -> torch.dtype:
    """The dtype of a layer's products at the moment, which under autocast is not that of its weights."""
    kind = layer.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else layer.dtype


def _rows_of(layer: Layer, key: str, parameters: Sequence[Tensor | None]) -> Tensor:
    """[W, b] of the group that a key names."""
    return layer.rows(*parameters).chunk(layer.groups)[layer.keys.index(key) % layer.groups]


def _rounded(value: Tensor, now: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """A tensor as so many roundings leave it: each entry off by half an ulp in a random direction, a step.

    Args:
        value: as it was.
        now: as it is; a rounding is of the larger of both.
        steps: how many roundings.
        generator: of the directions.
    """
    if not value.is_floating_point():
        return value
    size = torch.finfo(value.dtype).eps / 2 * steps**0.5
    noise = torch.empty(value.shape).uniform_(-1, 1, generator=generator).double()
    noise *= size * torch.maximum(value.abs(), now.abs().to(value)).double()
    return (value.double() + noise).to(value.dtype)


def current(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


@contextmanager
def put(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this context some of a model's parameters and buffers have other values."""
    places = {name: tensor for name, tensor in current(model).items() if name in values}
    before = {name: tensor.detach().clone() for name, tensor in places.items()}
    try:
        for name, tensor in places.items():
            tensor.data.copy_(values[name])
        torch.clear_autocast_cache()  # of casts of the other values
        yield
    finally:
        for name, tensor in places.items():
            tensor.data.copy_(before[name])
        torch.clear_autocast_cache()


def outputs(result: Any, mask: Tensor | None) -> Iterator[Tensor]:
    """The floating-point tensors in what a forward returns, where the mask says that they count."""
    if isinstance(result, Tensor):
        if result.is_floating_point():
            axes = mask is not None and mask.shape == result.shape[: mask.ndim]
            yield result[mask].double() if axes else result.double()
    elif isinstance(result, Mapping):
        for part in result.values():
            yield from outputs(part, mask)
    elif isinstance(result, (list, tuple)):
        for part in result:
            yield from outputs(part, mask)


def norm(tensors: Sequence[Tensor]) -> float:
    """The length of some tensors together."""
    return sum(t.square().sum().item() for t in tensors) ** 0.5 or 0.0
