"""Avalanche: a plugin that protects old experiences while a strategy trains and remembers the new one at its end."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

try:
    from avalanche.benchmarks import OnlineCLExperience
    from avalanche.core import SupervisedPlugin
    from avalanche.models import DynamicModule, MultiTaskModule
    from avalanche.models.utils import avalanche_forward
    from avalanche.training.templates import SupervisedTemplate
except ImportError as error:
    raise ImportError(f"{error}; install Avalanche: pip install gradproj[avalanche]") from error

from torch import nn
from torch.utils.data import DataLoader

from gradproj.errors import InputError
from gradproj.integrations.tasks import TaskBoundaries
from gradproj.memory import GradientProjectionMemory


def growing(model: nn.Module) -> list[str]:
    """The names of the modules that Avalanche changes at each experience, such as heads; a memory must exclude them."""
    keeps = (DynamicModule.adaptation, MultiTaskModule.adaptation)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, DynamicModule) and type(module).adaptation not in keeps
    ]


class GradientProjectionPlugin(TaskBoundaries, SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg, misc, unused-ignore]
    """Each experience is a task: old ones are protected in it, and it is remembered when it has come to its end.

    The memory is part of the strategy, and so of what Avalanche's `save_checkpoint` writes of it.
    Arguments as of `TaskBoundaries`; samples are always of the experience.

    Raises:
        InputError: the memory holds layers that grow.

    Example:
        >>> memory = GradientProjectionMemory(model, exclude=growing(model))
        >>> plugin = GradientProjectionPlugin(memory, threshold=0.97)
        >>> strategy = Naive(model=model, optimizer=optimizer, plugins=[plugin])
    """

    def __init__(
        self,
        memory: GradientProjectionMemory,
        threshold: float | Mapping[str, float],
        n_samples: int = 300,
        remember: bool = True,
        freeze_unprotected: bool = False,
        **update: Any,
    ) -> None:
        super().__init__(memory, threshold, None, n_samples, remember, None, freeze_unprotected, **update)
        grown = [name for name in memory.layers if any(name.startswith(f"{head}.") for head in growing(memory.model))]
        if grown:
            raise InputError(f"layer {', '.join(grown)} grows with the experiences; give exclude=growing(model)")

    def before_training_exp(self, strategy: SupervisedTemplate, *args: Any, **kwargs: Any) -> None:
        if isinstance(strategy.experience, OnlineCLExperience):
            raise InputError("an online stream's experiences are no tasks to remember; give whole experiences")
        self.forward = partial(_on_batch, strategy.model, hasattr(strategy.experience, "task_labels"))
        self.begin(strategy.model, strategy.optimizer, _loader(strategy))
        train = strategy._train_exp

        def closing(*args: Any, **kwargs: Any) -> None:  # no plugin is told of exceptions
            del strategy._train_exp
            try:
                train(*args, **kwargs)
            except BaseException:
                self.memory.stop()
                raise

        strategy._train_exp = closing

    def after_training_exp(self, strategy: SupervisedTemplate, *args: Any, **kwargs: Any) -> None:
        self.end(_loader(strategy))


def _on_batch(model: nn.Module, is_task_aware: bool, batch: Any) -> Any:
    """A model's output for a batch of inputs, labels and, where there are any, tasks, as strategies run it."""
    return avalanche_forward(model, batch[0], batch[-1]) if is_task_aware else model(batch[0])


def _loader(strategy: SupervisedTemplate) -> DataLoader:
    data = strategy.experience.dataset
    return DataLoader(data, strategy.train_mb_size, collate_fn=data.collate_fn)
