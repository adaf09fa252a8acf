"""Command lines made from an Options dataclass, and errors as one line on stderr."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from engine import hardware
from engine.interrupts import stoppable
from engine.options import Options, check
from gradproj.errors import DivergenceError, InputError, Stopped
from methods import METHODS

METAVARS = {int: "N", float: "X"}
SomeOptions = TypeVar("SomeOptions", bound=Options)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see --help)\n")


def parse(
    options: type[SomeOptions], argv: Sequence[str] | None, description: str | None, prog: str | None = None
) -> SomeOptions:
    """The options that a command line gives: one flag for each field, defaults and help from the dataclass.

    Methods with a learning rate of their own have it unless --lr says another.

    Args:
        options: the dataclass.
        argv: the command line; None for this process's own.
        description: what --help says first.
        prog: the program's name in errors; this process's own where not given.
    Raises:
        InputError: values that no run can use.
    """
    parser = Parser(
        prog=prog or Path(sys.argv[0]).name,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in dataclasses.fields(options):
        add_flag(parser, field)
    parser.add_argument("--config", metavar="FILE", help="config.json of a run to repeat; further flags change it")
    first = parser.parse_args(argv)
    if first.config is not None:
        parser.set_defaults(**read_config(Path(first.config), options, parser))
    elif (rate := METHODS[first.method].learning_rate) is not None:
        parser.set_defaults(lr=rate)
    values = vars(parser.parse_args(argv))
    del values["config"]
    for field in dataclasses.fields(options):
        if isinstance(values[field.name], list):  # argparse makes lists of what has several values
            values[field.name] = type(default_of(field))(values[field.name])
    parsed = options(**values)
    check(parsed)
    return parsed


def read_config(path: Path, options: type[Options], parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The hyperparameters in a run's config.json, all but its folder.

    Raises:
        InputError: the file cannot be read, or is of another script.
        SystemExit: a value that its flag would not take either.
    """
    try:
        values = dict(json.loads(path.read_text())["hyperparameters"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not the config.json of a run: {error!r}") from error
    names = {field.name for field in dataclasses.fields(options)}
    if set(values) - names:
        raise InputError(f"{path} is of another script: it has {', '.join(sorted(set(values) - names))}")
    flags, empty = [], {}
    for field in dataclasses.fields(options):
        if field.name not in values:  # a flag that has come since: its default is what was done before
            continue
        name, value, default = field.name, values[field.name], default_of(field)
        if name in ("run_folder", "no_resume") or (value is None and default is None):
            continue
        if value == {} and isinstance(default, dict):  # no flag says so
            empty[name] = value
        elif isinstance(default, bool) and isinstance(value, bool):
            flags += [f"--{name}"] * value
        elif isinstance(default, dict) and isinstance(value, dict):
            flags += [f"--{name}", *(f"{key}={count}" for key, count in value.items())]
        elif isinstance(default, tuple) and isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={value}")
    parsed = vars(parser.parse_args(flags))
    return {name: parsed[name] for name in values.keys() - {"run_folder", "no_resume"}} | empty


def add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    """Add one field of an options dataclass."""
    default = default_of(field)
    inherited = next((base for base in dataclasses.fields(Options) if base.name == field.name), field)
    arguments = {**inherited.metadata["parser"], **field.metadata["parser"]}
    shown = " ".join(f"{k}={v}" for k, v in default.items()) if isinstance(default, dict) else default
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else shown
    help = field.metadata["help"].replace("%", "%%")
    if default is not None and default is not False and default != {}:
        own = [f"{m.name} {m.learning_rate}" for m in METHODS.values() if m.learning_rate and field.name == "lr"]
        help += f" (default: {'; '.join([str(shown), *own])})"
    if isinstance(default, bool):
        arguments["action"] = "store_true"
    elif field.name == "method":
        arguments["choices"] = tuple(METHODS)
    elif isinstance(default, tuple):
        arguments.update(nargs="+", type=type(default[0]))
    elif default is not None:
        arguments.setdefault("type", type(default))
    else:
        arguments.setdefault("type", int)
    if "action" not in arguments and "choices" not in arguments:
        arguments.setdefault("metavar", METAVARS.get(arguments["type"], "NAME"))
    parser.add_argument(f"--{field.name}", default=default, help=help, **arguments)


def default_of(field: dataclasses.Field) -> Any:
    """A field's default value."""
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


def script(main: Callable[[Sequence[str] | None], Any]) -> NoReturn:
    """Run a script's main; what went wrong is one line on stderr and the error's exit code."""
    program = Path(sys.argv[0]).name
    hardware.flush_denormals()
    warnings.showwarning = lambda message, *_: print(f"{program}: warning: {message}", file=sys.stderr)
    try:
        with stoppable():
            main(None)
    except (InputError, DivergenceError, Stopped) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0)
