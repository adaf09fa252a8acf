"""What is refused of a run's benchmark, of its tasks' tensors, and of how these fit the network: one line each."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.method import Method
from engine.options import Options
from engine.task import PART_WORDS, PARTS, Benchmark, Split, Task
from gradproj.errors import InputError

SIZES = ("batch_size_train", "batch_size_test", "n_samples", "memory_images", "region_images")  # that may be 1
NO_FOLDER = frozenset('/\\:*?"<>|')  # in no folder's name, on any system


def check_benchmark(benchmark: Benchmark, method: Method) -> None:
    """Raise InputError where names make no folder, or there are fewer tasks or heads than are to be learned."""
    for what, name in (("benchmark's name", benchmark.name), ("data", benchmark.data), ("method's name", method.name)):
        if not isinstance(name, str) or not name.isprintable() or set(name) & NO_FOLDER or not name.strip(". "):
            bad = " ".join(sorted(NO_FOLDER))
            raise InputError(f"the {what} is {name!r}; it names a folder, so it must have letters and none of {bad}")
    try:
        there = len(benchmark.tasks)
    except TypeError as error:
        kind = type(benchmark.tasks).__name__
        raise InputError(f"the tasks of {benchmark.name} are a {kind}; give a list of Task, or LazyTasks") from error
    n_tasks = method.options.n_tasks
    if there < n_tasks:
        found = f"{there} tasks; give n_tasks {there} or less" if there else "no tasks"
        raise InputError(f"n_tasks is {n_tasks}, but {benchmark.name} has {found}")
    n_heads = len(method.task_modules)
    if 0 < n_heads < n_tasks:
        raise InputError(
            f"{type(method.model).__name__} has {n_heads} head{'s' * (n_heads > 1)} for {n_tasks} tasks (n_tasks); "
            "give it one for each, or one for all"
        )


def check_tensors(task: Any, t: int, options: Options) -> None:
    """Raise InputError where a task is not what `Task` says."""
    if not isinstance(task, Task):
        raise InputError(f"task {t + 1} is a {type(task).__name__}; it must be an engine.task.Task")
    n = task.n_classes
    if not isinstance(n, int) or n < 1:
        raise InputError(f"{task.name}: n_classes is {n!r}; it must be the number of classes, 1 or more")
    if task.classes is not None and (isinstance(task.classes, str) or not _are_names(task.classes, n)):
        raise InputError(
            f"{task.name}: classes are {task.classes!r}; they must be {n} names or numbers, as n_classes says"
        )
    for part in PARTS:
        split = getattr(task, part)
        _check_split(split, f"{task.name}: {PART_WORDS[part]}", n)
        if part != "valid" and not len(split.labels):
            raise InputError(f"{task.name} has no {PART_WORDS[part]} images; it must have some")
    if untaught := sorted(set(task.test.labels.tolist()) - set(task.train.labels.tolist())):
        names = task.classes if task.classes is not None else range(n)
        which = ", ".join(str(names[c]) for c in untaught[:5]) + (", …" if len(untaught) > 5 else "")
        warnings.warn(f"{task.name} is tested on class {which} without a training image of it", stacklevel=2)
    if options.schedule == "plateau" and not len(task.valid.labels):
        raise InputError(
            f"schedule is plateau, but {task.name} has no validation images; hold some out or use constant"
        )


def _are_names(classes: Any, n: int) -> bool:
    """Whether these are n texts or whole numbers."""
    try:
        return len(classes) == n == len([c if isinstance(c, str) else operator.index(c) for c in classes])
    except TypeError:
        return False


def _check_split(split: Any, what: str, n_classes: int) -> None:
    if not isinstance(split, Split):
        raise InputError(f"{what} images are a {type(split).__name__}; give an engine.task.Split(images, labels)")
    images, labels = split
    for kind, value in (("images", images), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise InputError(f"{what} {kind} are a {type(value).__name__}; give a tensor (torch.as_tensor)")
    if labels.dtype != torch.int64 or labels.ndim != 1:
        raise InputError(f"{what} labels are {described(labels)}; they must be int64 (n,), such as labels.long()")
    if images.ndim < 2 or len(images) != len(labels):
        raise InputError(
            f"{what} images are {described(images)} and labels {described(labels)}; there must be one for each"
        )
    if not len(labels):
        return
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= n_classes:
        raise InputError(f"{what} labels go from {low} to {high}; they must be 0 to {n_classes - 1}, as n_classes says")
    # The sum, which is quick, tells but where it overflows.
    if images.is_floating_point() and not images.sum().isfinite() and not images.isfinite().all():
        raise InputError(f"{what} images hold NaN or infinite values")


def described(tensor: Tensor) -> str:
    """A tensor's dtype and shape in words."""
    return f"{str(tensor.dtype).removeprefix('torch.')} ({', '.join(map(str, tensor.shape))}{',' * (tensor.ndim == 1)})"


def check_alike(method: Method, first: tuple[str, Tensor], other: tuple[str, Tensor]) -> None:
    """Raise InputError where a method mixes images of several tasks that differ in shape or dtype.

    Args:
        method: of the run.
        first, other: the names of two tasks, and an image of each.
    """
    (one, image), (two, another) = first, other
    if (method.mixes_tasks or method.joint) and (image.shape, image.dtype) != (another.shape, another.dtype):
        raise InputError(
            f"{method.name} puts images of several tasks into one batch, so they must have one shape and dtype; an "
            f"image of {one} is {described(image)}, of {two} {described(another)}"
        )


@torch.no_grad()
def check_fits(model: nn.Module, task: Task, t: int, options: Options, sizes: Sequence[Mapping[str, int]] = ()) -> None:
    """Raise InputError where a network cannot take a task: its images, single ones, or as many classes.

    Args:
        model: whose eval mode is asked; put into it.
        task: on the model's device.
        t: its number.
        options: the batch sizes.
        sizes: by task, how many images each part has, as far as that is known: of later tasks it tells now what would
            be refused when they begin.
    """
    name = _called(model)
    model.eval()
    _check_single_images(model, task, t, options, sizes)
    known = set()
    for part in PARTS:
        images = getattr(task, part).images
        if not len(images) or (images.shape[1:], images.dtype) in known:
            continue
        known.add((images.shape[1:], images.dtype))
        some = images[:2].clone()
        try:
            outputs = model(some, t)
        except Exception as error:
            raise InputError(cannot_take(model, task, t, images, error)) from error
        if not torch.equal(some, images[:2]):
            raise InputError(
                f"{name} changes the images that it is given, and so the data with every pass; let its forward begin "
                "with a copy (images = images.clone())"
            )
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != len(images[:2]):
            found = described(outputs) if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
            raise InputError(
                f"{name} returns {found} for {len(images[:2])} images of {task.name}; "
                "it must be their logits, (n, classes)"
            )
        if outputs.shape[1] < task.n_classes:
            raise InputError(f"{name} has {outputs.shape[1]} outputs for the {task.n_classes} classes of {task.name}")


def _check_single_images(
    model: nn.Module, task: Task, t: int, options: Options, sizes: Sequence[Mapping[str, int]]
) -> None:
    """Raise InputError where there would be batches of one image, and BatchNorm refuses them."""
    alone = [f"{name} is 1" for name in SIZES if getattr(options, name, None) == 1]
    parts = [part for part in PARTS if len(getattr(task, part).labels) == 1]
    alone += [f"{task.name} has 1 {PART_WORDS[part]} image" for part in parts]
    later = [(j, part) for j, counts in enumerate(sizes) if j > t for part, n in counts.items() if n == 1]
    alone += [f"task {j + 1} has 1 {PART_WORDS[part]} image" for j, part in later]
    parts += [part for _, part in later]
    if not alone or not _takes(model, task.train.images[:1].repeat_interleave(2, dim=0), t):  # another check says so
        return
    try:
        model(task.train.images[:1], t)
    except ValueError as error:  # BatchNorm's
        hint = " (a larger pc_valid holds out more for validation)" if "valid" in parts else ""
        why = f"the network cannot take an image alone ({error})"
        raise InputError(f"{'; '.join(alone)}; it must be 2 or more{hint}, since {why}") from error


def _takes(model: nn.Module, images: Tensor, t: int) -> bool:
    try:
        model(images, t)
    except Exception:
        return False
    return True


def _called(model: nn.Module) -> str:
    """What a network is called: by its name, if it has one, else by its class."""
    name = getattr(model, "name", None)
    return name if isinstance(name, str) else type(model).__name__


def cannot_take(model: nn.Module, task: Task, t: int, images: Tensor, error: Exception) -> str:
    """What to say where a network fails on a task's images."""
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    dtype = next((p.dtype for p in model.parameters()), images.dtype)
    hint = ""
    if not images.is_floating_point():
        hint = "; give floats, normalised: such as images.float() / 255"
    elif images.dtype != dtype:
        hint = f"; the network's weights are {str(dtype).removeprefix('torch.')}: give images.to({dtype})"
    found = f"{task.name} (task {t + 1}, images {described(images)})"
    return f"{_called(model)} cannot take {found}: {type(error).__name__}: {reason}{hint}"
