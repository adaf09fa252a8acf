"""GradientProjectionMemory: what a network must not forget, as one orthonormal basis for each layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from gradproj.errors import DivergenceError, InputError
from gradproj.files import load_tensors, save_tensors
from gradproj.layers import Layer, find_layers, kept_modules
from gradproj.normalization import frozen, normalization_parameters
from gradproj.optimizers import projected_updates
from gradproj.projection import LayerProjector, full_float32, layer_projector
from gradproj.protection import Protection, projecting
from gradproj.representation import Representation, representations
from gradproj.subspace import RankRule, extend_basis


class GradientProjectionMemory:
    """The bases of a model's layers, and the protection they give (Saha, Garg and Roy, ICLR 2021, Algorithm 1).

    Args:
        model: any module. Its Linear and convolution layers are protected and its normalisation layers frozen. What
            else in it learns (attention's projections, recurrent layers, embeddings) would forget: a warning names it.
        exclude: names of modules to leave out, such as the task heads.
        rank_rule: "released" keeps one direction fewer after the first task, as the authors' released code does.
    Raises:
        InputError: the model has no layer to protect, an argument is unknown, or a weight belongs to two modules.

    Attributes:
        layers: the protected layers by name.
        bases: (d, k) float64 by key: the layer's name, or name[g] for group g of a grouped convolution.

    Example:
        >>> memory = GradientProjectionMemory(model, exclude=["heads"])
        >>> for task in tasks:
        ...     with memory.protect():
        ...         train(model, task)
        ...     memory.update(lambda images: model(images, task), [samples], threshold=0.97)
    """

    def __init__(self, model: nn.Module, exclude: Iterable[str] = (), rank_rule: RankRule = "paper") -> None:
        exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.model = model
        self.layers = find_layers(model, exclude)
        if not self.layers:
            raise InputError(f"{type(model).__name__} has no Linear or convolution layer to protect")
        if rank_rule not in get_args(RankRule):
            raise InputError(f"rank_rule is {rank_rule!r}; it must be one of: {', '.join(get_args(RankRule))}")
        self.rank_rule: RankRule = rank_rule
        self.exclude = exclude
        self._protection: Protection | None = None  # while `protect` is open
        self._warn_of_what_can_forget()
        self.bases: dict[str, Tensor] = {
            key: layer.module.weight.new_zeros(layer.input_size, 0, dtype=torch.float64)
            for layer in self.layers.values()
            for key in layer.keys
        }
        self.n_updates = 0

    def _warn_of_what_can_forget(self) -> None:
        covered = {id(p) for layer in self.layers.values() for p in layer.module.parameters()}
        covered |= {id(p) for p in normalization_parameters(self.model, self.exclude)}
        modules = kept_modules(self.model, self.exclude)
        open_parameters = [
            f"{name}.{own}".lstrip(".")
            for name, module in modules.items()
            for own, p in module.named_parameters(recurse=False)
            if p.requires_grad and id(p) not in covered
        ]
        if open_parameters:
            warnings.warn(
                f"not protected, so old tasks may be forgotten through them: {', '.join(open_parameters)}; freeze them "
                "(requires_grad_(False)) or exclude their modules",
                stacklevel=3,
            )
        moving = [name for name, m in modules.items() if getattr(m, "track_running_stats", False)]
        if moving:
            warnings.warn(
                f"running statistics of {', '.join(moving)} go on moving, and with them old tasks' outputs; use "
                "track_running_stats=False, or keep these modules in eval mode after the first task",
                stacklevel=3,
            )

    @property
    def columns(self) -> dict[str, int]:
        """k, the number of basis columns, by key."""
        return {key: basis.shape[1] for key, basis in self.bases.items()}

    @property
    def input_sizes(self) -> dict[str, int]:
        """d, the most columns a basis can have, by key."""
        return {key: basis.shape[0] for key, basis in self.bases.items()}

    @property
    def full_layers(self) -> list[str]:
        """Keys whose every direction is taken: these layers can no longer learn."""
        return [key for key, basis in self.bases.items() if basis.shape[1] == basis.shape[0]]

    def update(
        self,
        forward: Callable[[Any], Any],
        batches: Iterable[Any],
        threshold: float | Mapping[str, float],
        samples: Mapping[str, int] | None = None,
    ) -> None:
        """Remember the task just learned (paper Eqs. 5, 8 and 9).

        Args:
            forward: runs the model on one batch, for example `lambda images: model(images, task)`.
            batches: representative training samples of the task; one batch of a few hundred is usual.
            threshold: ε in (0, 1], one for all layers or one by layer name.
            samples: by layer name, how many samples of each batch become columns; all where unnamed.
        Raises:
            ValueError: a threshold is out of range.
            InputError: a protected layer did not run, a name is unknown, or it is called within `protect`.
            DivergenceError: a layer's inputs are infinite or NaN.
        """
        self._thresholds(threshold)  # before the work
        self.extend(self.gather(forward, batches, samples), threshold)

    def gather(
        self,
        forward: Callable[[Any], Any],
        batches: Iterable[Any],
        samples: Mapping[str, int] | None = None,
        keep_columns: bool = False,
    ) -> dict[str, Representation]:
        """The inputs of the protected layers by key: the first half of `update`, with its arguments and errors.

        With `keep_columns` they are all held as they are, however many.
        """
        if self.is_protecting:
            raise InputError("update within protect() would protect only once that is entered anew; leave it first")
        for name, count in (samples or {}).items():
            if name not in self.layers or count < 1:
                raise InputError(
                    f"samples has {name!r}: {count}; it must give layers 1 or more: {', '.join(self.layers)}"
                )
        training_modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            gathered = representations(self.layers, forward, batches, samples, keep_columns)
        finally:
            for module, mode in training_modes.items():
                module.training = mode
        for key, representation in gathered.items():
            if not representation.is_finite:
                raise DivergenceError(f"the inputs of layer {key} are infinite or NaN: the network has diverged")
        return gathered

    def extend(self, gathered: Mapping[str, Representation], threshold: float | Mapping[str, float]) -> None:
        """Extend the bases by what was gathered: the second half of `update`."""
        thresholds = self._thresholds(threshold)
        rule = self.rank_rule if self.n_updates == 0 else "paper"
        bases = {
            key: extend_basis(self.bases[key], gathered[key], thresholds[layer.name], rule)
            for layer in self.layers.values()
            for key in layer.keys
        }
        self.replace(bases)

    def replace(self, bases: Mapping[str, Tensor]) -> None:
        """Remember a task by bases that were made otherwise: (d, k) float64 with orthonormal columns, by key."""
        self.bases = dict(bases)
        self.n_updates += 1

    def _thresholds(self, given: float | Mapping[str, float]) -> dict[str, float]:
        """ε of each layer, from one for all or one by name."""
        values = dict(given) if isinstance(given, Mapping) else dict.fromkeys(self.layers, given)
        if values.keys() != self.layers.keys():
            wrong = ", ".join(sorted(values.keys() ^ self.layers.keys()))
            raise InputError(f"threshold differs from the layers in {wrong}; the layers are: {', '.join(self.layers)}")
        try:
            return {name: float(number) for name, number in values.items()}
        except (TypeError, ValueError) as error:
            raise InputError(f"threshold is {given!r}; it must be a number, or one by layer name") from error

    @contextmanager
    def protect(
        self, projector: Callable[[Layer], LayerProjector] | None = None
    ) -> Iterator[dict[str, LayerProjector]]:
        """Within this context training leaves what is remembered alone; before the first update it does nothing.

        Gradients of the protected layers come out orthogonal to their bases, and the parameters of normalisation layers
        are frozen, since moving them would change every old task (paper Sec. 5).

        With an optimiser that moves weights off the projected gradient (Adam, weight decay, momentum kept from the task
        before), also wrap it in `protect_update`.

        Args:
            projector: what the gradient of a layer goes through, for methods that project otherwise than orthogonally.
        Yields:
            the projectors by layer name.
        """
        make = projector or (lambda layer: layer_projector(layer, self.bases))
        projectors = {name: make(layer) for name, layer in self.layers.items()}
        freezing = frozen(normalization_parameters(self.model, self.exclude)) if self.n_updates else nullcontext()
        with freezing, projecting(projectors) as switch:
            self._protection = switch
            try:
                yield projectors
            finally:
                self._protection = None

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
    def project_gradients(self) -> None:
        """Project the gradients that the parameters hold, inside `protect`, as backward outside `raw` would have."""
        if self._protection is None:
            return
        for project in self._protection.projectors.values():
            weight, bias = project.layer.parameters
            if weight.grad is None or project.is_idle:
                continue
            with full_float32(weight):
                projected = project(weight.grad, None if bias is None else bias.grad)
            for parameter, gradient in zip((weight, bias), projected, strict=True):
                if parameter is not None:
                    parameter.grad = gradient

    @contextmanager
    def protect_update(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Within this context every `optimizer.step()` moves the protected weights orthogonally to their bases.

        For optimisers whose update is not a combination of this task's gradients: Adam rescales entries, weight decay
        adds W, momentum may date from an earlier task. It projects the update itself, W ← W₀ + (W - W₀) P, at the
        price of a copy of the weights.
        """
        projectors = {name: layer_projector(layer, self.bases) for name, layer in self.layers.items()}
        with projected_updates(optimizer, projectors):
            yield

    @torch.no_grad()
    def leak(self, before: Mapping[str, Tensor]) -> dict[str, float | None]:
        """‖ΔW M‖ / ‖ΔW‖ by key: the part of the weights' movement in protected directions; rounding, if all is well.

        Args:
            before: the model's state_dict from where the movement is measured, on any device.
        Returns:
            None where nothing moved, as in a full layer.
        """
        ratios = {}
        for name, layer in self.layers.items():
            old = [before.get(f"{name}.{part}".lstrip(".")) for part in ("weight", "bias")]
            moved = [None if p is None else p - o.to(p) for p, o in zip(layer.parameters, old, strict=True)]
            rows = layer.rows(*moved)  # (o, d)
            for key, part in zip(layer.keys, rows.chunk(layer.groups), strict=True):
                basis, length = self.bases[key], part.norm().item()
                with full_float32(part):
                    inside = (part @ basis.to(part.dtype)).norm().item()
                full = basis.shape[1] == basis.shape[0]
                ratios[key] = None if full or length == 0 else inside / length
        return ratios

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs, tensors and plain numbers only."""
        return {"bases": dict(self.bases), "n_updates": self.n_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved memory; raises InputError where it is not of this model's layers."""
        expected, found = self.input_sizes, {key: len(basis) for key, basis in state["bases"].items()}
        if expected != found:
            wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
            raise InputError(f"the saved memory is of another model: layers {', '.join(wrong)} differ in name or size")
        self.bases = {key: state["bases"][key].to(self.bases[key]) for key in self.bases}
        self.n_updates = state["n_updates"]

    def save(self, path: str | Path) -> None:
        """Write the memory to a file."""
        save_tensors(Path(path), self.state_dict())

    def load(self, path: str | Path) -> None:
        """Read a memory that `save` wrote; raises InputError where the file is damaged or of another model."""
        state = load_tensors(Path(path))
        if not isinstance(state, dict) or not {"bases", "n_updates"} <= state.keys():
            raise InputError(f"{path} holds no memory; give a file that `save` wrote")
        self.load_state_dict(state)
