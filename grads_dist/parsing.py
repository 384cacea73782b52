"""From YAML files and `--a.b value` flags to configuration dataclasses, with one-line errors."""

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml
from jsonargparse import ArgumentParser, Namespace, set_dumper, set_loader, set_parsing_settings

from grads_dist.errors import ConfigError
from grads_dist.yaml_text import dump_yaml, load_value, map_text, read_document

C = TypeVar("C")
LONGEST_VALUE = 120

_MODE = "grads_dist"
_PLAIN = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def make_parser(prog: str, schema: type, description: str) -> ArgumentParser:
    """A parser for `--config FILE` and one flag for each field of the dataclass `schema`.

    The line under a field in the dataclass is its help.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader(_MODE, load_value, (yaml.YAMLError,))
    set_dumper(_MODE, dump_yaml)
    parser = ArgumentParser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False, parser_mode=_MODE
    )
    parser.add_argument("--config", action="config", help="YAML file; flags after it win over it")
    parser.add_class_arguments(schema)
    return parser


def parse(parser: ArgumentParser, args: Sequence[str], schema: type) -> Namespace:
    """Parse `args`; raises ConfigError with one line naming the field, the value and what is allowed."""
    for path in values_of("--config", args):
        check_file(path, schema)
    try:
        parsed = parser.parse_args(list(args))
    except argparse.ArgumentError as error:
        raise ConfigError(_condense(str(error), schema)) from error
    _check_nulls({f.name: parsed.get(f.name) for f in _fields(schema)}, schema, "")
    for key, value in list(parsed.items()):
        parsed[key] = map_text(value, str)
    return parsed


def take_flags(flags: argparse.ArgumentParser, args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse what `flags` knows, which is no field of a configuration; returns it and the other arguments."""
    try:
        return flags.parse_known_args(list(args))
    except argparse.ArgumentError as error:
        raise ConfigError(_condense(str(error), None)) from error


def build(parser: ArgumentParser, parsed: Namespace, schema: type[C]) -> C:
    """Make the dataclass `schema` of the parsed values; its own checks raise ConfigError."""
    values = parser.instantiate(parsed)
    return schema(**{f.name: values[f.name] for f in _fields(schema)})


def values_of(flag: str, args: Sequence[str]) -> list[str]:
    """Every value that `flag` has in `args`, in order, before they are parsed."""
    found = []
    for i, arg in enumerate(args):
        if arg == flag and i + 1 < len(args):
            found.append(args[i + 1])
        elif arg.startswith(f"{flag}="):
            found.append(arg.partition("=")[2])
    return found


def check_file(path: str, schema: type) -> None:
    """Raise ConfigError for a file that is missing, is no YAML map, or has keys unknown to `schema`."""
    try:
        content = read_document(Path(path))
    except OSError as error:
        raise ConfigError(
            f"config: {path!r} cannot be read ({error.strerror}); allowed: a YAML file"
        ) from error
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"config: {path!r} is not valid YAML ({error.problem}{line})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config: {path!r} is not YAML text ({_one_line(str(error))})") from error
    if content is None:
        raise ConfigError(f"config: {path!r} is empty; allowed: a map with {_names(schema)}")
    if not isinstance(content, Mapping):
        raise ConfigError(f"config: {path!r} holds {_shorten(content)}; allowed: a map with {_names(schema)}")
    _check_keys(content, schema, "")


def describe(hint: Any) -> str:
    """What a field of type `hint` takes, in words: `Literal["a", "b"] | None` gives `a, b or null`."""
    if hint in _PLAIN:
        return _PLAIN[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(str(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin in (list, Sequence):
        return f"a list of {describe(args[0])}"
    if origin is dict:
        return f"a map from {describe(args[0])} to {describe(args[1])}"
    if dataclasses.is_dataclass(hint):
        return f"a map with {_names(hint)}"
    return str(hint)


def field_type(schema: type, key: str) -> Any:
    """The type of the dotted field `key` of `schema`; None where there is no such field."""
    current: Any = schema
    for part in key.split("."):
        if not dataclasses.is_dataclass(current):
            return None
        current = typing.get_type_hints(current).get(part)
    return current


def _check_keys(content: Mapping[Any, Any], schema: type, prefix: str) -> None:
    for key, value in content.items():
        hint = field_type(schema, str(key)) if "." not in str(key) else None
        if hint is None:
            raise _unknown(f"{prefix}{_name(key)}", _shorten(value), schema, _place(prefix.rstrip(".")))
        section = _section(hint)
        if section is None:
            continue
        if isinstance(value, Mapping):
            _check_keys(value, section, f"{prefix}{key}.")
        elif value is not None:
            # The parser would take text for the name of another file.
            raise ConfigError(f"{prefix}{key}: {_shorten(value)} is not allowed; allowed: {describe(hint)}")


def _section(hint: Any) -> type | None:
    """The dataclass that a field holds, if it holds one."""
    for kind in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(kind):
            return typing.cast(type, kind)
    return None


def _check_nulls(values: Mapping[str, Any], schema: type, prefix: str) -> None:
    """Raise ConfigError where null is given for a field that takes none: the parser lets it pass."""
    hints = typing.get_type_hints(schema)
    for key, value in values.items():
        hint = hints.get(key)
        section = _section(hint)
        if value is None and type(None) not in (hint, *typing.get_args(hint)):
            raise ConfigError(f"{prefix}{key}: null is not allowed; allowed: {describe(hint)}")
        if section is not None and isinstance(value, (Namespace, Mapping)):
            _check_nulls(vars(value) if isinstance(value, Namespace) else value, section, f"{prefix}{key}.")


def _unknown(key: str, value: str, schema: type, place: str) -> ConfigError:
    return ConfigError(
        f"{key}: {value} is given, but there is no such field; allowed {place}: {_names(schema)}"
    )


def _condense(message: str, schema: type | None) -> str:
    """One line of what jsonargparse says in many."""
    required = re.search(r"arguments are required: (\S+?)(,|$)", message)
    if required:
        return f"{required.group(1)}: not given, but needed; {_allowed(schema, required.group(1))}"
    wrong = re.search(r'Parser key "([^"]+)":.*(?:Got|Given) value: (.*)', message, re.DOTALL)
    if wrong:
        key, value = wrong.group(1), wrong.group(2)
        nested = re.match(r"NestedArg\(key='([^']*)'", value)
        if nested:
            return f"{key}.{nested.group(1)}: no such field; {_allowed(schema, key)} for {key}"
        return f"{key}: {_shorten(value)} is not allowed; {_allowed(schema, key)}"
    unknown = re.match(r"unrecognized arguments: (\S+)(.*)", message, re.DOTALL)
    if unknown:
        return _unknown_flag(unknown.group(1), unknown.group(2).strip(), schema)
    mistyped = re.match(r"argument --(\S+): invalid int value: (.*)", message)
    if mistyped:
        return f"{mistyped.group(1)}: {mistyped.group(2)} is not allowed; allowed: a whole number"
    valued = re.match(r"argument --(\S+): ignored explicit argument (.*)", message, re.DOTALL)
    if valued:
        flag, value = valued.group(1), _one_line(valued.group(2))
        return f"{flag}: {value} is not allowed; --{flag} takes no value"
    lacking = re.search(r"argument --(\S+): expected one argument", message)
    if lacking:
        return f"{lacking.group(1)}: no value is given; {_allowed(schema, lacking.group(1))}"
    group = re.search(r"Parser key \"([^\"]+)\"|Group '([^']+)' does not accept", message)
    if group:
        key = group.group(1) or group.group(2)
        return f"{key}: this value is not allowed; {_allowed(schema, key)}"
    return _one_line(message)


def _unknown_flag(flag: str, rest: str, schema: type | None) -> str:
    if not flag.startswith("--") or not _name(flag[2:].partition("=")[0])[:1].isalpha():
        return f"arguments: {_shorten(flag)} is not allowed; allowed: flags such as --config FILE, see --help"
    key, _, value = flag[2:].partition("=")
    parent = key.rpartition(".")[0]
    owner = schema if not parent else field_type(schema, parent) if schema else None
    if owner is None or not dataclasses.is_dataclass(owner):
        return f"{key}: no such flag; allowed: see --help"
    return str(_unknown(key, _shorten(value or rest or "a value"), typing.cast(type, owner), _place(parent)))


def _place(section: str) -> str:
    return f"in {section}" if section else "at the top level"


def _allowed(schema: type | None, key: str) -> str:
    hint = field_type(schema, key) if schema is not None else None
    return f"allowed: {describe(hint)}" if hint is not None else "see --help"


def _fields(schema: Any) -> tuple[Any, ...]:
    return dataclasses.fields(schema)


def _name(key: Any) -> str:
    """A key as it is, or quoted where it does not look like one."""
    return key if isinstance(key, str) and re.fullmatch(r"\w[\w.-]{0,99}", key) else _shorten(key)


def _names(schema: Any) -> str:
    return ", ".join(f.name for f in _fields(schema))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _shorten(value: Any) -> str:
    text = _one_line(str(value))
    return repr(text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "...")
