"""One memory for all processes of a group: what each has seen is added up."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import distributed

from gradproj.representation import Representation, SeenRows


def summed(gathered: Mapping[str, Representation | SeenRows]) -> dict[str, Representation | SeenRows]:
    """What all processes have gathered together, by key; as it is where there is one process.

    A sum of R Rᵀ over processes is that of all their samples, so each comes to the same bases.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return dict(gathered)
    done: set[int] = set()  # layers may share what they see
    for seen in gathered.values():
        if id(seen) in done:
            continue
        done.add(id(seen))
        if isinstance(seen, SeenRows):
            rows = seen.seen.to(torch.uint8)
            distributed.all_reduce(rows, distributed.ReduceOp.MAX)
            seen.seen = rows.bool()
        else:
            seen.gram = _sum(seen.outer)
            seen.columns = None
        seen.n = int(_sum(torch.tensor(seen.n, device=seen.device)))
    return dict(gathered)


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    distributed.all_reduce(tensor)
    return tensor
