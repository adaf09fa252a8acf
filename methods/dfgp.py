"""Data Augmented Flatness-aware Gradient Projection (Yang, Shen, Wang, Liu, Wang and Tao, ICCV 2023)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Beta
from torch.nn import functional as F

from engine.options import flag
from methods.gpm import GPM
from methods.parts.perturbation import computing_with, of_length


class DFGP(GPM):
    """GPM whose steps look for flat minima, in the weights and in how images are mixed.

    Each image is mixed with another of its batch, x̃_i = (1 - λ_i) x_i + λ_i x_π(i), λ_i ~ Beta(a, a), and the loss is

        L = mean CE(x_i, y_i) + γ mean [(1 - λ_i) CE(x̃_i, y_i) + λ_i CE(x̃_i, y_π(i))].

    A step computes gradients twice. At the weights w they show the way uphill: λ ← λ + ρ ∇_λ L / ‖∇_λ L‖, clipped to
    [0, 1], where ∇_λ goes through x̃ only, and e = ρ ∇_w L / ‖∇_w L‖ over all parameters. The second ones, at w + e with
    the new λ, are projected as in GPM and stepped on from w.

    a, γ and ε are the paper's; CIFAR-100 superclass, which it does not have, takes a and γ of 10-split CIFAR-100. The
    released code exchanges the weights of the two labels (docs/differences.md).

    Stores what GPM does.
    """

    name, title, place = "dfgp", "DFGP", 12
    flags = {
        "dfgp_beta": flag(20.0, "a of the Beta distribution of λ; the larger, the nearer λ is to 1/2", above=0),
        "dfgp_gamma": flag(0.1, "γ, weight of the loss on mixed images", minimum=0),
        "dfgp_rho": flag(0.05, "ρ, length of the steps uphill, in the weights and in λ", minimum=0),
    }
    defaults = {
        "pmnist": {"threshold": (0.94, 0.99, 0.99)},
        "cifar100": {"threshold": (0.95,), "threshold_step": 0.0},
        "five_datasets": {"threshold": (0.95,), "dfgp_beta": 1.0, "dfgp_gamma": 1e-4},
        "miniimagenet": {"threshold": (0.97,), "threshold_step": 0.0, "dfgp_gamma": 0.01},
    }
    plain_step, graph_step, embeddings = False, True, False

    def backward(self, images: Tensor, labels: Tensor, t: int) -> Tensor:
        parameters, rho = self.parameters(t), self.options.dfgp_rho
        partner = torch.rand(len(labels), device=labels.device).argsort()  # π
        concentration = images.new_full((len(labels),), self.options.dfgp_beta)
        mixing = Beta(concentration, concentration, validate_args=False).sample().requires_grad_()  # λ
        with self.memory.raw():
            loss = self.mixed_loss(images, labels, t, mixing, partner)
            uphill, *ascent = torch.autograd.grad(loss, [mixing, *parameters], allow_unused=True)
        mixing = (mixing.detach() + of_length([uphill], rho)[0]).clamp(0, 1)
        ascent = zip(parameters, of_length(ascent, rho), strict=True)
        with computing_with(self.model, {p: p + e for p, e in ascent if e is not None}):
            self.mixed_loss(images, labels, t, mixing, partner).backward()
        return loss.detach()

    def mixed_loss(self, images: Tensor, labels: Tensor, t: int, mixing: Tensor, partner: Tensor) -> Tensor:
        """L, with λ constant where it weighs labels."""
        share = mixing.view(-1, *[1] * (images.ndim - 1))
        with self.precision(images.device):
            mixed = self.model((1 - share) * images + share * images[partner], t)
            own, others = (F.cross_entropy(mixed, y, reduction="none") for y in (labels, labels[partner]))
            weight = mixing.detach()
            return (
                self.loss(images, labels, t) + self.options.dfgp_gamma * ((1 - weight) * own + weight * others).mean()
            )
