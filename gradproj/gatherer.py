"""Who sees what while batches run: layers that are given the same inputs share one representation."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradproj.concerns import used_otherwise
from gradproj.layers import Layer
from gradproj.layers.embedding import EmbeddingLayer
from gradproj.layers.uses import Uses, plain_paths, read_inputs
from gradproj.representation import Representation, SeenRows

FAST_SIZE = 512  # inputs from which a layer's products are worth halving


@dataclass
class Source:
    """What one or more layers see: those that are given the same inputs, and no others, share it.

    Attributes:
        parts: by position among a layer's keys.
        members: names of the layers.
        n_inputs: that were added.
    """

    parts: list[Representation | SeenRows]
    members: list[str] = field(default_factory=list)
    n_inputs: int = 0


@dataclass
class Input:
    """An input of the forward pass that is going on, and who is given it.

    Attributes:
        tensor, version: by which it is known again.
        source: to which it belongs, as long as all of its members are given it.
        layer, chosen, function, arguments: from which its columns are made; a copy where it waits for other members.
        takers: names of layers that were given it.
        counts: of its columns, by position among a layer's keys, once they are added.
    """

    tensor: weakref.ref[Tensor]
    version: int
    source: Source
    layer: Layer
    chosen: Tensor
    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    takers: list[str] = field(default_factory=list)
    counts: list[int] | None = None


class Gatherer:
    """Collects what layers see.

    Args:
        layers: by name.
        samples: by layer name, how many samples of each batch count, the first ones; all where unnamed.
        rows: at most so many columns of each input, drawn at random; None for all.
        fast: sum products of layers of at least `FAST_SIZE` inputs in float32.
        count_only: do not keep what is seen, only who shares what, and how much there is.
        keep_columns: as for Representation.
        unit: names of layers whose Representation is made so.

    Attributes:
        sources: by layer name.
        hosts: by layer name, the modules whose forward applies its weight.
        leaks: names of layers whose weights are also used otherwise, each with a phrase.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        samples: Mapping[str, int] | None = None,
        rows: int | None = None,
        fast: bool = False,
        count_only: bool = False,
        keep_columns: bool = False,
        unit: Collection[str] = (),
    ) -> None:
        self.layers, self.samples, self.rows, self.fast = layers, samples or {}, rows, fast
        self.count_only, self.keep_columns, self.unit = count_only, keep_columns, unit
        self.sources: dict[str, Source] = {}
        self.hosts: dict[str, list[nn.Module]] = {}
        self.leaks: dict[tuple[str, str], None] = {}  # as an ordered set
        self.columns: dict[str, int] = dict.fromkeys((key for layer in layers.values() for key in layer.keys), 0)
        self.random = torch.Generator().manual_seed(0)
        self.mask: Tensor | None = None  # of the batch at hand
        self._recent: dict[tuple, Input] = {}
        self._waiting: list[Input] = []  # for members of their source that were not given them yet

    @torch.no_grad()
    def run(self, forward: Callable[[Any], Any], batch: Any, mask: Tensor | None = None) -> Any:
        """Run one batch; returns what `forward` does."""
        self.mask, self._recent, self._waiting = mask, {}, []
        with plain_paths(), Uses(self.layers.values(), self._see, self._see_otherwise) as self._uses:
            result = forward(batch)
        self._part()
        return result

    def _see(self, layer: Layer, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        given = read_inputs(layer, function, arguments)
        if self._uses.running:
            hosts = self.hosts.setdefault(layer.name, [])
            if self._uses.running[-1] not in hosts:
                hosts.append(self._uses.running[-1])
        for inputs in given:
            self._take(layer, inputs, function, arguments)

    def _see_otherwise(self, layer: Layer, function: str) -> None:
        self.leaks[layer.name, used_otherwise(layer, function)] = None

    def _take(self, layer: Layer, inputs: Tensor, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        """Add an input to what a layer sees, once for all layers of its source."""
        count = self.samples.get(layer.name)
        key = (id(inputs), count, layer.name in self.unit, layer.signature(function, arguments))
        given = self._recent.get(key)
        if given is not None and (
            given.tensor() is not inputs or given.version != version(inputs) or layer.name in given.takers
        ):
            given = None
        source = self.sources.get(layer.name)
        if source is None:  # a layer joins those that have seen this input alone, as it has
            joins = given is not None and given.counts is not None and given.source.n_inputs == 1
            source = given.source if given is not None and joins else Source(self.empty_parts(layer))
            source.members.append(layer.name)
            self.sources[layer.name] = source
        if given is None or given.source is not source:
            chosen = self._chosen(inputs[:count], layer)
            given = Input(weakref.ref(inputs), version(inputs), source, layer, chosen, function, arguments)
            self._recent[key] = given
            if len(source.members) > 1:
                given.chosen = chosen.clone()
                self._waiting.append(given)
        given.takers.append(layer.name)
        if given.counts is None and len(given.takers) == len(source.members):
            self._add(given, source)
            self._waiting = [waiting for waiting in self._waiting if waiting is not given]
            for name in given.takers:
                self._count(name, given)
        elif given.counts is not None:
            self._count(layer.name, given)

    def _add(self, given: Input, source: Source) -> None:
        """Add an input's columns to a source."""
        source.n_inputs += 1
        given.counts = [0] * len(source.parts)
        layer, chosen = given.layer, given.chosen
        if not chosen.numel():
            return
        n_blocks = -(-len(chosen) // layer.block_length(chosen)) if self.rows is not None else 1
        most = None if self.rows is None else -(-self.rows // n_blocks)
        for block in layer.seen(chosen, given.function, given.arguments):
            for i, (name, part) in enumerate(zip(layer.keys, source.parts, strict=True)):
                if name in block:
                    given.counts[i] += block[name].shape[-1]
                    if isinstance(part, SeenRows):
                        part.add(block[name])
                    elif not self.count_only:
                        part.add(self._drawn(block[name], most))

    def _count(self, name: str, given: Input) -> None:
        for key, n in zip(self.layers[name].keys, given.counts or (), strict=True):
            self.columns[key] += n

    def _part(self) -> None:
        """Give each layer of a source its own, where not all were given the same inputs in this forward pass."""
        parted = {id(given.source): given.source for given in self._waiting}
        for source in parted.values():
            for name in source.members:
                self.sources[name] = Source(copy.deepcopy(source.parts), [name], source.n_inputs)
        for given in self._waiting:
            for name in given.takers:
                self._add(given, self.sources[name])
                self._count(name, given)

    def empty_parts(self, layer: Layer) -> list[Representation | SeenRows]:
        """What a layer has seen before it runs, by position among its keys."""
        rows = {layer.name} if isinstance(layer, EmbeddingLayer) else set()
        return [
            SeenRows(d)
            if key in rows
            else Representation(d, self._product_dtype(d), self.keep_columns, layer.name in self.unit)
            for key, d in layer.sizes.items()
        ]

    @property
    def seen(self) -> dict[str, Representation | SeenRows]:
        """By key, what has been gathered; layers that see the same share one."""
        return {
            key: part
            for name, source in self.sources.items()
            for key, part in zip(self.layers[name].keys, source.parts, strict=True)
        }

    @property
    def silent(self) -> list[str]:
        """The names of layers that were given nothing."""
        return [name for name, layer in self.layers.items() if not any(self.columns[key] for key in layer.keys)]

    def _product_dtype(self, d: int) -> torch.dtype:
        return torch.float32 if self.fast and d >= FAST_SIZE else torch.float64

    def _chosen(self, inputs: Tensor, layer: Layer) -> Tensor:
        """The part of an input that a mask of samples and positions leaves.

        Where the input may have positions first as well as samples first, it is what either reading leaves: a position
        too many costs a direction, one too few would be forgotten.
        """
        if self.mask is None:
            return inputs
        axes = layer.position_axes(inputs)
        fitting: list[Tensor] = []
        for mask in (self.mask, self.mask.T) if self.mask.ndim == 2 else (self.mask,):
            mask = mask[: len(inputs)].to(inputs.device)
            if mask.ndim <= axes and inputs.shape[: mask.ndim] == mask.shape:
                fitting.append(mask)
            elif axes == 1 and len(inputs) == mask.numel():  # samples and positions as one axis
                fitting.append(mask.flatten())
        return inputs[torch.stack(fitting).any(0)] if fitting else inputs

    def _drawn(self, columns: Tensor, most: int | None) -> Tensor:
        """At most so many of some columns, at random."""
        if most is None or columns.shape[1] <= most:
            return columns
        chosen = torch.randperm(columns.shape[1], generator=self.random)[:most]
        return columns[:, chosen.to(columns.device)]


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; inference tensors do not count that, and cannot be changed outside."""
    return 0 if tensor.is_inference() else tensor._version
