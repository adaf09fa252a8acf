"""GradientProjectionMemory: what a network must not forget, as one orthonormal basis for each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from gradproj.batches import Forward, Mask, as_batches
from gradproj.concerns import what_rounds
from gradproj.distributed import refuse_sharded
from gradproj.errors import FullLayerWarning, InputError
from gradproj.files import load_tensors, save_tensors
from gradproj.gatherer import Gatherer
from gradproj.gathering import gather, passes
from gradproj.growth import grown, thresholds_by_layer
from gradproj.inspection import Check, inspect, refuse_changed, table
from gradproj.layers import Layer, Selection, find_layers, listed
from gradproj.normalization import frozen, normalization_parameters
from gradproj.optimizers import (
    gradients,
    leaves_gradients,
    projected_updates,
    trainers,
    unwrapped,
)
from gradproj.projection import LayerProjector, layer_projector
from gradproj.protection import Protection, projecting, watching
from gradproj.representation import Representation, SeenRows
from gradproj.subspace import FAST_THRESHOLD, RankRule
from gradproj.verification import Verification, leaks, verification
from gradproj.watcher import Watcher

MAX_MEMORY = 2 * 2**30  # bytes


class GradientProjectionMemory:
    """The bases of a model's layers, and the protection they give (Saha, Garg and Roy, ICLR 2021, Algorithm 1).

    Args:
        model: any module. What is trained of it is protected where its kind is known (`print(memory)` says what is),
            and its normalisation layers are frozen. A warning names what else learns, and so can forget.
        exclude: modules to leave out, such as the task heads: names, patterns like "blocks.*.mlp", or modules.
        include: the only modules to look at, likewise.
        rank_rule: "released" keeps one direction fewer after the first task, as the authors' released code does.
        exact: decide all ranks in float64 by full decompositions, as the paper's networks are; otherwise large layers
            use single precision as far as ε allows.
    Raises:
        InputError: nothing of the model can be protected, an argument is unknown, or how a layer uses its weight is.

    Attributes:
        layers: the protected layers by name.
        bases: by key (the layer's name, or name[g] for group g of a convolution): (d, k) float64 orthonormal columns;
            of an embedding, the rows (k,) that were looked up.

    Example:
        >>> memory = GradientProjectionMemory(model, exclude=["heads"])
        >>> for task in tasks:
        ...     with memory.protect(optimizer):
        ...         train(model, task)
        ...     memory.update(lambda images: model(images, task), [samples], threshold=0.97)
    """

    def __init__(
        self,
        model: nn.Module,
        exclude: Selection = (),
        include: Selection | None = None,
        rank_rule: RankRule = "paper",
        exact: bool = False,
    ) -> None:
        if rank_rule not in get_args(RankRule):
            raise InputError(f"rank_rule is {rank_rule!r}; it must be one of: {', '.join(get_args(RankRule))}")
        if not isinstance(model, nn.Module):
            raise InputError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
        self.model, self.exclude = model, listed(exclude)
        self.include = None if include is None else listed(include)
        self.rank_rule: RankRule = rank_rule
        self.exact = exact
        refuse_sharded(model)
        self.layers = find_layers(model, self.exclude, self.include)
        if not self.layers:
            raise InputError(f"{type(model).__name__} has no trained layer that can be protected")
        self.bases: dict[str, Tensor] = {
            key: layer.empty_basis(key) for layer in self.layers.values() for key in layer.keys
        }
        self.n_updates = 0
        self._hosts: dict[str, list[nn.Module]] = {}  # by layer name, in whose forward its weight is applied
        self._modules = {name: layer.module for name, layer in self.layers.items()}
        self._protection: Protection | None = None  # while `protect` is open
        self._open: ExitStack | None = None  # what `start` opened
        self._watcher = Watcher()
        self._watcher.say_what_can_forget(self)

    def __repr__(self) -> str:
        return table(self)

    @property
    def columns(self) -> dict[str, int]:
        """k, the number of basis columns (of an embedding: of rows), by key."""
        return {key: basis.shape[-1] for key, basis in self.bases.items()}

    @property
    def input_sizes(self) -> dict[str, int]:
        """d, the most columns a basis can have, by key."""
        return {key: d for layer in self.layers.values() for key, d in layer.sizes.items()}

    @property
    def full_layers(self) -> list[str]:
        """Keys whose every direction is taken: these layers can no longer learn."""
        sizes = self.input_sizes
        return [key for key, k in self.columns.items() if k == sizes[key]]

    @property
    def unprotected(self) -> list[str]:
        """The names of all parameters that are trained and neither protected nor frozen with the normalisations."""
        covered = {id(p) for layer in self.layers.values() for p in layer.parameters}
        covered |= {id(p) for p in self._normalization()}
        return [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in covered]

    def _normalization(self) -> list[nn.Parameter]:
        return normalization_parameters(self.model, self.exclude, self.include)

    def check(
        self, forward: Forward, batch: Any, threshold: float | Mapping[str, float] = 1.0, mask: Mask | None = None
    ) -> Check:
        """Look before the first task at what the memory will do, without changing anything.

        Args:
            forward, mask: as in `update`.
            batch: a batch like those that `update` will be given.
            threshold: ε, to say which layers will be full; 1 gives the worst case.
        Returns:
            a report, to be printed: layers that do not run, what is not protected, memory and time to expect, layers
            that will be full, weights that are also used otherwise. The latter are warned of too.
        """
        found = inspect(self, forward, batch, thresholds_by_layer(threshold, self.layers), mask)
        for leak in found.leaks:
            self._watcher.say_leak(leak)
        return found

    def update(
        self,
        forward: Forward,
        batches: Any,
        threshold: float | Mapping[str, float],
        samples: Mapping[str, int] | None = None,
        *,
        mask: Mask | None = None,
        rows: int | None = None,
        max_columns: int | None = None,
        max_memory: int = MAX_MEMORY,
    ) -> None:
        """Remember the task just learned (paper Eqs. 5, 8 and 9).

        In a process group all processes must call it, each with its share of the samples.

        Args:
            forward: runs the model on one batch, for example `lambda images: model(images, task)`; or the model itself.
            batches: representative training samples of the task: batches in a list or a DataLoader, or one batch, as a
                tensor or a dict. A few hundred samples are usual. Tensors are moved to the model's device.
            threshold: ε in (0, 1], one for all layers or one by layer name.
            samples: by layer name, how many samples of each batch become columns, the first ones; all where unnamed.
            mask: which positions count, such as tokens that are no padding: a function of the batch, or its key in a
                dict, that gives (batch,) or (batch, positions) booleans.
            rows: at most so many columns of each batch and layer, drawn at random.
            max_columns: at most so many columns for each basis; a warning says what share of the energy is then held.
            max_memory: bytes that matrices of inputs may take at once; if they need more, batches run more than once.
        Raises:
            ValueError: a threshold is out of range.
            InputError: layers did not run, a name is unknown, it is called within `protect`, or batches that can run
                only once would have to run more often.
            DivergenceError: a layer's inputs are infinite or NaN.
        """
        thresholds = thresholds_by_layer(threshold, self.layers)  # before the work
        for name, count in (("rows", rows), ("max_columns", max_columns)):
            if count is not None and (not isinstance(count, int) or count < 1):
                raise InputError(f"{name} is {count!r}; it must be a whole number, 1 or more")
        # Where all is remembered, which directions are strong is no matter.
        whole = [name for name, epsilon in thresholds.items() if epsilon == 1 and max_columns is None]
        fast = not self.exact and max(thresholds.values()) <= FAST_THRESHOLD
        bases: dict[str, Tensor] = {}
        for layers, again in passes(self.layers, self.model, forward, batches, samples, mask, max_memory, whole):
            gatherer = Gatherer(layers, samples, rows, fast, unit=whole)
            gathered = self._gathered(forward, again, samples, mask, gatherer)
            bases |= self._grown(gathered, thresholds, fast, max_columns)
        self.replace(bases)

    def gather(
        self,
        forward: Forward,
        batches: Any,
        samples: Mapping[str, int] | None = None,
        mask: Mask | None = None,
        keep_columns: bool = False,
    ) -> dict[str, Representation | SeenRows]:
        """What the protected layers see, by key: the first half of `update`, with its arguments and errors.

        With `keep_columns` all columns are held as they are, however many. Other than by `update` with ε = 1, columns
        that are 1e7 times shorter than others count as rounding of these.
        """
        return self._gathered(
            forward, as_batches(batches), samples, mask, Gatherer(self.layers, samples, keep_columns=keep_columns)
        )

    def extend(self, gathered: Mapping[str, Representation | SeenRows], threshold: float | Mapping[str, float]) -> None:
        """Extend the bases by what was gathered: the second half of `update`."""
        self.replace(self._grown(gathered, thresholds_by_layer(threshold, self.layers)))

    def _gathered(
        self,
        forward: Forward,
        batches: Iterable[Any],
        samples: Mapping[str, int] | None,
        mask: Mask | None,
        gatherer: Gatherer,
    ) -> dict[str, Representation | SeenRows]:
        if self.is_protecting:
            raise InputError("update within protect() would protect only once that is entered anew; leave it first")
        if samples is not None and not isinstance(samples, Mapping):
            raise InputError(f"samples is a {type(samples).__name__}; it must be a dict of counts by layer name")
        for name, count in (samples or {}).items():
            if name not in self.layers or count < 1:
                raise InputError(
                    f"samples has {name!r}: {count}; it must give layers 1 or more: {', '.join(self.layers)}"
                )
        gathered = gather(gatherer, self.model, forward, batches, mask)
        for name, modules in gatherer.hosts.items():
            known = self._hosts.setdefault(name, [])
            known += [module for module in modules if module not in known]
        self._watcher.say_leaks(gatherer.leaks)
        return gathered

    def _grown(
        self,
        gathered: Mapping[str, Representation | SeenRows],
        thresholds: Mapping[str, float],
        fast: bool = False,
        max_columns: int | None = None,
    ) -> dict[str, Tensor]:
        """New bases by key; what `max_columns` leaves out is said."""
        rule = self.rank_rule if self.n_updates == 0 else "paper"
        layers = self.layers.values()
        bases, losses = grown(layers, self.bases, gathered, thresholds, rule, fast=fast, max_columns=max_columns)
        for loss in losses:
            self._watcher.say(loss)
        return bases

    def replace(self, bases: Mapping[str, Tensor]) -> None:
        """Remember a task by bases that were made otherwise: (d, k) float64 with orthonormal columns, by key.

        The network as it is now is what `verify` compares with from then on.
        """
        before = set(self.full_layers)
        self.bases = {key: bases[key] for key in self.bases}
        self.n_updates += 1
        self._watcher.remember(self)
        if new := [key or "the model" for key in self.full_layers if key not in before]:
            whole = len(self.full_layers) == len(self.bases)
            which = "every layer is" if whole else f"{', '.join(new)} {'are' if len(new) > 1 else 'is'}"
            self._watcher.say(
                f"{which} full after task {self.n_updates}: no direction is free, so no later task can train "
                f"{'anything' if whole else 'them' if len(new) > 1 else 'it'}; a lower threshold leaves more",
                FullLayerWarning,
            )

    @contextmanager
    def protect(
        self,
        optimizer: Any | None = None,
        freeze_unprotected: bool = False,
        projector: Callable[[Layer], LayerProjector] | None = None,
    ) -> Iterator[dict[str, LayerProjector]]:
        """Within this context training leaves what is remembered alone; before the first update it does nothing.

        Gradients of the protected layers come out orthogonal to their bases, and the parameters of normalisation layers
        are frozen, since moving them would change every old task (paper Sec. 5).

        Args:
            optimizer: what will train, one or a list, also inside the wrappers of other libraries. Where its steps are
                no combination of this task's gradients (Adam, weight decay, momentum from before), its updates are
                projected as well. Without it, such an optimiser is warned of at its first step.
            freeze_unprotected: also freeze what is trained and not protected, such as other kinds of layers.
            projector: what the gradient of a layer goes through, for methods that project otherwise than orthogonally.
        Yields:
            the projectors by layer name.
        Raises:
            InputError: a protected module was replaced by another, or half of it was frozen, since the memory was made.
        """
        self._check_modules()
        make = projector or (lambda layer: layer_projector(layer, self.bases))
        projectors = {name: make(layer) for name, layer in self.layers.items()}
        with ExitStack() as stack:
            if self.n_updates and self._watcher.snapshot is None:  # the memory was loaded
                self._watcher.remember(self)
            if self.n_updates:
                frozen_ones = [*self._normalization(), *(self._open_parameters() if freeze_unprotected else ())]
                stack.enter_context(frozen(frozen_ones))
                if concern := what_rounds(self.layers):
                    self._watcher.say(concern)
            protection = stack.enter_context(projecting(projectors, self._hosts))
            stack.enter_context(watching(self.model, protection, partial(self._watcher.say_of_the_first_pass, self)))
            inner = [] if optimizer is None else trainers(optimizer, self.model)
            leaving = [each for each in inner if leaves_gradients(each, projectors.values())]
            stack.enter_context(self._projecting_updates(leaving, projectors))
            orthogonal = projectors if projector is None else {}
            stack.enter_context(self._watcher.steps(self, orthogonal))
            self._protection = protection
            try:
                yield projectors
                self._watcher.say_what_moved(self, orthogonal)
            finally:
                self._protection = None

    def _open_parameters(self) -> list[nn.Parameter]:
        names = set(self.unprotected)
        return [p for name, p in self.model.named_parameters() if name in names]

    def _check_modules(self) -> None:
        """Raise InputError where protected modules are no longer what they were; warn of layers that came since."""
        refuse_sharded(self.model)
        refuse_changed(self, self._modules)
        self._watcher.say_what_can_forget(self)

    def start(self, optimizer: Any | None = None, freeze_unprotected: bool = False) -> None:
        """Open `protect` without a with statement, for loops that others drive by callbacks; `stop` closes it."""
        if self._open is not None:
            raise InputError("start() was called already; stop() comes first")
        stack = ExitStack()
        stack.enter_context(self.protect(optimizer, freeze_unprotected))
        self._open = stack

    def stop(self) -> None:
        """Close what `start` opened; does nothing otherwise."""
        if self._open is not None:
            stack, self._open = self._open, None
            stack.close()

    @property
    def is_protecting(self) -> bool:
        """Whether `protect` is open."""
        return self._protection is not None

    @contextmanager
    def raw(self) -> Iterator[None]:
        """Within this context, inside `protect`, backward leaves gradients as they are: for an ascent step, or to test
        them; `project_gradients` projects those that are to be stepped on."""
        if self._protection is None:
            yield
            return
        self._protection.is_on = False
        try:
            yield
        finally:
            self._protection.is_on = True

    @torch.no_grad()
    def project_gradients(self, projectors: Mapping[str, LayerProjector] | None = None) -> None:
        """Project the gradients that the parameters hold, inside `protect`, as backward outside `raw` would have.

        Args:
            projectors: what they go through, of some layers, instead.
        """
        if self._protection is None:
            return
        for project in (self._protection.projectors if projectors is None else projectors).values():
            if project.is_idle or (raw := gradients(project)) is None:
                continue
            for parameter, gradient in zip(project.layer.parameters, project(*raw), strict=True):
                if parameter is not None:
                    parameter.grad = gradient

    @contextmanager
    def protect_update(self, optimizer: Any) -> Iterator[None]:
        """Within this context every `optimizer.step()` moves the protected weights orthogonally to their bases.

        What `protect(optimizer)` does where it is needed, by itself. It projects the update, W ← W₀ + (W - W₀) P, at
        the price of a copy of the weights.
        """
        projectors = {name: layer_projector(layer, self.bases) for name, layer in self.layers.items()}
        with self._projecting_updates(unwrapped(optimizer), projectors):
            yield

    @contextmanager
    def _projecting_updates(
        self, optimizers: Sequence[torch.optim.Optimizer], projectors: Mapping[str, LayerProjector]
    ) -> Iterator[None]:
        """Project what optimisers do, which the watcher then need not warn of."""
        mine = {id(optimizer) for optimizer in optimizers} - self._watcher.projected
        self._watcher.projected |= mine
        try:
            with ExitStack() as stack:
                for optimizer in optimizers:
                    stack.enter_context(projected_updates(optimizer, projectors))
                yield
        finally:
            self._watcher.projected -= mine

    def verify(self, forward: Forward, batch: Any, mask: Mask | None = None) -> Verification:
        """Measure how far outputs on a batch have moved since the last update, for each layer and at the end.

        Args:
            forward, mask: as in `update`.
            batch: of an old task; one that `update` was given shows whether the guarantee holds, any other what the
                bases do not hold.
        Returns:
            a report, to be printed: what moved, what rounding explains, and what share of each layer's inputs its basis
            does not hold, ‖R - M Mᵀ R‖ / ‖R‖.
        Raises:
            InputError: nothing has been remembered yet.
        """
        if self._watcher.snapshot is None:
            raise InputError("there is nothing to compare with: update() or protect() comes first")
        self._check_modules()
        return verification(self, self._watcher.snapshot, forward, batch, mask)

    def leak(self, before: Mapping[str, Tensor]) -> dict[str, float | None]:
        """‖ΔW M‖ / ‖ΔW‖ by key: the part of the weights' movement in protected directions; rounding, if all is well.

        Args:
            before: the model's state_dict from where the movement is measured, on any device.
        Returns:
            None where nothing moved beyond rounding, as it should be in a full layer.
        """
        return leaks(self, before)

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs, tensors and plain values only."""
        names = {module: name for name, module in self.model.named_modules()}
        hosts = {name: [names[m] for m in modules if m in names] for name, modules in self._hosts.items()}
        return {"bases": dict(self.bases), "n_updates": self.n_updates, "hosts": hosts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved memory; raises InputError where it is not of this model's layers."""
        if not isinstance(state, Mapping) or not {"bases", "n_updates"} <= state.keys():
            raise InputError("this is no memory's state; give what state_dict() returned")
        found = {key: basis.shape[0] if basis.ndim == 2 else None for key, basis in state["bases"].items()}
        expected = {key: d if self.bases[key].ndim == 2 else None for key, d in self.input_sizes.items()}
        if expected != found:
            wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key, -1) != found.get(key, -1))
            raise InputError(f"the saved memory is of another model: layers {', '.join(wrong)} differ in name or size")
        for key, basis in state["bases"].items():
            if basis.ndim == 2 and not torch.allclose(basis.norm(dim=0), basis.new_ones(basis.shape[1]), atol=1e-6):
                raise InputError(f"the saved basis of {key} is damaged: its columns are not of length 1")
        devices = {key: layer.device for layer in self.layers.values() for key in layer.keys}
        self.bases = {key: state["bases"][key].to(devices[key]) for key in self.bases}
        self.n_updates = state["n_updates"]
        # Older versions saved the places of modules instead of their names.
        modules = dict(self.model.named_modules()) | dict(enumerate(self.model.modules()))
        hosts = state.get("hosts", {})
        self._hosts = {name: [modules[n] for n in names if n in modules] for name, names in hosts.items()}
        self._watcher.snapshot = None

    def save(self, path: str | Path) -> None:
        """Write the memory to a file."""
        save_tensors(Path(path), self.state_dict())

    def load(self, path: str | Path) -> None:
        """Read a memory that `save` wrote; raises InputError where the file is damaged or of another model."""
        state = load_tensors(Path(path))
        if not isinstance(state, Mapping) or not {"bases", "n_updates"} <= state.keys():
            raise InputError(f"{path} holds no memory; give a file that `save` wrote")
        self.load_state_dict(state)
