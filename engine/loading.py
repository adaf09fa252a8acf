"""Reading a run back: its network, its method and what it recorded."""

from __future__ import annotations

import dataclasses
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from engine.classes import find, make_model
from engine.evaluation import network_for
from engine.folder import load_checkpoint, weights_after
from engine.method import Method
from engine.options import Options, with_flags
from engine.record import read_summary
from engine.state import OWN
from gradproj import GradientProjectionMemory
from gradproj.errors import InputError, one_line
from gradproj.normalization import Statistics


@dataclass(frozen=True)
class LoadedRun:
    """What a run left behind, for inference and analysis.

    Attributes:
        model: with the weights of its end (or last checkpoint, or after the task asked for), in eval mode, on the CPU.
        method: as it was at the end.
        memory: the model's bases at the end; None for methods without.
        config: the content of config.json.
        summary: the content of summary.json; None while the run is unfinished.
        statistics: with `--batchnorm task`, by task what BatchNorm normalises by at test; else empty.
        n_learned: tasks that it had learned at its end or last checkpoint.
    """

    model: nn.Module
    method: Method
    memory: GradientProjectionMemory | None
    config: dict[str, Any]
    summary: dict[str, Any] | None
    statistics: list[Statistics]
    n_learned: int

    def network(self, t: int) -> AbstractContextManager[nn.Module]:
        """The model as the run tested it on task t: `with run.network(t) as model: logits = model(images, t)`.

        With `--batchnorm task`, and for methods that test with more than the model, it is another one for each task.

        Raises:
            InputError: the run has not learned task t.
        """
        if not 0 <= t < self.n_learned:
            raise InputError(f"task {t} is not one of the {self.n_learned} that this run has learned, from 0")
        return network_for(t, self.method, self.statistics)


def load_run(
    folder: str | Path,
    model: nn.Module | None = None,
    method: type[Method] | None = None,
    after_task: int | None = None,
) -> LoadedRun:
    """Read a run folder.

    Args:
        folder: with config.json and a checkpoint.
        model: of the run's architecture; needed only where its class cannot be imported or does not say in
            `arguments` what it was made with.
        method: of the run; needed only where its class cannot be imported.
        after_task: give the model the weights that it had after this task, counted from 0, which a run with
            `--keep each` keeps; default those of the end.
    Raises:
        InputError: a file is missing or damaged, or the model cannot be made.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        if (folder / "summary.json").exists():
            remedy = "delete its summary.json and run its command again, which writes both from the checkpoint"
            raise InputError(f"{folder} has no config.json; {remedy}")
        raise InputError(f"{folder} is no run's folder: it has no config.json")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        description = config["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'} is not the config.json of a run: {error!r}") from error
    state = load_checkpoint(folder)
    if state is None:
        raise InputError(f"{folder} has no checkpoint that can be read, so its weights are not there")
    weights = state["model"] if after_task is None else weights_after(after_task, folder, state)
    if weights is None:
        raise InputError(
            f"{folder} has no weights after task {after_task}, counted from 0: the run has learned "
            f"{state['position']} tasks, and only --keep each keeps the weights of all"
        )
    own = {name: value for name, value in state["model"].items() if name.startswith(OWN)}
    if own.keys() != {name for name in weights if name.startswith(OWN)}:
        # Such parameters came with later tasks, each for its own task and fixed since.
        weights = {name: value for name, value in weights.items() if not name.startswith(OWN)} | own
    model = make_model(description) if model is None else model
    method_type = find_method(config) if method is None else method
    known, values = with_flags(Options, method_type), state["hyperparameters"]
    own = [(k, Any, dataclasses.field(default=None)) for k in values if k not in known.__dataclass_fields__]
    options = dataclasses.make_dataclass(known.__name__, own, bases=(known,), kw_only=True)  # with the script's too
    options.script = None
    made = method_type(model, options(**values))
    try:
        made.load_state_dict(state["method"])
        made.load_weights(weights)
    except (AttributeError, InputError, KeyError, RuntimeError, TypeError) as error:
        reason = one_line(error)
        raise InputError(f"the weights in {folder} are not of a {type(model).__name__} like this: {reason}") from error
    summary = read_summary(folder)
    return LoadedRun(model.eval(), made, made.memory, config, summary, state["statistics"], state["position"])


def find_method(config: dict[str, Any]) -> type[Method]:
    """The method that a run's config.json names."""
    try:
        # An older config names no class; its method is one of those that come with the engine.
        named = config.get("method")
        found = find(named) if named else find("methods.METHODS")[config["hyperparameters"]["method"]]
    except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"cannot find the class of the run's method ({error!r}); give load_run the class") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise InputError(f"{named} is no method; give load_run the class")
    return found
