"""The library on wide layers and foreign models, beside the plain form of the same mathematics, in one run.

    python benchmarks/library.py                       # all cases, minutes on one thread
    python benchmarks/library.py --only wide lora      # two of them
    python benchmarks/library.py --short               # each case tiny: does it run?

Plain: every layer by itself, its float64 R Rᵀ decomposed in full; a step without protection. Seconds are processor time
of one thread, which is what an idle machine needs; the best of some repetitions.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is first imported
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from gradproj import GradientProjectionMemory
from gradproj.gatherer import Gatherer
from gradproj.gathering import gather
from gradproj.subspace import extend_basis

EPSILON = 0.97


def best(function: Callable[[], object], repetitions: int) -> float:
    """Seconds of processor time of the fastest of some calls."""
    times = []
    for _ in range(repetitions):
        began = time.process_time()
        function()
        times.append(time.process_time() - began)
    return min(times)


def smooth(*shape: int) -> Tensor:
    """Vectors whose energy falls from direction to direction: a quarter of these hold ε, as in a trained layer."""
    d = shape[-1]
    return torch.randn(shape) * torch.linspace(0, 1, d).mul(-7).exp() @ torch.linalg.qr(torch.randn(d, d)).Q


def plain_update(model: nn.Module, batch: Tensor) -> None:
    """The bases, layer after layer, each gathered by itself: d x d in float64, decomposed in full."""
    layers = GradientProjectionMemory(model).layers
    for layer in layers.values():
        for key, seen in gather(Gatherer({layer.name: layer}), model, model, [batch]).items():
            seen.gram, seen.columns = seen.outer, None
            extend_basis(layer.empty_basis(key), seen, EPSILON)


def update(model: nn.Module, batch: Tensor) -> None:
    GradientProjectionMemory(model).update(model, [batch], EPSILON)


def wide(short: bool) -> tuple[nn.Module, Tensor]:
    d = 256 if short else 4096
    return nn.Linear(d, 8, bias=False), smooth(2 * d, d)


def resnet18(short: bool) -> tuple[nn.Module, Tensor]:
    declare_vision_operators()
    from torchvision.models import resnet18

    return resnet18(num_classes=10).eval(), torch.randn(2 if short else 16, 3, *[64 if short else 224] * 2)


def vit_b_block(short: bool) -> tuple[nn.Module, Tensor]:
    d = 96 if short else 768
    block = nn.TransformerEncoderLayer(d, 12, 4 * d, 0.0, "gelu", batch_first=True, norm_first=True)
    return block, smooth(2 if short else 16, 197, d)


def declare_vision_operators() -> None:
    """Operators that torchvision expects of a build made with it; beside another it dies at import without them."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        try:
            library.define(name)
        except RuntimeError:  # this torchvision has them
            return
    kept.append(library)


kept: list[torch.library.Library] = []
UPDATES = {  # by name: what, seconds that are the goal
    "wide": (wide, 6.0),
    "resnet18": (resnet18, 15.0),
    "vit_b_block": (vit_b_block, 4.0),
}


def stepping(model: nn.Module, batch: Tensor) -> Callable[[], None]:
    """A training step with AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    step.optimizer = optimizer
    return step


def time_steps(forms: dict[str, tuple[Callable[[], None], Callable[[], object]]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest step in each form, which take turns: a step, and the context that it runs in."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, (step, context) in forms.items():
            with context():
                step()  # what a first step only has to do
                times[name] += [best(step, 3)]
    return {name: min(values) for name, values in times.items()}


def remembered(model: nn.Module, batch: Tensor, **selection: Sequence[str]) -> GradientProjectionMemory:
    memory = GradientProjectionMemory(model, **selection)
    memory.update(model, [batch], EPSILON)
    return memory


def adamw(short: bool, rounds: int) -> dict[str, float]:
    """Four 1024-wide Linears: a bare step, and one whose update is projected."""
    d = 64 if short else 1024
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(d, d), nn.Tanh())])
    batch = smooth(256, d)
    memory, step = remembered(model, batch), stepping(model, batch)
    return time_steps(
        {
            "bare": (step, warnings.catch_warnings),
            "protect_update": (step, lambda: memory.protect_update(step.optimizer)),
            "protect": (step, lambda: memory.protect(step.optimizer)),
        },
        rounds,
    )


def lora(short: bool, rounds: int) -> dict[str, float]:
    """22 layers of which 4 train: all looked at, or the frozen ones excluded by name."""
    d = 64 if short else 512
    model = nn.Sequential(*[nn.Linear(d, d) for _ in range(22)])
    for i, layer in enumerate(model):
        layer.requires_grad_(i % 6 == 0)
    batch, frozen = smooth(256, d), [str(i) for i in range(22) if i % 6]
    step = stepping(model, batch)
    memories = {"all": remembered(model, batch), "frozen excluded": remembered(model, batch, exclude=frozen)}
    forms = {name: (step, lambda m=memory: m.protect(step.optimizer)) for name, memory in memories.items()}
    return time_steps({"bare": (step, warnings.catch_warnings), **forms}, rounds)


STEPS = {"adamw": adamw, "lora": lora}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*UPDATES, *STEPS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these cases")
    parser.add_argument("--short", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="of our form; the plain one runs once")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    repetitions = 1 if args.short else args.repetitions
    for name in args.only:
        torch.manual_seed(0)
        if name in UPDATES:
            make, goal = UPDATES[name]
            model, batch = make(args.short)
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # of what is not protected
                seconds = best(lambda m=model, b=batch: update(m, b), repetitions)
                plain = best(lambda m=model, b=batch: plain_update(m, b), 1)
            print(f"update {name}: {seconds:.2f} s (goal {goal:.0f}), plain {plain:.2f} s, {plain / seconds:.1f} times")
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                times = STEPS[name](args.short, 2 if args.short else 3 * repetitions)
            parts = [f"{form} {1000 * s:.1f} ms ({s / times['bare']:.2f})" for form, s in times.items()]
            print(f"step {name}: {', '.join(parts)}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
