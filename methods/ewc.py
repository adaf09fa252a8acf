"""Elastic Weight Consolidation (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796, Eq. 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.method import Method
from engine.options import Options, flag
from engine.seeds import generator, random_order
from engine.task import Split, Task, batches

BATCH = 64  # images whose scores are summed before squaring; any number gives the same expectation


class EWC(Method):
    """SGD with a spring on every shared weight, as stiff as the old tasks' Fisher information.

    loss = CE + λ/2 Σ_i F_i (θ_i - θ*_i)², F = Σ_t F_t, where θ* are the weights after the last task and F_t is the
    diagonal of task t's Fisher information, the mean of (∂ log p(y | x) / ∂θ_i)² over training images x and labels y
    drawn from the network's own p(· | x).

    One penalty around the last weights, not one around each task's: the last weights are the mode of the posterior
    given all tasks so far, earlier penalties included, which separate penalties would count twice and so pull a task
    that has just been learned back out of the network (Huszár, arXiv 1712.03847). Heads have no penalty: each belongs
    to one task.

    A plain SGD step on the penalty overshoots where lr · λ · F > 2, which the stiffest weights reach at useful λ. So
    the penalty is stepped implicitly, as argmin_θ gᵀθ + λ/2 F (θ - θ*)² + |θ - θ_now|² / (2 lr) with the gradient g of
    CE: both gradients are divided by 1 + lr λ F. It stops at the same point, is the plain step where lr · λ · F is
    small, and is stable for any λ.

    λ was found on permuted MNIST (10) and on 10-split CIFAR-100 (100). Code that squares the gradient of a batch's mean
    loss has a Fisher smaller by about the batch size, and so a larger λ: its usual 5000 at batches of 64 is about 80
    here.

    Stores F and θ*: two floats for each shared weight.
    """

    name, title, place = "ewc", "EWC", 4
    flags = {
        "ewc_lambda": flag(10.0, "weight λ of the penalty λ/2 Σ F (θ - θ*)², with F the Fisher of one image", minimum=0)
    }
    defaults = {"cifar100": {"ewc_lambda": 100.0}}
    state = ("fisher", "center")

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        shared = {id(p) for p in self.trainable([])}
        self.shared = {name: p for name, p in model.named_parameters() if id(p) in shared}
        self.fisher: dict[str, Tensor] = {}  # F
        self.center: dict[str, Tensor] = {}  # θ*

    def backward(self, images: Tensor, labels: Tensor, t: int) -> Tensor:
        """Add the penalty's gradient, λ F (θ - θ*), and shorten the step to the implicit one."""
        loss = super().backward(images, labels, t)
        with torch.no_grad():
            for name in self.fisher:
                p = self.shared[name]
                if p.grad is not None:
                    stiffness = self.options.ewc_lambda * self.fisher[name]
                    p.grad.addcmul_(stiffness, p - self.center[name]).div_(1 + self.lr * stiffness)
        return loss

    def after_task(self, t: int, task: Task) -> None:
        """Add the task's Fisher information; its weights are the ones to stay near."""
        new = self.fisher_diagonal(t, task.train)
        self.fisher = {name: value + self.fisher[name] if t else value for name, value in new.items()}
        self.center = {name: p.detach().clone() for name, p in self.shared.items()}

    def fisher_diagonal(self, t: int, train: Split) -> dict[str, Tensor]:
        """F_t by parameter name.

        With y drawn from the network itself, scores are independent with mean zero, so E[(Σ_{n ∈ batch} score_n)²] is
        the sum over the batch of E[score²]: one backward pass for a batch serves as one for each image.
        """
        self.model.eval()
        random = generator(self.options.seed, "fisher", t)
        order = random_order(train.labels, random)
        fisher = {name: torch.zeros_like(p) for name, p in self.shared.items()}
        for start, stop in batches(len(order), BATCH):
            log_p = self.model(train.images[order[start:stop]], t).log_softmax(1)
            noise = torch.rand(log_p.shape, generator=random, dtype=torch.float64).to(log_p.device)
            y = (log_p.detach() - (-noise.log()).log()).argmax(1)  # Gumbel's way to draw from p, same on any device
            score = torch.autograd.grad(
                log_p.gather(1, y[:, None]).sum(), list(self.shared.values()), allow_unused=True
            )
            for total, s in zip(fisher.values(), score, strict=True):
                if s is not None:
                    total.addcmul_(s, s, value=1 / len(train.labels))
        return fisher
