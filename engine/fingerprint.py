"""What a run was made of: fingerprints of its tasks and its network, and what differs between two of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.classes import describe
from engine.task import PART_WORDS, PARTS, Split, Task

SAMPLE = 64  # images of a part whose every byte counts in its place; of the others the sum does
PART_FIELDS = ("shape", "dtype", "images", "labels", "images")  # what each entry of a part's fingerprint tells of


def of_task(task: Task) -> dict[str, Any]:
    """A task's name, its classes in the order of the outputs, and the fingerprints of its parts."""
    classes = range(task.n_classes) if task.classes is None else task.classes
    record: dict[str, Any] = {"name": str(task.name), "classes": [c if isinstance(c, str) else int(c) for c in classes]}
    return record | {part: [*of_split(getattr(task, part)), _sum(getattr(task, part).images)] for part in PARTS}


def of_split(split: Split) -> list[str]:
    """Shape and dtype of images, checksums of a sample of them and of all labels: the quick part of a fingerprint."""
    images, labels = split
    rows = torch.linspace(0, max(len(images) - 1, 0), min(SAMPLE, len(images)), dtype=torch.float64).long()
    kind = ["x".join(map(str, images.shape)), str(images.dtype).removeprefix("torch.")]
    return [*kind, digest(images[rows.to(images.device)]), digest(labels)]


def _sum(images: Tensor) -> str:
    """The sum of the images' bytes, eight at a time: another one wherever a value changed."""
    octets = images.detach().contiguous().view(-1).view(torch.uint8)
    octets = octets.clone() if octets.storage_offset() % 8 else octets
    whole = len(octets) // 8 * 8
    total = octets[:whole].view(torch.int64).sum() + octets[whole:].sum()
    return f"{total.item() % 2**64:016x}"


def digest(tensor: Tensor) -> str:
    """A checksum of a tensor's values, wherever and in whatever layout they lie."""
    octets = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.blake2b(octets.numpy(), digest_size=8).hexdigest()


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What differs between two records of a task, of which one may be quick or have no fingerprints; "" if nothing."""
    texts = []
    for part in PARTS:
        pairs = zip(PART_FIELDS, found.get(part, ()), wanted.get(part, ()), strict=False)
        for what, there, here in pairs:
            if there != here:
                how = f" {there} there, {here} here" if what in ("shape", "dtype") else ""
                texts.append(f"{PART_WORDS[part]} {what}{how}")
                break
    if "classes" in found and "classes" in wanted and found["classes"] != wanted["classes"]:
        texts.append(f"classes {_listed(found['classes'])} there, {_listed(wanted['classes'])} here")
    return "; ".join(texts)


def _listed(classes: Sequence[str | int]) -> str:
    return ", ".join(map(str, classes[:10])) + (", …" if len(classes) > 10 else "")


def of_network(model: nn.Module, frozen: Iterable[str] = ()) -> dict[str, Any]:
    """A network's class, its weights by name with shape and dtype, its innermost modules with their settings.

    Args:
        model: the network.
        frozen: its parameters that it came with frozen.
    """
    weights = {name: described(value) for name, value in model.state_dict().items()}
    inner = {name: module for name, module in model.named_modules() if not list(module.children())}
    modules = {name: re.sub(r" at 0x\w+", "", repr(module)) for name, module in inner.items()}  # addresses change
    return {"class": describe(type(model)), "weights": weights, "modules": modules, "frozen": sorted(frozen)}


def described(value: Tensor) -> str:
    """A weight's shape and dtype."""
    return f"{'x'.join(map(str, value.shape)) or 'one number'} {str(value.dtype).removeprefix('torch.')}"


def frozen_parameters(model: nn.Module) -> list[str]:
    """The names of the parameters that get no gradient."""
    return [name for name, p in model.named_parameters() if not p.requires_grad]


def network_digest(network: Mapping[str, Any]) -> str:
    """A checksum of what `of_network` gave; where nothing is frozen that of older versions, which did not record it."""
    network = {name: value for name, value in network.items() if name != "frozen" or value}
    return hashlib.blake2b(json.dumps(network, sort_keys=True).encode(), digest_size=8).hexdigest()


def network_difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first difference between two networks, as `of_network` gave them; empty if there is none."""
    if found["class"] != wanted["class"]:
        return f"class {found['class']} there, {wanted['class']} here"
    for kind in ("weights", "modules"):
        for name in [*found[kind], *wanted[kind]]:
            there, here = found[kind].get(name, "not"), wanted[kind].get(name, "not")
            if there != here:
                return f"{name} {there} there, {here} here"
    for name in found["weights"] if "frozen" in found else ():  # older versions did not record it
        there, here = ("frozen" if name in network["frozen"] else "trained" for network in (found, wanted))
        if there != here:
            return f"{name} {there} there, {here} here"
    return ""


def of_initial(model: nn.Module) -> dict[str, str]:
    """A checksum of each of a network's weights as it is now, by name."""
    return {name: digest(value) for name, value in model.state_dict().items()}
