"""Hugging Face: a callback that protects old tasks during `Trainer.train` and remembers the new one at its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError(f"{error}; install transformers: pip install gradproj[transformers]") from error

from torch import Tensor

from gradproj.errors import InputError
from gradproj.files import load_tensors
from gradproj.integrations.tasks import TaskBoundaries

MEMORY = "gradproj_memory.pt"  # in each checkpoint's folder


def attended(batch: Any) -> Tensor | None:
    """Which tokens of a batch count: all but padding; where nothing is said of padding, all."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


class GradientProjectionCallback(TaskBoundaries, TrainerCallback):
    """Each `trainer.train()` is a task: old ones are protected in it, and it is remembered when it has come to its end.

    The memory is in each checkpoint's folder, with the tasks before; `train(resume_from_checkpoint=…)` takes it back.
    Trainer tells no callback of an exception: after one, the next training closes the protection, and so does
    `memory.stop()`.
    Arguments as of `TaskBoundaries`; the mask is `attended` if no other is given.

    Example:
        >>> memory = GradientProjectionMemory(model)
        >>> for task in tasks:
        ...     callback = GradientProjectionCallback(memory, threshold=0.97)
        ...     Trainer(model, arguments, train_dataset=task, callbacks=[callback]).train()
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"mask": attended, **kwargs})

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step:
            self._resume(_checkpoint(args, state) / MEMORY)
        self.begin(kwargs["model"], kwargs["optimizer"], kwargs["train_dataloader"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.end(kwargs["train_dataloader"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.memory.save(_checkpoint(args, state) / MEMORY)

    def _resume(self, path: Path) -> None:
        if path.is_file():
            self.take_over(load_tensors(path))
        elif not self.memory.n_updates:
            raise InputError(f"training resumes without a memory: there is no {path}; memory.load() can give it one")


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
