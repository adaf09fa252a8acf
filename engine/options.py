"""Everything about a run that a user can choose. A script subclasses Options with its benchmark's defaults."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from gradproj.errors import InputError

SomeOptions = TypeVar("SomeOptions", bound="Options")
KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
LARGEST = 3.4e38  # of any number: float32 has none beyond
LARGEST_WHOLE = 2**31 - 1  # of any count: products of two still fit into 64 bits


class MethodType(Protocol):
    """What the options of a run need to know about its method's class."""

    name: str
    flags: Mapping[str, Any]
    reads: tuple[str, ...]
    defaults: Mapping[str, Any]


def flag(
    default: Any,
    help: str,
    *,
    affects_results: bool = True,
    read_by_some: bool = False,
    above: float | None = None,
    minimum: float | None = None,
    below: float | None = None,
    maximum: float | None = None,
    **parser_arguments: Any,
) -> Any:
    """A dataclass field that is also a command-line flag.

    Args:
        default: the value when nothing else is said; a dict is copied for each instance.
        help: what it is, with its unit and the reason for the default.
        affects_results: whether runs that differ in it are different runs, kept in different folders.
        read_by_some: only methods that name it in `reads` use it; with the others it is refused.
        above, minimum, below, maximum: bounds of a number, or of each in a tuple.
        parser_arguments: passed on to argparse's add_argument (choices, nargs, metavar, type).

    A subclass that overrides a field of Options with another default need not repeat what stands there.
    """
    bounds = {"above": above, "minimum": minimum, "below": below, "maximum": maximum}
    metadata = {
        "help": help,
        "affects_results": affects_results,
        "read_by_some": read_by_some,
        "bounds": {name: bound for name, bound in bounds.items() if bound is not None},
        "parser": parser_arguments,
    }
    default = tuple(default) if isinstance(default, list) else default
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def sample_count(text: str) -> int | str:
    """The value of --n_samples: a count, or "all"."""
    try:
        return text if text == "all" else int(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is neither a count nor 'all'") from error


def named_count(text: str) -> tuple[str, int]:
    """One value of --samples, LAYER=COUNT."""
    name, separator, count = text.partition("=")
    if not (name and separator and count.isdecimal()):
        raise ValueError(f"{text!r} is not of the form LAYER=COUNT")
    return name, int(count)


@dataclass(kw_only=True)
class Options:
    """What the engine reads. Scripts override the defaults with the benchmark's published values.

    Attributes:
        benchmark: whose published values a method's own defaults may follow.
        by_protocol: for each protocol, the defaults that differ from those of the fields.
        script: of options joined with a method's flags, the class that the script wrote.
    """

    benchmark: ClassVar[str] = ""
    by_protocol: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    script: ClassVar[type[Options] | None] = None

    method: str = flag("gpm", "how to learn without forgetting")
    protocol: str = flag(
        "paper",
        "paper: the equations and images as published. released: what the authors' released code does where it "
        "differs (docs/differences.md)",
        choices=("paper", "released"),
    )
    seed: int = flag(
        1, "seed of everything random: initial weights, batches, splits, permutations", minimum=0, below=2**63
    )
    n_tasks: int = flag(10, "tasks to learn, the first so many of the benchmark", above=0)
    n_train: int | None = flag(
        None, "at most so many training images of each class, for quick looks; default all", above=0
    )

    n_epochs: int = flag(200, "epochs of each task, at most", above=0)
    batch_size_train: int = flag(64, "images in a training batch", above=0)
    batch_size_test: int = flag(64, "images in a validation or test batch", above=0)
    lr: float = flag(0.01, "learning rate that each task starts with", above=0)
    momentum: float = flag(0.0, "momentum of SGD; the published runs use none", minimum=0, below=1)
    schedule: str = flag(
        "plateau",
        "plateau: divide lr by --lr_factor when the validation loss stalls, keep the best weights. constant: neither",
        choices=("plateau", "constant"),
    )
    lr_min: float = flag(1e-5, "plateau: the task ends before lr would fall below this", above=0)
    lr_patience: int = flag(6, "plateau: epochs without a better validation loss before lr falls", above=0)
    lr_factor: float = flag(2.0, "plateau: what lr is divided by", above=1)
    pc_valid: float = flag(0.05, "fraction of each task's training images held out for validation", minimum=0, below=1)

    threshold: tuple[float, ...] = flag(
        (0.97,),
        "ε, fraction of a layer's input energy to remember: one value, or one a layer",
        read_by_some=True,
        above=0,
        maximum=1,
    )
    threshold_step: float = flag(0.0, "added to ε with every task learned, up to 1", read_by_some=True)
    n_samples: int | str = flag(
        125,
        "training images that a layer's inputs are read from, or 'all'",
        read_by_some=True,
        type=sample_count,
        metavar="N|all",
    )
    samples: dict[str, int] = flag(
        {},
        "columns of a layer's representation matrix come from the first COUNT of those images; LAYER is its name or "
        "the beginning of several",
        read_by_some=True,
        nargs="+",
        type=named_count,
        metavar="LAYER=COUNT",
    )

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
    keep: str = flag(
        "last",
        "last: the network as it is at the end. each: its weights after every task too, for load_run",
        choices=("last", "each"),
        affects_results=False,
    )
    no_resume: bool = flag(False, "start afresh, forgetting what the run folder holds", affects_results=False)
    tensorboard: bool = flag(
        False, "also log to TensorBoard, in the run folder (pip install tensorboard)", affects_results=False
    )
    quiet: bool = flag(False, "print the final numbers only", affects_results=False)


def with_flags(options: type[SomeOptions], method: MethodType) -> type[SomeOptions]:
    """A script's options with a method's own joined to them."""
    return _joined(script_options(options), method)


@functools.cache
def _joined(options: type[Options], method: MethodType) -> type[Options]:
    own = options.__dataclass_fields__  # a script may set a method's flag among its hyperparameters
    fields = [(name, Any, field) for name, field in method.flags.items() if name not in own]
    made = dataclasses.make_dataclass(options.__name__, fields, bases=(options,), kw_only=True)
    made.script = options
    made.__module__ = options.__module__
    return made


def script_options(options: type[Options]) -> type[Options]:
    """The options class that a script wrote, of one that `with_flags` may have made of it."""
    return options.script or options


def default_of(field: dataclasses.Field) -> Any:
    """A field's default value."""
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


def defaults(options: type[Options], method: MethodType, protocol: str | None = None) -> dict[str, Any]:
    """The value of each hyperparameter where nobody says another: the method's for the benchmark, else the method's,
    else the script's for the protocol, else the script's; the protocol itself is the script's."""
    values = _script_defaults(with_flags(options, method), protocol)
    own = method.defaults | method.defaults.get(options.benchmark, {})
    return values | {name: value for name, value in own.items() if name in values} | {"method": method.name}


def _script_defaults(options: type[Options], protocol: str | None) -> dict[str, Any]:
    values = {field.name: default_of(field) for field in dataclasses.fields(options)}
    return values | dict(options.by_protocol.get(protocol or values["protocol"], {}))


def complete(options: Options, method: MethodType) -> Options:
    """Options with the method's own flags too, at their defaults where they are not there yet."""
    kind, usual = with_flags(type(options), method), defaults(type(options), method, options.protocol)
    values = {field.name: getattr(options, field.name, usual[field.name]) for field in dataclasses.fields(kind)}
    return kind(**values | {"method": method.name})


def is_read(field: dataclasses.Field, method: MethodType) -> bool:
    """Whether a run by this method reads a field of its options."""
    return field.name in method.reads or not told(field)["read_by_some"]


def inherited(field: dataclasses.Field) -> dataclasses.Field:
    """The field of Options that a script's field overrides; itself where there is none."""
    return Options.__dataclass_fields__.get(field.name, field)


def told(field: dataclasses.Field) -> Mapping[str, Any]:
    """What `flag` was told of a field; what a script leaves out stands at the field that it overrides."""
    nothing = {"help": "", "affects_results": True, "read_by_some": False, "bounds": {}, "parser": {}}
    known = inherited(field).metadata or nothing
    own = field.metadata or known
    return {
        **own,
        "read_by_some": known["read_by_some"],
        "bounds": own["bounds"] or known["bounds"],
        "parser": {**known["parser"], **own["parser"]},
    }


def overridden(options: Options, method: MethodType) -> list[str]:
    """A line for each value of the script that gives way to the method's own."""
    usual = defaults(type(options), method, options.protocol)
    scripts = _script_defaults(script_options(type(options)), options.protocol)
    return [
        f"{name} is {short(usual[name])}, {method.name}'s own, instead of the script's {short(value)}"
        for name, value in scripts.items()
        if name != "method" and usual[name] != value and getattr(options, name) == usual[name]
    ]


def unread(options: Options, method: MethodType) -> list[str]:
    """A line for each value that somebody gave and the run's schedule does not read, as the released scripts do not."""
    usual, names = defaults(type(options), method, options.protocol), ("lr_min", "lr_patience", "lr_factor")
    given = [name for name in names if getattr(options, name) != usual[name]]
    return [f"{name} is read by --schedule plateau alone" for name in given if options.schedule == "constant"]


def check(options: Options) -> None:
    """Raise InputError, in one line, for values that no run can use."""
    for field in dataclasses.fields(options):
        _check_kind(field, getattr(options, field.name))
        _check_bounds(field, getattr(options, field.name))
    for name in ("output_dir", "run_folder", "data_dir"):
        _require(getattr(options, name) != "", name, "empty", "the path of a folder")
    if options.schedule == "plateau":
        _require(options.pc_valid > 0, "pc_valid", options.pc_valid, "positive for --schedule plateau")
        wanted = f"lr_min = {options.lr_min} or more: the plateau schedule ends a task before it uses a smaller rate"
        _require(options.lr >= options.lr_min, "lr", options.lr, wanted)
    _require(options.n_samples == "all" or options.n_samples > 0, "n_samples", options.n_samples, "positive or 'all'")
    if options.n_samples == "all" and options.samples not in ({}, _script_default(options, "samples")):
        raise InputError("n_samples is all, which leaves samples nothing to choose from; give one of the two")
    for name, count in options.samples.items():
        most = count if options.n_samples == "all" else options.n_samples
        _require(0 < count <= most, f"samples {name}", count, f"in [1, n_samples = {options.n_samples}]")
    last = options.threshold_step * ((options.n_tasks or 1) - 1)  # None: as many as the script finds
    for threshold in options.threshold:
        _require(
            threshold + last > 0,
            f"threshold {threshold} with {options.threshold_step} (threshold_step) more for each later task",
            round(threshold + last, 6),
            "positive",
        )


def _script_default(options: Options, name: str) -> Any:
    return default_of(type(options).__dataclass_fields__[name])


def _check_kind(field: dataclasses.Field, value: Any) -> None:
    """Raise InputError for a value of another kind than its field's, or none of its choices: the command line lets none
    through, but a script's own defaults are anybody's."""
    choices = told(field)["parser"].get("choices")
    if choices is not None:
        _require(value in choices, field.name, repr(value), f"one of {', '.join(map(str, choices))}")
        return
    usual = default_of(inherited(field))
    if value is None and (usual is None or "None" in str(field.type)):
        return
    if field.name == "n_samples":
        _require(value == "all" or _is_a(int, value), field.name, repr(value), "a whole number or 'all'")
    elif isinstance(usual, tuple):
        fine = isinstance(value, tuple) and value and all(_is_a(type(usual[0]), part) for part in value)
        _require(bool(fine), field.name, repr(value), f"a tuple such as {usual}")
    elif isinstance(usual, dict):
        fine = isinstance(value, dict) and all(_is_a(int, count) for count in value.values())
        _require(fine, field.name, repr(value), "a dict of a whole number by layer")
    elif usual is not None:
        _require(_is_a(type(usual), value), field.name, repr(value), KINDS[type(usual)])


def _is_a(kind: type, value: Any) -> bool:
    """Whether a value is of a kind; whole numbers are numbers, and truth values are not."""
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def _check_bounds(field: dataclasses.Field, value: Any) -> None:
    """Raise InputError where a number, or one of several, is out of its field's bounds or beyond float32's."""
    above, minimum, below, maximum = map(told(field)["bounds"].get, ("above", "minimum", "below", "maximum"))
    usual = default_of(inherited(field))
    is_float = isinstance(usual[0] if isinstance(usual, tuple) else usual, float)
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        fine = (above is None or number > above) and (minimum is None or number >= minimum)
        fine = fine and (below is None or number < below) and (maximum is None or number <= maximum)
        _require(fine, field.name, number, _interval(above, minimum, below, maximum))
        if isinstance(number, float) or is_float:
            _require(abs(number) <= LARGEST, field.name, number, f"a number of at most {LARGEST:g}")
        elif below is None:
            _require(number <= LARGEST_WHOLE, field.name, number, f"a whole number of at most {LARGEST_WHOLE:,}")


def _interval(above: float | None, minimum: float | None, below: float | None, maximum: float | None) -> str:
    if below is None and maximum is None:
        if minimum is not None:
            return f"{minimum} or more"
        return "positive" if above == 0 else f"greater than {above}"
    left = f"({above}" if minimum is None else f"[{minimum}"
    return f"in {left}, " + (f"{maximum}]" if below is None else f"{below})")


def _require(condition: bool, name: str, value: Any, wanted: str) -> None:
    if not condition:
        shown = str(value)
        raise InputError(f"{name} is {shown if len(shown) <= 80 else f'{shown[:40]}…'}; it must be {wanted}")


def hyperparameters(options: Options, method: MethodType) -> dict[str, Any]:
    """All that a run by this method reads, by name."""
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if is_read(f, method)}


def results_options(options: Options, method: MethodType) -> dict[str, Any]:
    """Those of them that decide the run's numbers."""
    decisive = {f.name for f in dataclasses.fields(options) if told(f)["affects_results"]}
    return {name: value for name, value in hyperparameters(options, method).items() if name in decisive}


def variant(options: Options, method: MethodType) -> str:
    """The name of a run's kind: `default`, or the hyperparameters that differ from the defaults, shortened."""
    usual = defaults(type(options), method, options.protocol)
    parts = [
        f"{name}={short(value)}"
        for name, value in results_options(options, method).items()
        if name not in ("method", "seed", "data") and value != usual[name]  # these the folder is named by
    ]
    name = ",".join(parts).replace("/", "_") or "default"
    return name if len(name) <= 120 else f"{name[:100]}~{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def short(value: Any) -> str:
    """A hyperparameter's value as it stands in the name of a variant."""
    if isinstance(value, dict):
        return "+".join(f"{key}{count}" for key, count in value.items())
    if isinstance(value, (tuple, list)):
        return "+".join(map(str, value))
    return str(value)
