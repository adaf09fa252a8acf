"""One run by several processes (torchrun): each takes its share of every batch, the first one writes the folder.

All processes read the same data, draw the same random numbers and hold the same weights. A training step averages the
gradients of their shares, so that it is the one-process step to rounding; what follows a task (memories) every process
does for itself, from the same images.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from engine.contract import declares
from engine.interrupts import Stopped, ending_with_parent
from gradproj.distributed import alone
from gradproj.errors import InputError
from gradproj.normalization import batch_norms

if TYPE_CHECKING:
    from engine.method import Method

T = TypeVar("T")
_store: Any = None  # torch.distributed.Store, which all processes see
_workplace = ""  # a folder of this process alone


class Lost(Stopped):
    """Another process of the run has ended."""

    def __init__(self, error: Exception) -> None:
        BaseException.__init__(self, f"another process of this run has ended ({' '.join(str(error).split())[:120]})")
        self.exit_code = 1


def rank() -> int:
    """Which of the run's processes this is; 0, the first one, writes and speaks."""
    return distributed.get_rank() if is_shared() else 0


def n_processes() -> int:
    """How many processes share the run."""
    return distributed.get_world_size() if is_shared() else 1


def is_shared() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def local_gpu() -> str:
    """Each process of a machine has a GPU of its own."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if is_shared() else "cuda"


@contextmanager
def joined() -> Iterator[None]:
    """Within this context a process that torchrun started is one of a group; all but the first are silent."""
    global _store, _workplace
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if (follow := ending_with_parent(signal.SIGTERM)) is not None:
        follow()  # torchrun's own end, however that happens
    _store, number, n = next(distributed.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, store=distributed.PrefixStore("run", _store), rank=number, world_size=n)
    try:
        with ExitStack() as stack:
            stack.enter_context(alone())
            if number:
                _workplace = stack.enter_context(tempfile.TemporaryDirectory(prefix="run-"))
                stack.enter_context(redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
            yield
    finally:
        distributed.destroy_process_group()


def is_first_to_say(text: str) -> bool:
    """Whether no other process of the group has said something yet."""
    if _store is None:
        return True
    try:
        return _store.add(f"said/{text}", 1) == 1
    except RuntimeError:  # the store has ended with its process
        return True


def own_folder(folder: Path) -> Path:
    """The run's folder; of all processes but the first, a temporary one that goes with the process."""
    return Path(_workplace, *folder.absolute().parts[1:]) if rank() else folder


def share_files(folder: Path, names: Iterable[str]) -> None:
    """Give the processes that work elsewhere what the first one's folder holds of some files, to go on from."""
    if not is_shared():
        return
    content = [{name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}]
    with losing_none():
        distributed.broadcast_object_list(content, src=0)
    if rank():
        for name, data in content[0].items():
            (folder / name).write_bytes(data)


@contextmanager
def losing_none() -> Iterator[None]:
    """Within this context, which waits for other processes, one that has ended stops this one too."""
    try:
        yield
    except RuntimeError as error:
        raise Lost(error) from error


def shared(parts: Iterable[T]) -> Iterator[T]:
    """Those of some parts of work that are this process's."""
    mine, n = rank(), n_processes()
    return (part for i, part in enumerate(parts) if i % n == mine)


def added(numbers: Tensor) -> Tensor:
    """The sum of a tensor over the processes, in place."""
    if is_shared():
        with losing_none():
            distributed.all_reduce(numbers)
    return numbers


def share_of(n: int) -> tuple[int, int, float]:
    """The images of a batch of n that this process takes: start, stop, and the weight of their mean in the batch's.

    A batch too small for two images each, which BatchNorm needs, is taken whole by every process.
    """
    mine, count = rank(), n_processes()
    if n < 2 * count:
        return 0, n, 1 / count
    start, stop = n * mine // count, n * (mine + 1) // count
    return start, stop, (stop - start) / n


def average_gradients(parameters: Iterable[nn.Parameter], loss: Tensor, weight: float) -> Tensor:
    """Put the batch's gradients in the place of those of this process's share; returns the batch's mean loss.

    Args:
        parameters: whose gradients; the same have one in every process.
        loss: the mean over the share.
        weight: of the share in the batch.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    sums = added(weight * torch.cat([x.flatten().to(loss) for x in (loss, *gradients)]))
    for gradient, mean in zip(gradients, sums[1:].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
    return sums[0]


def check_shareable(method: Method) -> None:
    """Raise InputError where a step is not the mean of what its images would do, so that it cannot be shared out."""
    if is_shared() and not declares(type(method), "plain_step"):
        raise InputError(
            f"method {method.name} cannot be run by {n_processes()} processes: its step is more than SGD on the mean "
            "loss of a batch; start it without torchrun"
        )


def differences(model: nn.Module) -> list[str]:
    """What of the numbers differs from one process's beyond rounding, a line each."""
    if not is_shared():
        return []
    found = []
    if norms := batch_norms(model):
        found.append(
            f"BatchNorm in {len(norms)} layers normalises by each process's share of a training batch, not by the "
            "whole batch, so numbers differ from one process's"
        )
    if any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p for module in model.modules()):
        found.append("dropout draws other units in each process than in one, so numbers differ from one process's")
    return found
