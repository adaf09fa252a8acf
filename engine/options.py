"""Everything about a run that a user can choose. A script subclasses Options with its benchmark's defaults."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

from gradproj.errors import InputError

LARGEST = 3.4e38  # of any number: float32 has none beyond


def flag(default: Any, help: str, *, affects_results: bool = True, **parser_arguments: Any) -> Any:
    """A dataclass field that is also a command-line flag.

    Args:
        default: the value when nothing else is said; a dict is copied for each instance.
        help: what it is, with its unit and the reason for the default.
        affects_results: whether runs that differ in it are different runs, kept in different folders.
        parser_arguments: passed on to argparse's add_argument (choices, nargs, metavar, type); a subclass that
            overrides a field of Options need not repeat them.
    """
    metadata = {"help": help, "affects_results": affects_results, "parser": parser_arguments}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def sample_count(text: str) -> int | str:
    """The value of --n_samples: a count, or "all"."""
    return text if text == "all" else int(text)


def named_count(text: str) -> tuple[str, int]:
    """One value of --samples, LAYER=COUNT."""
    name, separator, count = text.partition("=")
    if not (name and separator and count.isdecimal()):
        raise ValueError(f"{text!r} is not of the form LAYER=COUNT")
    return name, int(count)


@dataclass(kw_only=True)
class Options:
    """What the engine reads. Scripts override the defaults with the benchmark's published values."""

    method: str = flag("gpm", "how to learn without forgetting")
    protocol: str = flag(
        "paper",
        "paper: the equations and images as published. released: what the authors' released code does where it "
        "differs (docs/differences.md)",
        choices=("paper", "released"),
    )
    seed: int = flag(1, "seed of everything random: initial weights, batches, splits, permutations")
    n_tasks: int = flag(10, "tasks to learn, the first so many of the benchmark")
    n_train: int | None = flag(None, "at most so many training images of each class, for quick looks; default all")

    n_epochs: int = flag(200, "epochs of each task, at most")
    batch_size_train: int = flag(64, "images in a training batch")
    batch_size_test: int = flag(64, "images in a validation or test batch")
    lr: float = flag(0.01, "learning rate that each task starts with")
    momentum: float = flag(0.0, "momentum of SGD; the published runs use none")
    schedule: str = flag(
        "plateau",
        "plateau: divide lr by --lr_factor when the validation loss stalls, keep the best weights. constant: neither",
        choices=("plateau", "constant"),
    )
    lr_min: float = flag(1e-5, "plateau: the task ends before lr would fall below this")
    lr_patience: int = flag(6, "plateau: epochs without a better validation loss before lr falls")
    lr_factor: float = flag(2.0, "plateau: what lr is divided by")
    pc_valid: float = flag(0.05, "fraction of each task's training images held out for validation")

    threshold: tuple[float, ...] = flag(
        (0.97,), "ε, fraction of a layer's input energy to remember: one value, or one a layer"
    )
    threshold_step: float = flag(0.0, "added to ε with every task learned")
    n_samples: int | str = flag(
        125, "training images that a layer's inputs are read from, or 'all'", type=sample_count, metavar="N|all"
    )
    samples: dict[str, int] = flag(
        {},
        "columns of a layer's representation matrix come from the first COUNT of those images; LAYER is its name or "
        "the beginning of several",
        nargs="+",
        type=named_count,
        metavar="LAYER=COUNT",
    )

    memory_images: int | None = flag(
        None,
        "a_gem, er: images in the episodic memory; default as many floats as the largest possible GPM, Σ d² over the "
        "protected layers",
    )
    replay_batch: int | None = flag(
        None, "a_gem, er: images drawn from the memory at each step; default 256 for a_gem, --batch_size_train for er"
    )
    ewc_lambda: float = flag(10.0, "ewc: weight λ of the penalty λ/2 Σ F (θ - θ*)², with F the Fisher of one image")
    owm_alpha: float = flag(
        100.0, "owm: α of the projector α (α I + Σ x xᵀ)⁻¹; the larger, the more directions stay free to learn in"
    )
    ogd_samples: int = flag(200, "ogd: images of each task whose logit gradients are stored; the paper's number")
    hat_smax: float = flag(400.0, "hat: slope of the gates at test, the largest in training")
    hat_sparsity: float = flag(0.75, "hat: weight of the penalty on units that no earlier task uses")

    data: str = flag(
        "real",
        "real: the benchmark's own images. embedded: rendered glyphs, for trying everything without a download",
        choices=("real", "embedded"),
    )
    data_dir: str = flag("data", "folder of the raw images, downloaded if absent", affects_results=False)
    step: str = flag(
        "auto",
        "auto: the fastest form of a training step that fits: hand-written for the perceptron on a CPU, a CUDA graph "
        "on a GPU. eager: one operation at a time",
        choices=("auto", "eager"),
        affects_results=False,
    )
    amp: str = flag("off", "bf16: forward and backward in bfloat16 (a different result)", choices=("off", "bf16"))
    tf32: bool = flag(False, "let an NVIDIA GPU round the operands of products to 10 bits (a different result)")
    batchnorm: str = flag(
        "batch",
        "what BatchNorm normalises by at test. batch: the test batch's own statistics, as published. task: those of "
        "the task's whole training set, so that accuracy does not depend on the batch",
        choices=("batch", "task"),
    )
    eval_train: bool = flag(False, "also measure accuracy on the training set after each epoch", affects_results=False)
    device: str = flag("auto", "cpu, cuda, cuda:1, …; auto is cuda where there is one", affects_results=False)
    output_dir: str = flag("runs", "folder that gets one folder for every run", affects_results=False)
    run_folder: str | None = flag(
        None,
        "the run's own folder, instead of one below --output_dir named after what it runs",
        affects_results=False,
        type=str,
    )
    no_resume: bool = flag(False, "start afresh, forgetting what the run folder holds", affects_results=False)
    tensorboard: bool = flag(
        False, "also log to TensorBoard, in the run folder (pip install tensorboard)", affects_results=False
    )
    quiet: bool = flag(False, "print the final numbers only", affects_results=False)


def check(options: Options) -> None:
    """Raise InputError, in one line, for values that no run can use."""
    for name in ("n_tasks", "n_epochs", "batch_size_train", "batch_size_test", "lr", "lr_min", "lr_patience"):
        _require(getattr(options, name) > 0, name, getattr(options, name), "positive")
    for name in ("output_dir", "run_folder", "data_dir"):
        _require(getattr(options, name) != "", name, "empty", "the path of a folder")
    _require(0 <= options.seed < 2**63, "seed", options.seed, "in [0, 2**63)")
    _require(options.n_train is None or options.n_train > 0, "n_train", options.n_train, "positive")
    _require(0 <= options.momentum < 1, "momentum", options.momentum, "in [0, 1)")
    _require(options.lr_factor > 1, "lr_factor", options.lr_factor, "greater than 1")
    _require(0 <= options.pc_valid < 1, "pc_valid", options.pc_valid, "in [0, 1)")
    if options.schedule == "plateau":
        _require(options.pc_valid > 0, "pc_valid", options.pc_valid, "positive for --schedule plateau")
    _require(options.n_samples == "all" or options.n_samples > 0, "n_samples", options.n_samples, "positive or 'all'")
    for name, count in options.samples.items():
        most = count if options.n_samples == "all" else options.n_samples
        _require(0 < count <= most, f"samples {name}", count, f"in [1, n_samples = {options.n_samples}]")
    for name in ("memory_images", "replay_batch"):
        value = getattr(options, name)
        _require(value is None or value > 0, name, value, "positive")
    for name in ("owm_alpha", "ogd_samples"):
        _require(getattr(options, name) > 0, name, getattr(options, name), "positive")
    for name in ("ewc_lambda", "hat_sparsity"):
        _require(getattr(options, name) >= 0, name, getattr(options, name), "0 or more")
    _require(options.hat_smax >= 1, "hat_smax", options.hat_smax, "1 or more")  # the slope begins at 1 / hat_smax
    last = options.threshold_step * (options.n_tasks - 1)
    for threshold in options.threshold:
        _require(0 < threshold <= 1, "threshold", threshold, "in (0, 1]")
        _require(
            0 < threshold + last <= 1 + 1e-12,
            f"threshold {threshold} after {options.n_tasks - 1} steps of {options.threshold_step}",
            round(threshold + last, 6),
            "in (0, 1]",
        )
    for name, value in vars(options).items():
        if isinstance(value, float):
            _require(abs(value) <= LARGEST, name, value, f"a number of at most {LARGEST:g}")


def _require(condition: bool, name: str, value: Any, wanted: str) -> None:
    if not condition:
        raise InputError(f"{name} is {value}; it must be {wanted}")


def results_options(options: Options) -> dict[str, Any]:
    """The hyperparameters that decide a run's numbers, by name."""
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.metadata["affects_results"]}


def variant(options: Options) -> str:
    """The name of a run's kind: `default`, or the hyperparameters that differ from the script's, shortened."""
    parts = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        named_by_folder = field.name in ("method", "seed", "data") or not field.metadata["affects_results"]
        if not named_by_folder and value != default:
            parts.append(f"{field.name}={_short(value)}")
    name = ",".join(parts).replace("/", "_") or "default"
    return name if len(name) <= 120 else f"{name[:100]}~{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "+".join(f"{key}{count}" for key, count in value.items())
    if isinstance(value, (tuple, list)):
        return "+".join(map(str, value))
    return str(value)
