"""Seeds for every random choice of a run, each from what it is for, so that a run can be continued anywhere."""

from __future__ import annotations

import hashlib

import torch


def derived_seed(seed: int, *purpose: int | str) -> int:
    """A seed in [0, 2⁶³) that depends on the run's seed and on what it is for, such as ("epoch", task, epoch)."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *purpose: int | str) -> torch.Generator:
    """A CPU generator seeded by `derived_seed`: the same choices on every device."""
    return torch.Generator().manual_seed(derived_seed(seed, *purpose))


def random_order(labels: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """The places of some images in random order, on the device of their labels.

    Args:
        labels: (n,) theirs.
        random: a CPU generator.
    """
    return torch.randperm(len(labels), generator=random).to(labels.device)
