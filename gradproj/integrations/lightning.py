"""Lightning: a callback that protects old tasks during `trainer.fit` and remembers the new one at its end."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(f"{error}; install Lightning: pip install gradproj[lightning]") from error

from gradproj.integrations.tasks import TaskBoundaries


class GradientProjectionCallback(TaskBoundaries, Callback):
    """Each `trainer.fit` is a task: old ones are protected in it, and it is remembered when it has come to its end.

    All of the trainer's optimisers are seen to, in manual optimisation too. The memory is in Lightning's checkpoints:
    those made within `fit` hold the tasks before, and `fit(ckpt_path=…)` takes it back from them.
    Arguments as of `TaskBoundaries`.

    Example:
        >>> memory = GradientProjectionMemory(module)
        >>> for task in tasks:
        ...     trainer = Trainer(callbacks=[GradientProjectionCallback(memory, threshold=0.97)])
        ...     trainer.fit(module, task)
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with trainer.precision_plugin.forward_context():
            self.begin(pl_module, trainer.optimizers, trainer.train_dataloader)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with trainer.precision_plugin.forward_context():
            self.end(trainer.train_dataloader)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.memory.stop()

    def state_dict(self) -> dict[str, Any]:
        return self.memory.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.take_over(state_dict)
