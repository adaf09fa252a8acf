"""What an update of a real network takes, beside what `check` expects: docs/scaling.md quotes it.

    python benchmarks/scaling.py vit_b                 # needs torchvision
    python benchmarks/scaling.py gpt2                  # needs transformers; random weights, nothing is downloaded
    python benchmarks/scaling.py gpt2 --short

One process for each network, since a process's peak memory never falls.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from benchmarks.library import EPSILON, declare_vision_operators
from gradproj import GradientProjectionMemory


def vit_b(short: bool) -> tuple[nn.Module, Tensor]:
    declare_vision_operators()
    from torchvision.models import VisionTransformer

    width, depth = (48, 2) if short else (768, 12)
    return VisionTransformer(224, 16, depth, 12, width, 4 * width), torch.randn(16, 3, 224, 224)


def gpt2(short: bool) -> tuple[nn.Module, Tensor]:
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_embd": 48, "n_layer": 2} if short else {}
    return GPT2LMHeadModel(GPT2Config(**size)), torch.randint(50257, (8, 512))


def peak() -> float:
    """The most memory that this process has had, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one network and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    networks = {"vit_b": vit_b, "gpt2": gpt2}
    parser.add_argument("network", choices=networks)
    parser.add_argument("--short", action="store_true", help="a tiny network of the kind, to see that it runs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # of what is not protected
    model, batch = networks[args.network](args.short)
    parameters = sum(p.numel() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        model(batch)
    memory = GradientProjectionMemory(model)
    before, began = peak(), time.process_time()
    memory.update(model, [batch], EPSILON)
    seconds, after = time.process_time() - began, peak()
    bases = sum(basis.numel() * basis.element_size() for basis in memory.bases.values()) / 2**30
    print(f"{args.network}: {parameters / 1e6:.0f} M parameters, {len(memory.layers)} layers protected", flush=True)
    print(
        f"update: {seconds:.1f} s, {after - before:.2f} GiB above the forward pass; bases {bases:.2f} GiB", flush=True
    )
    other = GradientProjectionMemory(model)
    expected = other.check(model, batch, EPSILON)
    print(f"check expected: {expected.seconds:.1f} s, {expected.gigabytes:.2f} GiB")


if __name__ == "__main__":
    main()
