"""CODE-CL, Conceptor-Based Gradient Projection (Apolinario, Choudhary and Roy, ICCV 2025, arXiv 2411.15235)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from engine.options import Options, flag
from engine.task import Task
from gradproj.errors import InputError
from gradproj.layers import Layer
from gradproj.projection import LayerProjector
from methods.gpm import Forward
from methods.parts.conceptors import Conceptor, conceptor, conjunction, disjunction
from methods.parts.regions import some_of
from methods.parts.scaled import scaled_projector
from methods.parts.side_paths import SidePath, SidePathGPM

LEAST = 0.2  # eigenvalues of C below it are 0


class CODECL(SidePathGPM):
    """GPM with a soft projection, G ← G - G C, and weights scaled where a new task's inputs are like old ones.

    - After task t, C_t = R̄ (R̄ + α⁻² I)⁻¹ with R̄ = X Xᵀ / n, where α grows from the value given until C_t leaves μ of
      the lengths of the inputs X; C ← C ∨ C_t, and eigenvalues of C below 0.2 become 0.
    - Before a later task, C' is that of its inputs. In layers with more inputs than `code_directions`, if
      tr(C ∧ C') > `code_overlap` · tr C, the task computes with W̃ = W + W U (S - I) Uᵀ, U being the first
      `code_directions` eigenvectors of C ∧ C' (fewer where its rank is) and S learned from I. The released code begins
      with a random S.

    C is soft, so W U moves on with later tasks, and what task t computes with it. α and μ are the paper's where it has
    them, those of 10-split CIFAR-100 on its superclasses, and found by search on permuted MNIST (docs/successors.md).

    At test it uses the task's identity, also under a single head.

    Stores the eigenvectors of C and their values, Σ (d·k + k) floats, and for each task and scaled layer U and S - I.
    """

    name, title, place = "code_cl", "CODE-CL", 14
    reads = ("n_samples", "samples")
    flags = {
        "code_alpha": flag(6.0, "α of the conceptors, from which it grows; the larger, the more is held", minimum=1e-6),
        "code_mu": flag(0.95, "μ: fraction of the inputs' lengths that a conceptor leaves", minimum=0, maximum=0.9999),
        "code_overlap": flag(0.5, "fraction of tr C from which on tr(C ∧ C') makes a layer scale", minimum=0),
        "code_directions": flag(80, "directions that a task scales a layer in, at most", above=0),
        "region_images": flag(125, "training images of a new task that C' is made from", above=0),
    }
    defaults = {
        "pmnist": {"code_alpha": 0.1},
        "five_datasets": {"code_alpha": 4.0, "code_mu": 0.01},
        "miniimagenet": {"code_alpha": 8.0},
    }
    state = ("memory", "strengths", "shifts")

    @classmethod
    def refuse(cls, options: Options) -> None:
        if options.n_samples == "all":
            raise InputError("n_samples is all; code_cl holds the inputs of all samples at once: give a number")

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        self.strengths = {key: basis.new_zeros(0) for key, basis in self.memory.bases.items()}  # eigenvalues of C
        self.shifts: list[dict[str, list[Tensor]]] = []  # by task and key, U and S - I

    def projector(self, layer: Layer) -> LayerProjector:
        return scaled_projector(layer, self.memory.bases, self.strengths)

    def held(self, key: str) -> Conceptor:
        """C."""
        return Conceptor(self.memory.bases[key], self.strengths[key])

    def before_task(self, t: int, task: Task) -> None:
        paths, n = {}, self.options.code_directions
        if t:
            images = some_of(self, t, task.train, self.options.region_images).images
            for key, new in self.conceptors(lambda batch: self.model(batch, t), [images], {}).items():
                shared = conjunction(self.held(key), new)
                near = shared.values.sum() > self.options.code_overlap * self.strengths[key].sum()
                if near and len(shared.vectors) > n:
                    U = shared.vectors[:, :n].to(images.dtype)
                    paths[key] = [U, nn.Parameter(U.new_zeros(2 * [U.shape[1]]))]
        self.shifts = [*self.shifts[:t], paths]

    def side_paths(self, t: int) -> dict[str, list[SidePath]]:
        return {key: [SidePath(*path)] for key, path in self.shifts[t].items()}

    def remember(self, t: int, forward: Forward, images: Iterable[Tensor], samples: dict[str, int]) -> None:
        new = self.conceptors(forward, images, samples)
        found = {key: disjunction(self.held(key), C).above(LEAST) for key, C in new.items()}
        self.memory.replace({key: C.vectors for key, C in found.items()})
        self.strengths = {key: C.values for key, C in found.items()}

    def conceptors(self, forward: Forward, images: Iterable[Tensor], samples: dict[str, int]) -> dict[str, Conceptor]:
        """That of each layer's inputs, by key."""
        gathered = self.memory.gather(forward, images, samples, keep_columns=True)
        alpha, mu = self.options.code_alpha, self.options.code_mu
        return {key: conceptor(inputs.columns, alpha, mu) for key, inputs in gathered.items()}
