"""Small runs to break: a synthetic benchmark, a two-layer network, and processes that can be killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import engine
from engine.cli import script
from engine.folder import load_checkpoint
from engine.interrupts import stoppable
from engine.options import Options
from engine.task import Benchmark, Split, Task
from tests.tiny import made, run

ENGINE = str(Path(engine.__file__).parent)
COUNTS: Counter[str] = Counter()  # what was survived, printed at the end of the suite
LIMIT = 120  # seconds after which a child counts as hung


class TwoLayers(nn.Module):
    """12 inputs, 8 hidden units, 3 classes for all tasks."""

    def __init__(self, n_hidden: int = 8) -> None:
        super().__init__()
        self.arguments = dict(n_hidden=n_hidden)
        self.fc1 = nn.Linear(12, n_hidden, bias=False)
        self.fc2 = nn.Linear(n_hidden, 3, bias=False)

    @property
    def relu_chain(self) -> list[nn.Linear]:
        return [self.fc1, self.fc2]

    def forward(self, images: Tensor, task: int = 0) -> Tensor:
        return self.fc2(F.relu(self.fc1(images)))


class Normalised(nn.Module):
    """The same with BatchNorm on batch statistics, and a head for each of three tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}
        self.fc = nn.Linear(12, 8, bias=False)
        self.bn = nn.BatchNorm1d(8, track_running_stats=False)
        self.heads = nn.ModuleList(nn.Linear(8, 3, bias=False) for _ in range(3))

    def forward(self, images: Tensor, task: int) -> Tensor:
        return self.heads[task](F.relu(self.bn(self.fc(images))))


def benchmark(dtype: torch.dtype = torch.float32, pc_valid: float = 0.25) -> Benchmark:
    """Three tasks of 60 training, 20 validation and 40 test vectors; labels by a random linear map."""
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for t in range(3):
        weight = torch.randn(12, 3, generator=generator)
        splits = []
        for n in (60, 20 if pc_valid else 0, 40):
            images = torch.randn(n, 12, generator=generator)
            splits.append(Split(images.to(dtype), (images @ weight).argmax(1)))
        tasks.append(Task(f"map {t}", 3, *splits))
    return Benchmark("maps", "synthetic", tasks)


def options(folder: Path, **changes: Any) -> Options:
    """Three tasks of three epochs; the learning rate falls at once when validation stalls."""
    values = dict(
        n_tasks=3,
        n_epochs=3,
        batch_size_train=10,
        lr=0.2,
        lr_patience=1,
        threshold=(0.5,),
        n_samples=40,
        device="cpu",
        quiet=True,
        run_folder=str(folder),
    )
    return made(values | changes)


def small_run(
    folder: Path, model: type[nn.Module] = TwoLayers, dtype: torch.dtype = torch.float32, **changes: Any
) -> dict[str, Any]:
    """Start or continue the run in `folder`."""
    torch.manual_seed(0)
    return run(options(folder, **changes), benchmark(dtype), model().to(dtype))


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run decided, that is all but how long it took; equal means bit for bit."""
    summary = json.loads((folder / "summary.json").read_text())
    state = load_checkpoint(folder)
    epochs = [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]
    names = ("accuracy", "valid_accuracy", "memory_columns", "average_accuracy", "backward_transfer", "epochs")
    return {
        **{name: summary[name] for name in names},
        "lines": [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in epochs],
        "csv": (folder / "accuracy.csv").read_text(),
        "weights": {name: value.tolist() for name, value in state["model"].items()},
    }


def process_list() -> str:
    """All processes of this machine, a line each: the parent's id and the whole command."""
    command = ["ps", "-eww", "-o", "ppid,args"]  # ww: readline leaves a COLUMNS behind, which would cut the lines
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def fork(work: Callable[[], Any], log: Path) -> int:
    """Do `work` in another process, which ends as a script does and leaves what it prints in `log`; returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # threads of this process, which the child does not need
        child = os.fork()
    if child:
        return child
    code = 70
    try:
        sys.settrace(None)
        warnings.resetwarnings()
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        torch.set_num_threads(1)
        with log.open("a") as file:
            sys.stdout = sys.stderr = file
            try:
                script(lambda _: work())
            except SystemExit as end:
                code = end.code
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """A child's exit code, or minus the signal that ended it; kills one that hangs."""
    timer = threading.Timer(LIMIT, os.kill, (child, signal.SIGKILL))
    timer.start()
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        timer.cancel()


def fork_and_wait(work: Callable[[], Any], log: Path) -> int:
    """The exit code of `work` done in another process."""
    return wait(fork(work, log))


def signal_later(child: int, seconds: float, number: int) -> int:
    """Send a child a signal after a while; returns its exit code as `wait` does."""
    time.sleep(seconds)
    os.kill(child, number)  # not waited for yet, so the id is still its own
    return wait(child)


@contextmanager
def lines_traced(on_line: Callable[[str], None], folder: str = ENGINE) -> Iterator[None]:
    """Call a function with file:line before each line that a folder's code executes in this context."""

    def in_frame(frame: Any, event: str, _arg: Any) -> Any:
        if event == "line":
            on_line(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return in_frame

    def tracer(frame: Any, _event: str, _arg: Any) -> Any:
        return in_frame if frame.f_code.co_filename.startswith(folder) else None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        yield
    finally:
        sys.settrace(before)


def trace(work: Callable[[], Any], folder: str = ENGINE) -> list[str]:
    """file:line of all lines of a folder's code that `work` executes, in order."""
    lines: list[str] = []
    with lines_traced(lines.append, folder):
        work()
    return lines


def signalled_at(n: int, number: int, work: Callable[[], Any], folder: str = ENGINE) -> None:
    """Do `work` as a script would, sending this process a signal just before the nth line of a folder's code."""
    count = 0

    def on_line(_place: str) -> None:
        nonlocal count
        if count == n:
            os.kill(os.getpid(), number)
        count += 1

    with stoppable(), lines_traced(on_line, folder):
        work()


def moments(lines: list[str], files: tuple[str, ...], n: int, seed: int) -> list[int]:
    """Some of the moments of a traced run: of each line of some files one occurrence, and n of all."""
    chooser = random.Random(seed)
    places: dict[str, list[int]] = {}
    for i, place in enumerate(lines):
        if Path(place.rpartition(":")[0]).name in files:
            places.setdefault(place, []).append(i)
    once = [chooser.choice(occurrences) for occurrences in places.values()]
    return sorted({*once, *chooser.sample(range(len(lines)), min(n, len(lines)))})
