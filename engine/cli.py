"""Command lines made from an Options dataclass and the methods' flags, and errors as one line on stderr."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from engine import hardware
from engine.contract import check_class, check_defaults, check_flags_agree, check_script
from engine.distributed import is_first_to_say, joined
from engine.files import refusal
from engine.interrupts import Stopped, stoppable
from engine.method import Method
from engine.options import Options, check, default_of, defaults, is_read, told, with_flags
from engine.progress import tolerate_consoles
from gradproj.errors import DivergenceError, InputError

METAVARS = {int: "N", float: "X"}
NOT_REPEATED = ("run_folder", "no_resume")  # of a run's config.json: they are of that run alone
SomeOptions = TypeVar("SomeOptions", bound=Options)
Methods = Mapping[str, type[Method]]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviated flags and whose errors are one line."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **arguments)
        # argparse's own takes -1e-4, with an exponent, for a flag.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        line = f"{self.prog}: error: {' '.join(message.split())} (see --help)\n"
        self.exit(2, line if is_first_to_say(line) else None)


def parse(
    options: type[SomeOptions],
    methods: Methods,
    argv: Sequence[str] | None,
    description: str | None,
    prog: str | None = None,
) -> tuple[SomeOptions, type[Method]]:
    """The options that a command line gives, and the method that it names.

    There is a flag for each field of the dataclass and for each of a method's own; those that the method does not read
    are refused. A value comes from the command line, else from --config, else from `engine.options.defaults`.

    Args:
        options: the script's dataclass.
        methods: by name.
        argv: the command line; None for this process's own.
        description: what --help says first.
        prog: the program's name in errors; this process's own where not given.
    Raises:
        InputError: values that no run can use, or a --config that is not a run's of this script.
    """
    check_script(options)
    for method_type in methods.values():
        check_class(method_type)
        check_defaults(method_type, options)
    check_flags_agree(methods)
    parser = make_parser(options, methods, description, prog)
    given = vars(parser.parse_args(argv))
    path = given.pop("config", None)
    saved = {} if path is None else read_config(Path(path), options, methods, parser)
    name = given.get("method", saved.get("method", default_of(options.__dataclass_fields__["method"])))
    if name not in methods:
        raise InputError(f"method is {name!r}; it must be one of {', '.join(methods)}")
    method = methods[name]
    kind = with_flags(options, method)
    names = {field.name for field in dataclasses.fields(kind) if is_read(field, method)}
    for flag in given:
        if flag not in names:
            parser.error(f"--{flag} is a flag of {', '.join(readers(flag, options, methods))}; this run's is {name}")
    values = {field.name: _in_kind(field, given) for field in dataclasses.fields(kind) if field.name in given}
    of, before = saved.get("method", name), saved.get("protocol")
    protocol = given.get("protocol", before)
    if (name, protocol) != (of, before):  # what was that method's or protocol's default says nothing of this one
        usual = defaults(options, methods[of], before)
        saved = {field: value for field, value in saved.items() if value != usual.get(field, dataclasses.MISSING)}
    kept = {field: value for field, value in saved.items() if field in names}
    made = kind(**defaults(options, method, protocol) | kept | values | {"method": name})
    check(made)
    method.refuse(made)
    return made, method


def make_parser(options: type[Options], methods: Methods, description: str | None, prog: str | None) -> Parser:
    """A parser of a script's flags and those of all methods, in which only what is given has a value."""
    prog = prog or Path(sys.argv[0]).name
    parser = Parser(prog=prog, description=description, argument_default=argparse.SUPPRESS)
    script = {field.name: field for field in dataclasses.fields(options)}
    for field in script.values():
        add_flag(parser, field, options, methods)
    groups: dict[str, list[dataclasses.Field]] = {}
    for field in {name: field for m in methods.values() for name, field in all_flags(options, m).items()}.values():
        if field.name not in script:
            groups.setdefault(", ".join(readers(field.name, options, methods)), []).append(field)
    for names, fields in groups.items():
        group = parser.add_argument_group(f"of {names}")
        for field in fields:
            add_flag(group, field, options, methods)
    parser.add_argument("--config", metavar="FILE", help="config.json of a run to repeat; further flags change it")
    return parser


def all_flags(options: type[Options], method: type[Method]) -> dict[str, dataclasses.Field]:
    """What a run by a method reads, by name."""
    return {f.name: f for f in dataclasses.fields(with_flags(options, method)) if is_read(f, method)}


def readers(flag: str, options: type[Options], methods: Methods) -> list[str]:
    """The methods that read a flag."""
    return [name for name, method in methods.items() if flag in all_flags(options, method)]


def add_flag(parser: Any, field: dataclasses.Field, options: type[Options], methods: Methods) -> None:
    """Add one field of an options dataclass to a parser or a group of one."""
    default = default_of(field)
    arguments = dict(told(field)["parser"])
    help = told(field)["help"].replace("%", "%%")
    if shown := _shown_default(field, options, methods):
        help += f" (default: {shown})"
    if isinstance(default, bool):
        arguments["action"] = "store_true"
    elif field.name == "method":
        arguments["choices"] = tuple(methods)
    elif isinstance(default, tuple):
        arguments.update(nargs="+", type=type(default[0]) if default else float)
    elif default is not None:
        arguments.setdefault("type", type(default))
    else:
        arguments.setdefault("type", int)
    if arguments.get("type") not in (None, int, float, str):
        arguments["type"] = _with_its_message(arguments["type"])
    if "action" not in arguments and "choices" not in arguments:
        arguments.setdefault("metavar", METAVARS.get(arguments["type"], "NAME"))
    parser.add_argument(f"--{field.name}", help=help, **arguments)


def _with_its_message(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """A converter whose own words argparse prints; of a ValueError it would say no more than the function's name."""

    def converted(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return converted


def _shown_default(field: dataclasses.Field, options: type[Options], methods: Methods) -> str:
    """The default of a flag in words, and where methods or protocols have others."""

    def text(value: Any) -> str:
        if value is None or value is False or value == {}:
            return ""
        if isinstance(value, dict):
            return " ".join(f"{key}={count}" for key, count in value.items())
        return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    found: dict[str, str] = {}
    for name in readers(field.name, options, methods):
        found[name] = text(defaults(options, methods[name])[field.name])
    usual = text(default_of(field))
    if field.name == "method" or not found:
        return usual
    if len(set(found.values())) == 1 and field.name not in {f.name for f in dataclasses.fields(options)}:
        usual = next(iter(found.values()))
    others = [f"{name} {value}" for name, value in found.items() if value not in ("", usual)]
    others += [f"{name} {text(own[field.name])}" for name, own in options.by_protocol.items() if field.name in own]
    return "; ".join(filter(None, [usual, *others]))


def _in_kind(field: dataclasses.Field, given: Mapping[str, Any]) -> Any:
    """A parsed value in the kind of the field's default: argparse makes lists of what has several values."""
    value = given[field.name]
    if isinstance(value, list) and isinstance(default_of(field), dict) and len(dict(value)) < len(value):
        names = [name for name, _ in value]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{field.name} names {twice} twice; give each layer one count")
    return type(default_of(field))(value) if isinstance(value, list) else value


def read_config(path: Path, options: type[Options], methods: Methods, parser: Parser) -> dict[str, Any]:
    """The hyperparameters in a run's config.json, all but its folder.

    An old one also has other methods' flags, at some default: those are passed over.

    Raises:
        InputError: the file cannot be read, or is of another script.
        SystemExit: a value that its flag would not take either.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["hyperparameters"]
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); give the config.json of a run") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        values = None
    if not isinstance(values, dict) or not values:
        raise InputError(f"{path} is not the config.json of a run: it has no hyperparameters")
    name = values.get("method", default_of(options.__dataclass_fields__["method"]))
    if not isinstance(name, str) or name not in methods:
        raise InputError(f"{path} is of method {name!r}; known are: {', '.join(methods)}")
    method = methods[name]
    read = all_flags(options, method)
    foreign = [name for name in values if name not in read and not _is_a_default(name, values[name], options, methods)]
    if foreign:
        raise InputError(f"{path} is of another script or method: it has {', '.join(sorted(foreign))}")
    flags, empty = [], {}
    for name, field in read.items():
        if name not in values or name in NOT_REPEATED:  # a flag that has come since: its default is what was done
            continue
        value, default = values[name], default_of(field)
        if value is None and default is None:
            continue
        if value is None:
            raise InputError(f"{path}: {name} is null; it must be a value such as {default!r}")
        if value == {} and isinstance(default, dict):  # no flag says so
            empty[name] = value
        elif isinstance(default, bool) and isinstance(value, bool):
            flags += [f"--{name}"] * value
            empty[name] = value
        elif isinstance(default, str) and not isinstance(value, str):
            raise InputError(f"{path}: {name} is {value!r}; it must be text, such as {default!r}")
        elif isinstance(default, dict) and isinstance(value, dict):
            flags += [f"--{name}", *(f"{key}={count}" for key, count in value.items())]
        elif isinstance(default, tuple) and isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={value}")
    usage, parser.prog = parser.prog, f"{parser.prog}: {path}"
    parsed = vars(parser.parse_args(flags))  # an error names the file, since nobody typed these flags
    parser.prog = usage
    return empty | {name: _in_kind(read[name], parsed) for name in parsed}


def _is_a_default(name: str, value: Any, options: type[Options], methods: Methods) -> bool:
    """Whether a value is what some method, or the script, has for a flag where nobody says another."""
    values = [default_of(f) for f in dataclasses.fields(options) if f.name == name]
    values += [usual[name] for m in methods.values() if name in (usual := defaults(options, m))]
    values += [default_of(m.flags[name]) for m in methods.values() if name in m.flags]
    return any(value == (list(usual) if isinstance(usual, tuple) else usual) for usual in values)


def silence() -> None:
    """Let what is still to be printed go nowhere: where output cannot be written, Python would complain at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(program: str, text: str) -> None:
    """A line on stderr; of several processes of a run the first one says it."""
    if is_first_to_say(text):
        print(f"{program}: {text}", file=sys.stderr)


def exit_code(program: str, run: Callable[[], int]) -> int:
    """What `run` returns; what went wrong in it is one line on stderr, and the error's exit code."""
    tolerate_consoles()
    try:
        return run()
    except (InputError, DivergenceError, Stopped) as error:
        say(program, f"error: {error}")
        return error.exit_code
    except OSError as error:  # of a path that may not be entered, say, or a pipe that nobody reads any more
        with suppress(OSError):
            say(program, f"error: {refusal(error)}")
        silence()
    except (MemoryError, RuntimeError) as error:
        if not hardware.is_out_of_memory(error):
            raise
        what = "there is not enough memory for this network, its batches or its images; choose smaller ones"
        say(program, f"error: {what}")
    return InputError.exit_code


def script(main: Callable[[Sequence[str] | None], Any]) -> NoReturn:
    """Run a script's main, and exit."""
    program = Path(sys.argv[0]).name
    hardware.flush_denormals()
    warnings.showwarning = lambda message, *_: say(program, f"warning: {message}")

    def run() -> int:
        with stoppable(), joined():
            main(None)
        return 0

    sys.exit(exit_code(program, run))
