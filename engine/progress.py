"""What a run says while it runs: a bar on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from threading import RLock
from typing import Any

from tqdm import tqdm

from engine.metrics import AccuracyMatrix
from engine.options import Options
from engine.record import scores_in_words
from engine.standing import Epoch
from gradproj import GradientProjectionMemory
from gradproj.errors import InputError

# A lock of this process alone: tqdm's own is shared with forked processes, and one that is killed may hold it for ever.
tqdm.set_lock(RLock())


def tolerate_consoles() -> None:
    """Let what a console's encoding lacks be printed as a question mark, instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


class Progress:
    """One bar over all epochs of a run, the lines between, and TensorBoard where asked for.

    Args:
        title: what is being run.
        options: n_tasks, n_epochs, quiet and tensorboard are read.
        folder: for TensorBoard's log.
        done: tasks learned already, by an earlier process.
        first: the task that is trained first, from which TensorBoard counts epochs.
    """

    def __init__(self, title: str, options: Options, folder: Path, done: int = 0, first: int = 0) -> None:
        self.first = first
        self.n_tasks, self.n_epochs, self.quiet = options.n_tasks, options.n_epochs, options.quiet
        self.on_terminal = sys.stdout.isatty()
        self.board = tensorboard_writer(folder) if options.tensorboard else None
        self.bar = tqdm(
            total=self.n_tasks * self.n_epochs,
            initial=done * self.n_epochs,
            desc=title,
            unit="epoch",
            file=sys.stdout,
            dynamic_ncols=True,
            disable=self.quiet or not self.on_terminal,
        )

    def say(self, text: str) -> None:
        """A line, above the bar. A terminal that is gone, or a full disk behind it, does not end the run."""
        if not self.quiet:
            with suppress(OSError):
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()

    def epoch(self, epoch: Epoch) -> None:
        """An epoch is over."""
        train = "" if epoch.train_accuracy is None else f" {epoch.train_accuracy:.2f} %"
        valid = "" if epoch.valid_loss is None else f", valid {epoch.valid_loss:.4f} {epoch.valid_accuracy:.2f} %"
        where = f"task {epoch.task + 1}/{self.n_tasks} epoch {epoch.epoch}"
        numbers = f"loss {epoch.train_loss:.4f}{train}{valid}, lr {epoch.lr:.2g}"
        if self.on_terminal:
            with suppress(OSError):
                self.bar.set_postfix_str(f"{where}: {numbers}")
                self.bar.update()
        else:
            self.say(f"{where}/{self.n_epochs}: {numbers}, {epoch.seconds:.1f} s")
        if self.board:
            for name in ("lr", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy"):
                if getattr(epoch, name) is not None:
                    step = (epoch.task - self.first) * self.n_epochs + epoch.epoch
                    self.board.add_scalar(f"epoch/{name}", getattr(epoch, name), step)

    def task(
        self,
        t: int,
        name: str,
        accuracy: AccuracyMatrix,
        memory: GradientProjectionMemory | None,
        learns_when_full: bool = False,
    ) -> None:
        """A task is learned: the accuracy matrix so far, and the memory's size.

        Args:
            t, name: of the task.
            accuracy: so far.
            memory: the method's, if it has one.
            learns_when_full: as the method says.
        """
        with suppress(OSError):
            self.bar.update((t + 1) * self.n_epochs - self.bar.n)  # a plateau may have ended the task early
        self.say(f"task {t + 1}/{self.n_tasks} ({name}) learned; test accuracy, percent (row after task, column task):")
        for i, row in enumerate(accuracy):
            if all(value is None for value in row):  # tasks learned jointly are measured once, at the end
                continue
            self.say(f"  {i + 1:>2} " + " ".join(f"{value:6.2f}" for value in row if value is not None))
        shares = {}
        if memory:
            held = {  # a layer's groups together: a depthwise convolution has one for each channel
                name: [sum(of[key] for key in layer.keys) for of in (memory.columns, memory.input_sizes)]
                for name, layer in memory.layers.items()
            }
            shares = {name: 100 * k / d for name, (k, d) in held.items()}
            parts = [f"{name} {k}/{d} ({shares[name]:.0f} %)" for name, (k, d) in held.items()]
            self.say("memory, columns of the most possible: " + ", ".join(parts))
            if full := ", ".join(name for name, (k, d) in held.items() if k == d):
                end = (
                    "all directions are held to some degree" if learns_when_full else "these layers can no longer learn"
                )
                self.say(f"memory is full, so {end}: {full}")
        if self.board:
            for j, value in enumerate(accuracy[t][: t + 1]):
                if value is not None:
                    self.board.add_scalar(f"test_accuracy/task_{j + 1}", value, t + 1)
            for name, share in shares.items():
                self.board.add_scalar(f"memory/{name}", share, t + 1)

    def close(self) -> None:
        """Leave the bar and close the log."""
        with suppress(OSError):
            self.bar.close()
        if self.board:
            self.board.close()


def tell(text: str) -> None:
    """Print a line, if anybody is there to read it."""
    with suppress(OSError):
        print(text, flush=True)


def print_result(summary: dict[str, Any]) -> None:
    """The numbers of a finished run, in two lines."""
    tell(
        f"{summary['benchmark']} ({summary['data']['kind']} data), {summary['method']}, seed {summary['seed']}: "
        f"{scores_in_words(summary)}, {summary['seconds']['total']:.0f} s"
    )
    tell(f"  {summary['folder']}/summary.json, accuracy.csv")


def tensorboard_writer(folder: Path):
    """A TensorBoard log in a run folder; imported only when asked for."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--tensorboard needs a package that is not here: pip install tensorboard") from error
    return SummaryWriter(str(folder / "tensorboard"))
