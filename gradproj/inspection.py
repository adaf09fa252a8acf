"""What a memory covers and will cost, as reports for people."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradproj.batches import Forward, Mask, in_eval_mode, masks, runner
from gradproj.errors import InputError
from gradproj.gatherer import Gatherer
from gradproj.layers import Layer
from gradproj.normalization import is_normalization
from gradproj.representation import Representation, SeenRows
from gradproj.subspace import extend_basis

DECOMPOSED = 1024  # inputs of a layer up to which `inspect` decomposes what it sees


class Memory(Protocol):
    """What reports need of a GradientProjectionMemory."""

    model: nn.Module
    layers: dict[str, Layer]
    bases: dict[str, Tensor]
    exclude: list[str | nn.Module]
    include: list[str | nn.Module] | None
    n_updates: int

    @property
    def columns(self) -> dict[str, int]: ...

    @property
    def input_sizes(self) -> dict[str, int]: ...

    @property
    def unprotected(self) -> list[str]: ...


def refuse_changed(memory: Memory, modules: Mapping[str, nn.Module]) -> None:
    """Raise InputError where the protected layers are no longer what they were when the memory was made.

    Args:
        memory: whose layers.
        modules: theirs, as they were, by name.
    """
    current = dict(memory.model.named_modules())
    replaced = [name for name, module in modules.items() if current.get(name) is not module]
    if replaced:
        raise InputError(
            f"module {', '.join(replaced)} was replaced since this memory was made, and the new one is not protected; "
            "make a new memory (load_state_dict gives it these bases)"
        )
    trained = {id(p) for p in memory.model.parameters()}
    made = [
        n for n, layer in memory.layers.items() if any(p is not None and id(p) not in trained for p in layer.parameters)
    ]
    if made:
        raise InputError(
            f"the weight of {', '.join(made)} is no parameter of the model any more, but made of others (weight_norm, "
            "prune or the like); make a new memory"
        )
    for key, d in memory.input_sizes.items():
        if (basis := memory.bases[key]).ndim == 2 and len(basis) != d:
            raise InputError(
                f"layer {key} has {d} inputs, but had {len(basis)} when this memory was made; make a new one"
            )


def table(memory: Memory) -> str:
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
        gigabytes: that matrices of inputs, bases and the copy that `verify` compares with take, about.
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


def inspect(memory: Memory, forward: Forward, batch: Any, thresholds: Mapping[str, float], mask: Mask | None) -> Check:
    """Run a batch without learning from it; see `GradientProjectionMemory.check`."""
    gatherer = Gatherer(memory.layers, unit=[name for name, epsilon in thresholds.items() if epsilon == 1])
    with in_eval_mode(memory.model):
        gatherer.run(runner(forward, memory.model), batch, masks(mask, batch))
    seen = gatherer.seen
    names = {key: name for name, layer in memory.layers.items() for key in layer.keys}
    full = [key for key, part in seen.items() if _will_be_full(memory.bases[key], part, thresholds[names[key]])]
    rate = products_per_second()
    matrices = {id(part): part for part in seen.values() if isinstance(part, Representation)}.values()
    work = sum(2 * p.d * p.n * min(p.d, p.n) + 10 * min(p.d, p.n) ** 3 for p in matrices)
    # What is gathered, as much again for the bases at most, and the workspace of the largest decomposition.
    entries = sum(2 * p.d * min(p.d, p.n) for p in matrices) + 3 * max(
        (min(p.d, p.n) ** 2 for p in matrices), default=0
    )
    kept = [p for p in memory.model.parameters() if p.requires_grad] + list(memory.model.buffers())
    size = 8 * entries + sum(tensor.numel() * tensor.element_size() for tensor in kept)  # `verify` compares with these
    return Check(
        gatherer.silent,
        full,
        [leak for _, leak in gatherer.leaks],
        memory.unprotected,
        gatherer.columns,
        size / 2**30,
        work / rate,
        table(memory),
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
