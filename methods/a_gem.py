"""Averaged Gradient Episodic Memory (Chaudhry et al., ICLR 2019, arXiv 1812.00420, Eqs. 10-11)."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.parts.replay import Replay


class AGEM(Replay):
    """SGD whose steps do not raise, to first order, the loss on a batch drawn from the memory.

    With g the gradient of the batch and g_ref that of the replayed batch, both over all parameters:
    g ← g if gᵀ g_ref ≥ 0, else g - (gᵀ g_ref / g_refᵀ g_ref) g_ref (Eq. 11).

    Differs: the paper learns from a stream seen once; here tasks take many epochs, and the memory is filled at the end
    of each (see Replay).

    By default 256 images are replayed, the paper's number for permuted MNIST: with the 10 images of a training batch
    g_ref is so noisy that most conflicts go unseen.
    """

    name, title, place = "a_gem", "A-GEM", 5
    defaults = {"replay_batch": 256}

    def backward(self, images: Tensor, labels: Tensor, t: int) -> Tensor:
        mean_loss = super().backward(images, labels, t)
        with self.precision(images.device):
            replayed, _ = self.replayed_loss()
        if replayed is None:
            return mean_loss
        parameters = self.parameters(t)
        reference = torch.autograd.grad(replayed, parameters, allow_unused=True)  # leaves .grad as it is
        pairs = [(p, r) for p, r in zip(parameters, reference, strict=True) if r is not None]
        product = sum((p.grad * r).sum() for p, r in pairs if p.grad is not None)
        # No conflict, no change: the factor is zero then. An `if` would wait for the device at every step.
        factor = (product / sum(r.square().sum() for _, r in pairs)).clamp(max=0).nan_to_num()
        for p, r in pairs:
            p.grad = -factor * r if p.grad is None else p.grad - factor * r
        return mean_loss
