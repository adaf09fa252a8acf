"""What a run says while it runs: a bar on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from tqdm import tqdm

from gpm.metrics import AccuracyMatrix
from gpm.training import Epoch


class Progress:
    """One bar over all epochs of a run, and the lines between.

    Args:
        title: what is being run.
        n_tasks: tasks in all.
        n_epochs: most epochs a task.
        done: tasks learned already, by an earlier process.
        quiet: say nothing.
    """

    def __init__(self, title: str, n_tasks: int, n_epochs: int, done: int = 0, quiet: bool = False) -> None:
        self.n_tasks, self.n_epochs, self.quiet = n_tasks, n_epochs, quiet
        self.on_terminal = sys.stdout.isatty()
        self.bar = tqdm(
            total=n_tasks * n_epochs,
            initial=done * n_epochs,
            desc=title,
            unit="epoch",
            file=sys.stdout,
            dynamic_ncols=True,
            disable=quiet or not self.on_terminal,
        )

    def say(self, text: str) -> None:
        """A line, above the bar."""
        if not self.quiet:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def epoch(self, epoch: Epoch) -> None:
        """An epoch is over."""
        valid = "" if epoch.valid_loss is None else f", valid {epoch.valid_loss:.4f} {epoch.valid_accuracy:.2f} %"
        where = f"task {epoch.task + 1}/{self.n_tasks} epoch {epoch.epoch}"
        numbers = f"loss {epoch.train_loss:.4f}{valid}, lr {epoch.lr:.2g}"
        if self.on_terminal:
            self.bar.set_postfix_str(f"{where}: {numbers}")
            self.bar.update()
        else:
            self.say(f"{where}/{self.n_epochs}: {numbers}, {epoch.seconds:.1f} s")

    def task(
        self, t: int, name: str, accuracy: AccuracyMatrix, columns: Mapping[str, int], sizes: Mapping[str, int]
    ) -> None:
        """A task is learned: the accuracy matrix so far, and the memory's size."""
        self.bar.update((t + 1) * self.n_epochs - self.bar.n)  # a plateau may end a task early
        self.say(
            f"task {t + 1}/{self.n_tasks} ({name}) learned. Test accuracy, percent; row = after task, column = task:"
        )
        for i, row in enumerate(accuracy):
            self.say(f"  {i + 1:>2} " + " ".join(f"{value:6.2f}" for value in row if value is not None))
        if columns:
            parts = [f"{key} {k}/{sizes[key]} ({100 * k / sizes[key]:.0f} %)" for key, k in columns.items()]
            self.say("memory, columns of the most possible: " + ", ".join(parts))
        full = [key for key, k in columns.items() if k == sizes[key]]
        if full:
            self.say(f"memory is full, so these layers can no longer learn: {', '.join(full)}")

    def close(self) -> None:
        """Leave the bar."""
        self.bar.close()
