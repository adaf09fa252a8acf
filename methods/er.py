"""Experience Replay with reservoir sampling, ER-Res (Chaudhry et al. 2019, arXiv 1902.10486, Algorithm 1)."""

from __future__ import annotations

from torch import Tensor

from methods.parts.replay import Replay


class ER(Replay):
    """SGD on each batch B together with a batch B_M drawn from the memory: the mean loss over B ∪ B_M.

    loss = (Σ_B CE + Σ_{B_M} CE) / (|B| + |B_M|), replayed images through the heads of their tasks. On the first task
    there is nothing to replay.

    Differs: the paper learns from a stream seen once and stores as it goes, so its memory also holds the task at hand.
    Here tasks take many epochs, and the memory holds earlier tasks only (see Replay).
    """

    name, title, place = "er", "ER-Res", 6

    def loss(self, images: Tensor, labels: Tensor, t: int) -> Tensor:
        """The mean loss over the batch and what is replayed with it."""
        loss, n = super().loss(images, labels, t), len(labels)
        replayed, m = self.replayed_loss()
        return loss if replayed is None else (n * loss + m * replayed) / (n + m)
