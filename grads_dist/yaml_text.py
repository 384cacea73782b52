"""YAML from files that nobody has checked, and YAML that every reader reads alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

MOST_BYTES = 1 << 20
MOST_VALUES = 100_000
"""Values of a document; aliases count as what they stand for, which may be much more than was written."""
MOST_LEVELS = 50

# Text that no reader of YAML takes for anything else; more is quoted than has to be.
_BARE = re.compile(r"[A-Za-z_][\w./-]*", re.ASCII)
_PLAIN_TYPES = (type(None), bool, int, float, str)
_TIMESTAMP = "tag:yaml.org,2002:timestamp"


class Text(str):
    """Text inside a YAML document: the parser would read a plain `str` as YAML a second time."""


def dump_yaml(content: Any) -> str:
    """YAML in which all text that could be read as something else, now or by another reader, is quoted."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load_value(text: str) -> Any:
    """The value of a flag or of a file's text, as jsonargparse reads YAML, with all text in it as `Text`.

    Raises yaml.YAMLError, and nothing else, for what is no YAML, or too much or too deep of it.
    """
    value = _guarded(get_loader("yaml"), text)
    return value if isinstance(value, str) else map_text(value, Text)


def read_document(path: Path) -> Any:
    """What a YAML file holds; no key may stand twice in a map.

    Raises OSError when it cannot be read, and yaml.YAMLError for all else that is wrong with it.
    """
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise yaml.YAMLError(f"it has more than {MOST_BYTES} bytes")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise yaml.YAMLError(str(error)) from error
    return _guarded(lambda given: yaml.load(given, Loader=_Loader), text)


def map_text(value: Any, kind: type[str]) -> Any:
    """The same value with all text in it, keys of maps aside, of type `kind`."""
    if isinstance(value, str):
        return kind(value)
    if isinstance(value, dict):
        return {k: map_text(v, kind) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_text(v, kind) for v in value)
    return value


def _guarded(load: Callable[[str], Any], text: str) -> Any:
    try:
        value = load(text)
    except RecursionError as error:
        raise yaml.YAMLError(f"it is more than {MOST_LEVELS} levels deep") from error
    except ValueError as error:
        # Numbers of thousands of digits, and values that are not what their tag says.
        raise yaml.YAMLError(str(error)) from error
    _check_values(value)
    return value


def _check_values(value: Any) -> None:
    """Raise YAMLError for what is too much, too deep, or of a type that no field has."""
    count, waiting = 0, [(value, 1)]
    while waiting:
        value, level = waiting.pop()
        count += 1
        if count > MOST_VALUES:
            raise yaml.YAMLError(f"it holds more than {MOST_VALUES} values, aliases counted")
        if level > MOST_LEVELS:
            raise yaml.YAMLError(f"it is more than {MOST_LEVELS} levels deep")
        if isinstance(value, dict):
            waiting += [(child, level + 1) for pair in value.items() for child in pair]
        elif isinstance(value, list):
            waiting += [(child, level + 1) for child in value]
        elif not isinstance(value, _PLAIN_TYPES):
            raise yaml.YAMLError(f"it holds a {type(value).__name__}; allowed: maps, lists, texts, numbers")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # one of two bases
    """Refuses keys that stand twice, of which the last would win; dates are text, as jsonargparse has it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value[:40]!r} stands twice", key.start_mark
                )
            seen.add(name)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Quotes by `_BARE`; PyYAML alone leaves `1e3` bare, which other readers take for a number."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if _BARE.fullmatch(text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style=style)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(Text, _represent_text)
