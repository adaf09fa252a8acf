"""What a layer is to the rest of the library: rows [W, b] that act on columns, in one or more groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Entries of one block of columns: blocks bound the memory that unfolding takes, 128 MiB in float64.
BLOCK_ENTRIES = 2**24


class Call(NamedTuple):
    """A torch function that applies a weight: the names of its arguments, and which are weight and bias."""

    arguments: tuple[str, ...]
    weight: str = "weight"
    bias: str = "bias"


class Layer:
    """A weight, perhaps with its bias, that can be protected: the output is [W, b] times the columns of the input.

    A layer in groups is as many layers side by side, so it has one subspace for each group. A trained bias sees the
    constant 1 as one more input. Where only one of weight and bias is trained, only that one is meant.

    Args:
        name: of the module.
        module: which has the parameters.

    Attributes:
        kind: what it is called in tables.
        modules: the module classes of this kind.
        functions: the torch functions by which a forward may apply its weight.
        weight_name, bias_name: of its parameters in the module.
        trained: whether weight and bias were trained when the layer was found.
    """

    kind: ClassVar[str]
    modules: ClassVar[tuple[type[nn.Module], ...]] = ()
    functions: ClassVar[Mapping[Callable[..., Any], Call]]
    weight_name: ClassVar[str] = "weight"
    bias_name: ClassVar[str] = "bias"

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module: Any = module  # its attributes depend on the kind
        weight, bias = self.all_parameters
        self.trained = (weight.requires_grad, bias is not None and bias.requires_grad)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether a module is of this kind."""
        return isinstance(module, cls.modules)

    @property
    def owners(self) -> tuple[tuple[nn.Module, str], ...]:
        """Where a forward looks its parameters up: modules, with the parameter's name there."""
        return (self.module, self.weight_name), (self.module, self.bias_name)

    @property
    def all_parameters(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Weight and bias, trained or not; as they are now, whatever has been done to the module."""
        return getattr(self.module, self.weight_name), getattr(self.module, self.bias_name, None)

    @property
    def parameters(self) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        """Weight and bias as far as they are trained."""
        (weight, bias), (has_weight, has_bias) = self.all_parameters, self.trained
        return weight if has_weight else None, bias if has_bias else None

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return self.all_parameters[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Of its parameters."""
        return self.all_parameters[0].dtype

    @property
    def groups(self) -> int:
        return 1

    @property
    def weight_size(self) -> int:
        """Inputs that one output unit sees through the weight."""
        return self.all_parameters[0].shape[1:].numel()

    @property
    def input_size(self) -> int:
        """d: inputs that one output unit sees, a bias's constant 1 included."""
        return self.trained[0] * self.weight_size + self.trained[1]

    @property
    def keys(self) -> list[str]:
        """The names of the layer's subspaces: its own, or one for each group."""
        return [self.name] if self.groups == 1 else [f"{self.name}[{g}]" for g in range(self.groups)]

    def weight_rows(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as rows (o, inputs), group after group."""
        return weight.flatten(1)

    def weight_from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of `weight_rows`."""
        return rows.reshape(self.all_parameters[0].shape)

    def rows(self, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Tensors of the shapes of what is trained of weight and bias as one matrix [W, b] (o, d)."""
        parts = [] if weight is None else [self.weight_rows(weight)]
        parts += [] if bias is None else [bias[:, None]]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def rows_by_key(self, weight: Tensor | None, bias: Tensor | None) -> dict[str, Tensor]:
        """The rows [W, b] of each group (o / groups, d), by key."""
        return dict(zip(self.keys, self.rows(weight, bias).chunk(self.groups), strict=True))

    def from_rows(self, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The inverse of `rows`."""
        has_weight, has_bias = self.trained
        weight = self.weight_from_rows(rows[:, : rows.shape[1] - has_bias]) if has_weight else None
        return weight, rows[:, -1] if has_bias else None

    @property
    def sizes(self) -> dict[str, int]:
        """By key, the most columns that its subspace can have."""
        return dict.fromkeys(self.keys, self.input_size)

    def empty_basis(self, key: str) -> Tensor:
        """A subspace of which nothing is known yet: no columns (d, 0)."""
        return torch.zeros(self.sizes[key], 0, dtype=torch.float64)

    def inputs(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Sequence[Tensor]:
        """The inputs that its weight is applied to in a call of one of `functions`.

        Args:
            function: what was called.
            arguments: by name.
        """
        return [arguments["input"]]

    def understands(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a call of one of `functions` applies the weight as the module would."""
        return True

    def adds_bias(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> bool:
        """Whether a call of one of `functions` adds a bias, which a forward of the user's own may leave out."""
        return arguments.get(self.functions[function].bias) is not None

    def outputs(
        self, function: Callable[..., Any], arguments: Mapping[str, Any], weight: Tensor | None, bias: Tensor | None
    ) -> list[Tensor]:
        """What a call of one of `functions` makes with other parameters, None being zeros: one for each input."""
        call = self.functions[function]
        first = self.all_parameters[0]
        bias = bias if self.adds_bias(function, arguments) else None
        given = {call.weight: torch.zeros_like(first) if weight is None else weight, call.bias: bias}
        changed = {**arguments, **given}
        return [function(**{name: changed[name] for name in call.arguments if name in changed})]

    def signature(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """What else than the input decides the columns of a call: layers of one signature share them."""
        return (type(self), self.weight_size, *self.trained, self.adds_bias(function, arguments))

    def seen(
        self, inputs: Tensor, function: Callable[..., Any], arguments: Mapping[str, Any]
    ) -> Iterator[dict[str, Tensor]]:
        """What an input adds to each subspace, by key, a few samples at a time: columns (d, n).

        Args:
            inputs: samples along the first axis, or one sample without it.
            function, arguments: of the call.
        """
        for columns in self.blocks(inputs, arguments, self.adds_bias(function, arguments)):
            yield dict(zip(self.keys, columns, strict=True))

    def blocks(self, inputs: Tensor, arguments: Mapping[str, Any], adds_bias: bool = True) -> Iterator[list[Tensor]]:
        """The columns (d, n) that an input gives, one for each group, a few samples at a time."""
        for block in self.batched(inputs).split(self.block_length(inputs)):
            columns = self.weight_columns(block, arguments)
            if not self.trained[0]:
                columns = [c[:0] for c in columns]
            yield [with_constant(c, adds_bias) if self.trained[1] else c for c in columns]

    def block_length(self, inputs: Tensor) -> int:
        """How many samples of an input make one block: a patch repeats its pixels up to kernel-size times."""
        return max(1, BLOCK_ENTRIES // (self.input_size * max(1, self.positions(self.batched(inputs)))))

    def position_axes(self, inputs: Tensor) -> int:
        """The leading axes of an input that number samples and positions in them."""
        return inputs.ndim - 1

    def columns(self, inputs: Tensor) -> list[Tensor]:
        """The columns of the representation matrix that an input of the module gives: one (d, n) tensor a group."""
        blocks = self.blocks(*self.module_call(inputs))
        return [torch.cat(parts, dim=1) for parts in zip(*blocks, strict=True)]

    def module_call(self, inputs: Tensor) -> tuple[Tensor, Mapping[str, Any]]:
        """The input and the arguments with which the module calls its function."""
        return inputs, {}

    def weight_columns(self, inputs: Tensor, arguments: Mapping[str, Any]) -> list[Tensor]:
        """The columns of an input without the constant 1 of a bias: one tensor a group."""
        raise NotImplementedError

    def batched(self, inputs: Tensor) -> Tensor:
        """An input with the axis of samples, also if it came without."""
        return inputs if inputs.ndim > 1 else inputs[None]

    def positions(self, inputs: Tensor) -> int:
        """At most how many columns one sample of an input gives."""
        raise NotImplementedError

    def inside(self, key: str, basis: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """How much of a change of the parameters lies in a subspace: the lengths of that part and of the whole.

        Args:
            key: of the subspace.
            basis: of it.
            weight, bias: the change of each, as far as it is trained.
        """
        part = self.rows_by_key(weight, bias)[key].double()  # (o / groups, d)
        return (part @ basis.to(part)).norm(), part.norm()


def with_constant(columns: Tensor, adds_bias: bool = True) -> Tensor:
    """Columns (d, n) with what a bias sees, (d + 1, n): the constant 1, or 0 where it is not added."""
    return torch.cat([columns, columns.new_full((1, columns.shape[1]), adds_bias)])


class RowsLayer(Layer):
    """A layer that takes every position of its input as a column."""

    def weight_columns(self, inputs: Tensor, arguments: Mapping[str, Any]) -> list[Tensor]:
        return [inputs.reshape(-1, inputs.shape[-1]).T]

    def positions(self, inputs: Tensor) -> int:
        return inputs[:1, ..., 0].numel()

    def outputs(
        self, function: Callable[..., Any], arguments: Mapping[str, Any], weight: Tensor | None, bias: Tensor | None
    ) -> list[Tensor]:
        weight = torch.zeros_like(self.all_parameters[0]) if weight is None else weight
        bias = bias if self.adds_bias(function, arguments) else None
        return [self.apply(inputs, weight, bias) for inputs in self.inputs(function, arguments)]

    def apply(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's own forward with other parameters."""
        return F.linear(inputs, weight, bias)
