"""Whether a model still does what it did when it was remembered, as a report for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradproj.batches import Forward, Mask, in_eval_mode, masks, runner
from gradproj.distributed import checksum
from gradproj.errors import InputError
from gradproj.inspection import Memory, aligned
from gradproj.layers import Layer, kept_modules
from gradproj.layers.uses import Uses, plain_paths, read_inputs
from gradproj.projection import size
from gradproj.snapshot import Snapshot, current, difference, parameter_names

ROUNDINGS = 16  # a movement of so many roundings is still explained by them
LEAK = 1e-3  # of a layer's movement; rounding puts less into a basis
HELD = 1e-5  # inputs of which no larger share is outside a basis are all inside, as single precision sees it


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
        others: parameters without protection, and buffers, that have moved or come since, and on which these outputs
            depend.
        unknown: those of them whose old values were not kept, so that `moved` leaves them out.
    """

    moved: float
    explained: float
    layers: dict[str, Movement]
    others: list[str]
    unknown: list[str] = field(default_factory=list)

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
        if self.unknown:  # the output is compared with one that has them as they are now
            end += f"; not counted is what comes of {', '.join(self.unknown)}"
        others = [f"moved, or new, without protection: {', '.join(self.others)}"] if self.others else []
        verdict = "the guarantee holds" if self.holds else "the guarantee does NOT hold"
        if self.holds and self.moved > self.explained:
            verdict += ": what the bases hold has not moved; outputs moved by the inputs outside them"
        return "\n".join([aligned(lines), end, *others, verdict])


@torch.no_grad()
def verification(memory: Memory, snapshot: Snapshot, forward: Forward, batch: Any, mask: Mask | None) -> Verification:
    """Compare a model with what it was when it was last remembered; see `GradientProjectionMemory.verify`.

    Args:
        memory: of the model.
        snapshot: of it then.
        forward, batch, mask: as in `verify`.
    """
    model, layers, names = memory.model, memory.layers, parameter_names(memory.model)
    there, resized = current(model), snapshot.resized(model)
    covered = {names[id(p)] for layer in layers.values() for p in layer.parameters if p is not None}
    if wrong := [name for name in resized if name in covered]:
        raise InputError(f"{', '.join(wrong)} had another shape when it was remembered, so nothing can be compared")
    before = {name: value for name, value in snapshot.values.items() if name not in resized}
    now = {name: value.detach().clone() for name, value in there.items() if name in before}
    rounded = _as_rounded({name: before[name] for name in names.values() if name in before}, now, snapshot.steps)
    movements = _Movements(
        memory,
        changes={name: difference(layer, names, now, before) for name, layer in layers.items()},
        noise={name: difference(layer, names, rounded, before) for name, layer in layers.items()},
    )
    result = _repeatable(runner(forward, model), batch, masks(mask, batch), there.values())

    def matters(names: Sequence[str]) -> bool:
        with put(model, {name: before.get(name, torch.zeros(())) for name in names}):
            pairs = zip(result(), new, strict=True)
            return any(a.shape != b.shape or bool(_apart(a, b).any()) for a, b in pairs)

    others = [name for name, v in now.items() if name not in covered and not torch.equal(v, before[name].to(v))]
    others = [name for name in others if not name.endswith("num_batches_tracked")]
    changed = [name for name, known in snapshot.checksums.items() if name in there and checksum(there[name]) != known]
    unknown = [*changed, *(name for name in there if name not in snapshot.values and name not in snapshot.checksums)]
    others += unknown
    with in_eval_mode(model), plain_paths():
        new = result()
        with put(model, before):
            with Uses(layers.values(), movements):
                old = result()
            with put(model, rounded):
                shaken = result()
        others = [*_those_that(matters, others), *resized]
    if not old:
        raise InputError("forward returns no floating-point tensors to compare; give a function that returns some")
    length = size(map(_finite, old)) or 1.0
    moved, by_weights = (size([_apart(a, b) for a, b in zip(y, old, strict=True)]) / length for y in (new, shaken))
    explained = ROUNDINGS * max(by_weights, *movements.roundings, 0.0)
    return Verification(moved, explained, movements.found, others, [n for n in others if n in {*unknown, *resized}])


@dataclass
class _Movements:
    """How far each layer has moved, measured while the network runs as it was (`Uses`).

    Attributes:
        memory: whose bases.
        changes, noise: by layer name, of weight and bias: how they have moved, and what rounding alone would have done.
        found: by layer name; of a layer that is applied several times, where it moved most.
        roundings: of one output, by what layers compute in.
    """

    memory: Memory
    changes: Mapping[str, Sequence[Tensor | None]]
    noise: Mapping[str, Sequence[Tensor | None]]
    found: dict[str, Movement] = field(default_factory=dict)
    roundings: list[float] = field(default_factory=list)

    def __call__(self, layer: Layer, function: Any, arguments: Mapping[str, Any]) -> None:
        self.roundings.append(torch.finfo(_computed_in(layer)).eps / 2)
        for inputs in read_inputs(layer, function, arguments):
            seen = layer.seen(inputs, function, arguments)
            movement = _movement(self.memory, layer, seen, self.changes[layer.name], self.noise[layer.name])
            if layer.name not in self.found or movement.moved > self.found[layer.name].moved:
                self.found[layer.name] = movement


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """a - b, where infinities that are the same, as of classes that are masked out, and NaNs in both are no
    difference."""
    return torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b)


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0)


def _repeatable(
    run: Callable[[Any], Any], batch: Any, mask: Tensor | None, tensors: Iterable[Tensor]
) -> Callable[[], list[Tensor]]:
    """A forward on a batch that draws the same random numbers each time, on the devices of some tensors."""
    devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})

    def result() -> list[Tensor]:
        with torch.random.fork_rng(devices):
            return list(outputs(run(batch), mask))

    return result


@torch.no_grad()
def what_moved(memory: Memory, layers: Iterable[Layer], snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    """What is no longer as it was remembered, although training under protection leaves it so: names, with a phrase.

    Args:
        memory: whose bases.
        layers: whose gradients were made orthogonal to them.
        snapshot: of the model when it was remembered.
    """
    there, unprotected = current(memory.model), set(memory.unprotected)
    names, resized = parameter_names(memory.model), snapshot.resized(memory.model)
    for layer in layers:
        parameters = layer.parameters
        if any(names.get(id(p)) in {None, *resized} for p in parameters if p is not None):
            continue  # replaced since, which `protect` and `verify` refuse when they come to it
        moved = difference(layer, names, there, snapshot.values)
        explained = _explained(layer, parameters, snapshot.steps)
        for key in layer.keys:
            inside, length = (x.item() for x in layer.inside(key, memory.bases[key].to(layer.device), *moved))
            if inside > max(LEAK * length, explained):
                share = f"{100 * inside / length:.3g} % of the movement of {key or 'the model'}"
                yield layer.name, f"{share} is in remembered directions"
    kept = kept_modules(memory.model, memory.exclude, memory.include)
    protected = {id(p) for layer in memory.layers.values() for p in layer.parameters}
    for name, value in there.items():
        owner = name.rpartition(".")[0]
        own_statistics = name not in names.values() and hasattr(kept.get(owner), "track_running_stats")
        if owner not in kept or id(value) in protected or name in unprotected or own_statistics:
            continue
        known = snapshot.values.get(name)
        if name in snapshot.checksums and checksum(value) != snapshot.checksums[name]:
            yield name, f"{name} has changed, which was not trained"
        elif known is not None and name not in resized and not torch.equal(value, known.to(value)):
            yield name, f"{name} has changed"


def _those_that(matters: Callable[[Sequence[str]], bool], names: Sequence[str]) -> list[str]:
    """The names that matter by themselves, found by halves."""
    if not names or not matters(names):
        return []
    if len(names) == 1:
        return list(names)
    half = len(names) // 2
    return [name for part in (names[:half], names[half:]) for name in _those_that(matters, part)]


def _explained(layer: Layer, parameters: Sequence[Tensor | None], steps: int) -> float:
    """How far so many roundings move a layer's weights, about."""
    length = size([p for p in parameters if p is not None])
    return ROUNDINGS * torch.finfo(layer.dtype).eps / 2 * max(1, steps) ** 0.5 * length


@torch.no_grad()
def leaks(memory: Memory, before: Mapping[str, Tensor]) -> dict[str, float | None]:
    """How much of the weights' movement lies in protected directions; see `GradientProjectionMemory.leak`."""
    names, now = parameter_names(memory.model), current(memory.model)
    ratios: dict[str, float | None] = {}
    for layer in memory.layers.values():
        moved = difference(layer, names, now, before)
        weights = size([p for p in layer.parameters if p is not None])
        for key in layer.keys:
            inside, length = (x.item() for x in layer.inside(key, memory.bases[key].to(layer.device), *moved))
            still = length <= 2 * torch.finfo(layer.dtype).eps * weights
            ratios[key] = None if still else inside / length
    return ratios


def _movement(
    memory: Memory,
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
    weights, delta, shaken = (
        [None if p is None else p.to(layer.device).double() for p in given]
        for given in (layer.parameters, change, noise)
    )
    found: list[Squares] = []
    for block in seen:
        for key, columns in block.items():
            basis = memory.bases[key].to(columns.device)
            if basis.ndim == 1:  # an embedding
                found.append(_of_looked_up(columns, basis, weights[0], delta[0], shaken[0]))
            else:
                matrices = (_rows_of(layer, key, parameters) for parameters in (weights, delta, shaken))
                found.append(_of_columns(columns.double(), basis, *matrices))
    total = Squares(*map(sum, zip(*found, strict=True))) if found else Squares(0, 0, 0, 0, 0, 0)
    outside = max(0.0, 1 - total.held / total.inputs) ** 0.5 if total.inputs else 0.0
    scale = total.outputs**0.5 or 1.0
    moved, inside, rounding = (x**0.5 / scale for x in (total.moved, total.inside, total.rounding))
    return Movement(moved, inside, ROUNDINGS * rounding, outside)


class Squares(NamedTuple):
    """Of some inputs X, with what rounding alone makes of ΔW as N: ‖W X‖², ‖ΔW X‖², ‖ΔW M Mᵀ X‖², ‖N X‖², ‖X‖² and
    ‖M Mᵀ X‖²."""

    outputs: float
    moved: float
    inside: float
    rounding: float
    inputs: float
    held: float


def _of_columns(X: Tensor, M: Tensor, W: Tensor, change: Tensor, noise: Tensor) -> Squares:
    held = M @ (M.T @ X)
    return Squares(*map(_square, (W @ X, change @ X, change @ held, noise @ X, X, held)))


def _of_looked_up(rows: Tensor, known: Tensor, W: Any, change: Any, noise: Any) -> Squares:
    """Of an embedding, whose inputs are unit vectors: all rows looked up, and the known ones among them."""
    held = rows[torch.isin(rows, known)]
    moved, inside = _square(change[rows]), _square(change[held])
    return Squares(_square(W[rows]), moved, inside, _square(noise[rows]), len(rows), len(held))


def _square(x: Tensor) -> float:
    return x.square().sum().item()


def _computed_in(layer: Layer) -> torch.dtype:
    """The dtype of a layer's products at the moment, which under autocast is not that of its weights."""
    kind = layer.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else layer.dtype


def _rows_of(layer: Layer, key: str, parameters: Sequence[Tensor | None]) -> Tensor:
    """[W, b] of the group that a key names."""
    return layer.rows(*parameters).chunk(layer.groups)[layer.keys.index(key) % layer.groups]


def _as_rounded(before: Mapping[str, Tensor], now: Mapping[str, Tensor], steps: int) -> dict[str, Tensor]:
    """Parameters as so many steps leave them by rounding alone: each entry off by half an ulp in a random direction.

    Args:
        before: as they were, by name.
        now: as they are; a rounding is of the larger of both.
        steps: how many roundings.
    """
    generator = torch.Generator().manual_seed(0)
    rounded = {}
    for name, value in before.items():
        rounded[name] = value
        if value.is_floating_point():
            size = torch.finfo(value.dtype).eps / 2 * max(1, steps) ** 0.5
            noise = torch.empty(value.shape).uniform_(-1, 1, generator=generator).double()
            noise *= size * torch.maximum(value.abs(), now[name].abs().to(value)).double()
            rounded[name] = (value.double() + noise).to(value.dtype)
    return rounded


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
        if result.is_complex():
            yield from outputs(torch.view_as_real(result), mask)
        if result.is_floating_point():
            axes = mask is not None and mask.shape == result.shape[: mask.ndim]
            yield result[mask].double() if axes else result.double()
    elif isinstance(result, Mapping):
        for part in result.values():
            yield from outputs(part, mask)
    elif isinstance(result, (list, tuple)):
        for part in result:
            yield from outputs(part, mask)
    elif is_dataclass(result):
        yield from outputs([getattr(result, field.name) for field in fields(result)], mask)
