"""What is measured after a task: accuracy on every task so far, with and without being told the task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.evaluation import evaluate, network_for
from engine.method import Method
from engine.run_tasks import RunTasks
from engine.task import batches
from gradproj import normalization

MANY_TASKS = 20  # beyond, networks that differ by more than a head see other tasks' images at the end only
FEW = 4  # images that tell whether tasks' networks differ by their head alone

Row = list[float | None]


class Tester:
    """Tests the network that a method has for each task.

    Args:
        method: of the run.
        statistics: by task, BatchNorm's statistics to test with; empty where those of the test batch are to be used.
        tasks: of the run.
    """

    def __init__(self, method: Method, statistics: Sequence[normalization.Statistics], tasks: RunTasks) -> None:
        self.method, self.statistics, self.tasks = method, statistics, tasks
        self.batch_size = method.options.batch_size_test

    @torch.no_grad()
    def rows(self, n_seen: int) -> dict[str, Row]:
        """Accuracy in percent on each of the first tasks; None where there are no images, or it has no meaning.

        Returns:
            "valid" and "test": by the outputs for the image's own task. "class_incremental": on test images, where the
            largest output for all tasks seen must be that of the right class of the right task.
        """
        rows: dict[str, Row] = {"valid": [], "test": [], "class_incremental": []}
        heads = self.heads_alone(n_seen)
        for j in range(n_seen):
            valid, test = self.tasks.held_out(j)
            with network_for(j, self.method, self.statistics) as model:
                rows["valid"].append(evaluate(model, j, valid, self.batch_size)[1] if len(valid.labels) else None)
            logits = self.logits(test.images, j, n_seen, heads)
            rows["test"].append(accuracy(logits[j], test.labels))
            among_all = None
            if self.method.task_modules and len(logits) == n_seen:
                first = sum(logits[i].shape[1] for i in range(j))
                among_all = accuracy(torch.cat([logits[i] for i in range(n_seen)], dim=1), test.labels + first)
            rows["class_incremental"].append(among_all)
        return rows

    def logits(self, images: Tensor, j: int, n_seen: int, heads: Sequence[nn.Module]) -> dict[int, Tensor]:
        """By task, what test images of task j give for it: for task j, and where it can be afforded for all seen."""
        if heads:
            return self.logits_by_head(images, j, heads)
        logits = {j: self.outputs(images, j)}
        if self.method.task_modules and (n_seen <= MANY_TASKS or n_seen == len(self.tasks)):
            for i in range(n_seen):
                try:
                    logits[i] = logits[j] if i == j else self.outputs(images, i)
                except Exception:
                    if self.tasks.kind(i) == self.tasks.kind(j):
                        raise
                    break  # task i's network is for images of another kind
        return logits

    def outputs(self, images: Tensor, i: int) -> Tensor:
        """What images give for task i (n, classes)."""
        with network_for(i, self.method, self.statistics) as model:
            return torch.cat([model(images[a:b], i) for a, b in batches(len(images), self.batch_size)])

    def logits_by_head(self, images: Tensor, j: int, heads: Sequence[nn.Module]) -> dict[int, Tensor]:
        """The same where the networks differ by their heads alone: in one pass, what reaches head j goes into all."""
        rows = []
        with network_for(j, self.method, self.statistics) as model:
            for a, b in batches(len(images), self.batch_size):
                own, features = with_features(model, images[a:b], j, heads[j])
                rows.append([own if head is heads[j] else head(features) for head in heads])
        return {i: torch.cat(parts) for i, parts in enumerate(zip(*rows, strict=True))}

    def heads_alone(self, n_seen: int) -> list[nn.Module]:
        """The heads of the tasks seen, if the tasks' networks differ by nothing else; else none."""
        owned = self.method.task_modules[:n_seen]
        if not owned or self.method.task_identity or self.statistics or any(len(modules) != 1 for modules in owned):
            return []
        heads, j = [modules[0] for modules in owned], n_seen - 1
        if len({self.tasks.kind(i) for i in range(n_seen)}) > 1:
            return []
        images = self.tasks.held_out(j).test.images[:FEW]
        with network_for(j, self.method, self.statistics) as model:
            _, features = with_features(model, images, j, heads[j])
        if features is None:
            return []
        expected = [self.outputs(images, i) for i in range(n_seen)]
        try:
            found = [head(features) for head in heads]
        except Exception:  # it takes other features
            return []
        same = all(a.shape == b.shape and torch.allclose(a, b) for a, b in zip(expected, found, strict=True))
        return heads if same else []


def with_features(model: nn.Module, images: Tensor, t: int, head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A model's outputs for task t, and what goes into its head; None where that does not run once, on one tensor."""
    seen: list[tuple] = []
    with head.register_forward_pre_hook(lambda _, args: seen.append(args)):
        outputs = model(images, t)
    return outputs, seen[0][0] if len(seen) == 1 == len(seen[0]) else None


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """How many of some images (n, classes) have their largest output at their label, percent."""
    return 100 * (logits.argmax(1) == labels).sum().item() / len(labels)
