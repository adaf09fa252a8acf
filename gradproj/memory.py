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
from gradproj.projection import LayerProjector, full_float32, layer_projector, projected_gradients
from gradproj.representation import Representation, find_layers, kept_modules, representations
from gradproj.subspace import RankRule, extend_basis, extend_basis_from_gram

Normalization = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


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
        self.is_protecting = False
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
        if self.is_protecting:
            raise InputError("update within protect() would protect only once that is entered anew; leave it first")
        thresholds = self._thresholds(threshold)
        for name, count in (samples or {}).items():
            if name not in self.layers or count < 1:
                raise InputError(
                    f"samples has {name!r}: {count}; it must give layers 1 or more: {', '.join(self.layers)}"
                )
        training_modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            gathered = representations(self.layers, forward, batches, samples)
        finally:
            for module, mode in training_modes.items():
                module.training = mode
        rule = self.rank_rule if self.n_updates == 0 else "paper"
        extended = {}
        for layer in self.layers.values():
            for key in layer.keys:
                if not gathered[key].is_finite:
                    raise DivergenceError(f"the inputs of layer {key} are infinite or NaN: the network has diverged")
                extended[key] = _extend(self.bases[key], gathered[key], thresholds[layer.name], rule)
        self.bases = extended
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
    def protect(self) -> Iterator[dict[str, LayerProjector]]:
        """Within this context training leaves what is remembered alone; before the first update it does nothing.

        Gradients of the protected layers come out orthogonal to their bases, and the parameters of normalisation layers
        are frozen, since moving them would change every old task (paper Sec. 5).

        With an optimiser that moves weights off the projected gradient (Adam, weight decay, momentum kept from the task
        before), also wrap it in `protect_update`.
        """
        freezing = frozen(normalization_parameters(self.model, self.exclude)) if self.n_updates else nullcontext()
        with freezing, projected_gradients(self.layers, self.bases) as projectors:
            self.is_protecting = True
            try:
                yield projectors
            finally:
                self.is_protecting = False

    @contextmanager
    def protect_update(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Within this context every `optimizer.step()` moves the protected weights orthogonally to their bases.

        For optimisers whose update is not a combination of this task's gradients: Adam rescales entries, weight decay
        adds W, momentum may date from an earlier task. It projects the update itself, W ← W₀ + (W - W₀) P, at the
        price of a copy of the weights.
        """
        projectors = {name: layer_projector(layer, self.bases) for name, layer in self.layers.items()}
        before: dict[str, list[Tensor | None]] = {}

        def remember(*_: Any) -> None:
            for name, layer in self.layers.items():
                before[name] = [None if p is None else p.detach().clone() for p in _parameters(layer.module)]

        @torch.no_grad()
        def project(*_: Any) -> None:
            for name, layer in self.layers.items():
                if projectors[name].is_idle:
                    continue
                old, now = before[name], _parameters(layer.module)
                with full_float32(now[0]):
                    moved = projectors[name](*(None if p is None else p - o for p, o in zip(now, old, strict=True)))
                for parameter, start, step in zip(now, old, moved, strict=True):
                    if parameter is not None:
                        parameter.copy_(start + step)

        with optimizer.register_step_pre_hook(remember), optimizer.register_step_post_hook(project):
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
            weight, bias = layer.module.weight, layer.module.bias
            rows = (weight - before[f"{name}.weight".lstrip(".")].to(weight)).flatten(1)  # (o, d)
            if bias is not None:
                rows = torch.cat([rows, (bias - before[f"{name}.bias".lstrip(".")].to(bias))[:, None]], dim=1)
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


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within this context the parameters get no gradient; those that got none before get none afterwards."""
    changed = [p for p in parameters if p.requires_grad]
    for p in changed:
        p.requires_grad_(False)
        p.grad = None  # an optimiser would go on using it
    try:
        yield
    finally:
        for p in changed:
            p.requires_grad_(True)


def normalization_parameters(model: nn.Module, exclude: Iterable[str] = ()) -> list[nn.Parameter]:
    """Scales and shifts of a model's normalisation layers, but for those in some modules."""
    modules = kept_modules(model, exclude).values()
    return [p for module in modules if isinstance(module, Normalization) for p in module.parameters(recurse=False)]


def _parameters(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    return module.weight, module.bias


def _extend(basis: Tensor, representation: Representation, threshold: float, rank_rule: RankRule) -> Tensor:
    if representation.gram is not None:
        return extend_basis_from_gram(basis, representation.gram, threshold, rank_rule)
    return extend_basis(basis, representation.columns, threshold, rank_rule)
