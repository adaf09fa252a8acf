"""How the bases of all layers grow by what was gathered of a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from gradproj.errors import InputError
from gradproj.layers import Layer
from gradproj.representation import Representation, SeenRows
from gradproj.subspace import RankRule, extend_basis, held_energy


def grown(
    layers: Iterable[Layer],
    bases: Mapping[str, Tensor],
    gathered: Mapping[str, Representation | SeenRows],
    thresholds: Mapping[str, float],
    rank_rule: RankRule,
    *,
    fast: bool = False,
    max_columns: int | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """New bases by key, and what `max_columns` leaves out of them, as sentences.

    Layers that share what they have seen, the basis and ε share the new basis too.

    Args:
        layers: the memory's.
        bases: theirs so far, by key.
        gathered: of the task, by key, of some of them.
        thresholds: ε by layer name.
        rank_rule, fast, max_columns: as for `extend_basis`.
    """
    epsilons = {key: thresholds[layer.name] for layer in layers for key in layer.keys}
    shared: dict[tuple, Tensor] = {}
    new: dict[str, Tensor] = {}
    losses: list[str] = []
    for key, seen in gathered.items():
        basis, epsilon = bases[key], epsilons[key]
        if isinstance(seen, SeenRows):
            rows = seen.seen.clone()
            rows[basis.to(rows.device)] = True
            new[key] = rows.nonzero()[:, 0]
            continue
        same = (id(seen), basis.data_ptr(), basis.shape[1], epsilon)
        if same not in shared:
            shared[same] = extend_basis(basis, seen, epsilon, rank_rule, fast=fast, max_columns=max_columns)
            k = shared[same].shape[1]
            if max_columns is not None and k >= max_columns and (held := held_energy(shared[same], seen)) < epsilon:
                losses.append(f"{key} has {k} columns, the most allowed; they hold {held:.4f} of its inputs' energy")
        new[key] = shared[same]
    return new, losses


def thresholds_by_layer(given: float | Mapping[str, float], layers: Iterable[str]) -> dict[str, float]:
    """ε of each layer, from one for all or one by name.

    Raises:
        InputError: names differ from the layers', or a value is no number in (0, 1].
    """
    names = list(layers)
    values = dict(given) if isinstance(given, Mapping) else dict.fromkeys(names, given)
    if values.keys() != set(names):
        wrong = ", ".join(sorted(values.keys() ^ set(names)))
        raise InputError(f"threshold differs from the layers in {wrong}; the layers are: {', '.join(names)}")
    try:
        numbers = {name: float(number) for name, number in values.items()}
    except (TypeError, ValueError) as error:
        raise InputError(f"threshold is {given!r}; it must be a number, or one by layer name") from error
    for number in numbers.values():
        if not 0 < number <= 1:
            raise InputError(f"threshold is {number}; it must be in (0, 1]")
    return numbers
