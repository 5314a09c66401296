"""Command lines: `--config run.yaml --field value` into flat dataclasses, with errors that say what to change.

`trl.TrlParser` does the parsing (defaults < YAML < flags). Around it stand checks it lacks: an unknown key names the
nearest field, and a YAML value must have the type of its field (the parser itself takes any).
"""

import dataclasses
import difflib
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # trl's trainers send usage telemetry unless this is set first

import yaml

from configs.errors import UserError

_check_only: ContextVar[bool] = ContextVar("_check_only", default=False)


class _Parsed(Exception):
    """Ends a main after its command line was read."""


def parse(*dataclass_types: type, args: list[str] | None = None) -> tuple[Any, ...]:
    """Parse a command line into one instance of each dataclass, in the order given.

    Args:
        dataclass_types: flat dataclasses whose field names do not repeat.
        args: the words of the command line; None takes those of the process.

    Raises:
        UserError: unreadable YAML, an unknown or repeated field, a value of a wrong type, or a `UserError`/`ValueError`
            raised by a dataclass's own checks.
    """
    from trl import TrlParser  # importing trl takes seconds: not before a command line is really parsed

    words = list(sys.argv[1:] if args is None else args)
    fields = _fields(dataclass_types)
    config_path, words = _take_config(words)
    config = load_yaml(config_path) if config_path else {}
    for key, value in config.items():
        if key not in fields:
            raise UserError(f"{config_path}: unknown field '{key}'{_nearest(key, fields)}")
        config[key] = _checked(value, fields[key], f"{config_path}: {key}")
    _check_flags(words, fields)

    parser = _make_parser(TrlParser, dataclass_types)
    parser.set_defaults_with_config(**config)
    try:
        parsed = parser.parse_args_into_dataclasses(args=words, look_for_args_file=False)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    if _check_only.get():
        raise _Parsed
    return parsed


def check(main: Callable[[list[str]], Any], args: list[str]) -> None:
    """Read a command line as `main` would, and no more: raises what `parse`, every main's first step, raises."""
    token = _check_only.set(True)
    try:
        main(args)
    except _Parsed:
        pass
    finally:
        _check_only.reset(token)


def entry(main: Callable[[], Any]) -> None:
    """Run a script's main for `if __name__ == "__main__"`: a UserError becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _make_parser(parser_type: type, dataclass_types: Iterable[type]) -> Any:
    class Parser(parser_type):
        def add_argument(self, *names: str, **options: Any) -> Any:
            if isinstance(options.get("help"), str):  # argparse would take a "%" in a field's help for a format
                options["help"] = options["help"].replace("%%", "%").replace("%", "%%")
            return super().add_argument(*names, **options)

        def error(self, message: str) -> typing.NoReturn:
            raise UserError(message)

    return Parser(tuple(dataclass_types))


def _fields(dataclass_types: Iterable[type]) -> dict[str, Any]:
    """Field name -> resolved type, over all dataclasses."""
    fields: dict[str, Any] = {}
    for dataclass_type in dataclass_types:
        hints = typing.get_type_hints(dataclass_type)
        for field in dataclasses.fields(dataclass_type):
            if not field.init:
                continue
            if field.name in fields:
                raise ValueError(f"field '{field.name}' is in two of the dataclasses")
            fields[field.name] = hints[field.name]
    return fields


def _take_config(words: list[str]) -> tuple[str | None, list[str]]:
    for index, word in enumerate(words):
        if word == "--config":
            if index + 1 == len(words):
                raise UserError("--config needs the path of a YAML file")
            return words[index + 1], words[:index] + words[index + 2 :]
        if word.startswith("--config="):
            return word.removeprefix("--config="), words[:index] + words[index + 1 :]
    return None, words


def load_yaml(path: str, field: str = "--config") -> dict[str, Any]:
    """The fields of a YAML file. UserError, naming `field`, where it cannot be read or is no mapping."""
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{field} {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise UserError(f"{path} must be a mapping of fields to values, not a {type(config).__name__}")
    return {str(key): value for key, value in config.items()}


def _check_flags(words: list[str], fields: dict[str, Any]) -> None:
    """Refuses unknown flags, abbreviations too: argparse by itself would read --learn as --learning_rate."""
    known = set(fields) | {f"no_{name}" for name in fields} | {"help"}
    for word in words:
        if word.startswith("--") and word != "--":
            name = word[2:].split("=", 1)[0].replace("-", "_")
            if name not in known:
                raise UserError(f"unknown field '--{name}'{_nearest(name, fields)}")


def _nearest(name: str, fields: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(fields), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known fields: {', '.join(sorted(fields))}"


def _checked(value: Any, kind: Any, where: str) -> Any:
    """`value` if it is one of `kind`. A float may be written as 3 or as 1e-4 (which YAML 1.1 reads as a string)."""
    options = _options(kind)
    if options is None:
        return value
    for option in options:
        if isinstance(option, tuple):  # the values of a Literal
            if value in option:
                return value
        elif option is type(None):
            if value is None:
                return value
        elif option is float and not isinstance(value, bool) and isinstance(value, int | float | str):
            try:
                return float(value)
            except ValueError:
                continue
        elif option is int and isinstance(value, bool):
            continue
        elif isinstance(value, option):
            return _checked_items(value, kind, where) if option is list else value
    names = " or ".join(str(o) if isinstance(o, tuple) else o.__name__ for o in options)
    raise UserError(f"{where} must be {names}, not {value!r} ({type(value).__name__})")


def _checked_items(values: list[Any], kind: Any, where: str) -> list[Any]:
    """Checks the items too where the hint is list[X] or list[X] | None."""
    parts = [kind, *typing.get_args(kind)]
    items = [typing.get_args(part)[0] for part in parts if typing.get_origin(part) is list and typing.get_args(part)]
    return [_checked(value, items[0], f"{where}, item {n}") for n, value in enumerate(values, 1)] if items else values


def _options(kind: Any) -> list[Any] | None:
    """The plain types (or Literal values, as a tuple) that a hint allows; None for hints that are not checked here."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        parts = [_options(part) for part in typing.get_args(kind)]
        return None if None in parts else [option for part in parts if part for option in part]
    if origin is typing.Literal:
        return [typing.get_args(kind)]
    if origin in (list, tuple, dict):
        return [list if origin is tuple else origin]
    return [kind] if kind in (int, float, str, bool, list, dict, type(None)) else None
