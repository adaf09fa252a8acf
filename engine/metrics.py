"""The numbers of continual learning, from the accuracy matrix.

`accuracy[i][j]` is the test accuracy (percent) on task j after learning task i; None where it was not measured (j > i).
"""

from __future__ import annotations

from collections.abc import Sequence

AccuracyMatrix = Sequence[Sequence[float | None]]


def n_tasks(accuracy: AccuracyMatrix) -> int:
    """How many tasks a matrix is of; of joint training older versions kept the last row alone."""
    return max(len(accuracy), *map(len, accuracy))


def average_accuracy(accuracy: AccuracyMatrix) -> float:
    """ACC: the mean over all tasks of the accuracy after the last one (paper Eq. 10), percent."""
    last = accuracy[-1]
    return sum(last) / len(last)


def backward_transfer(accuracy: AccuracyMatrix) -> float | None:
    """BWT: the mean change of each task's accuracy since it was learned, over T - 1 tasks (paper Eq. 11), points.

    Negative means forgetting; 0.0 for a single task, which has nothing to forget; None for tasks learned jointly.
    """
    if learned_jointly(accuracy):
        return None
    last = accuracy[-1]
    changes = [last[j] - accuracy[j][j] for j in range(len(accuracy) - 1)]
    return sum(changes) / len(changes) if changes else 0.0


def forgetting(accuracy: AccuracyMatrix) -> float | None:
    """The mean drop of each task from its best (Chaudhry et al., ECCV 2018, Eq. 3), over T - 1 tasks, points.

    0.0 for a single task; None for tasks learned jointly.
    """
    if learned_jointly(accuracy):
        return None
    before = range(len(accuracy) - 1)
    drops = [max(accuracy[i][j] for i in before[j:]) - accuracy[-1][j] for j in before]
    return sum(drops) / len(drops) if drops else 0.0


def learned_jointly(accuracy: AccuracyMatrix) -> bool:
    """Whether only the last row was measured, so that no task can have been forgotten since it was learned."""
    return any(accuracy[j][j] is None for j in range(len(accuracy)))


def learned(accuracy: AccuracyMatrix) -> list[float | None]:
    """The accuracy on each task just after learning it, percent."""
    return [accuracy[t][t] for t in range(len(accuracy))]


def forward_transfer(accuracy: AccuracyMatrix, alone: Sequence[float]) -> float:
    """FWT: how much better tasks are learned than by networks of their own, the mean over tasks 2 … T, points.

    Differs: Lopez-Paz and Ranzato (NeurIPS 2017) define it by the accuracy on a task *before* it is learned, minus that
    of an untrained network; with a head for each task both are chance. This is the gain in learning, whose opposite
    Chaudhry et al. (ECCV 2018) call intransigence, there against a jointly trained network.

    Args:
        accuracy: of T >= 2 tasks, not learned jointly.
        alone: (T,) accuracy of a network that learns task t alone, percent.
    """
    gains = [accuracy[t][t] - alone[t] for t in range(1, len(accuracy))]
    return sum(gains) / len(gains)
