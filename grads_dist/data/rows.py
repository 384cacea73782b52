"""Rows that cannot be used: why, in one line."""

from dataclasses import dataclass

from grads_dist.errors import one_line


@dataclass(frozen=True)
class Broken:
    """A corpus row that could not be read; stands in the row's place."""

    reason: str


_MOST_QUOTED = 80


def shorten(text: str, length: int = _MOST_QUOTED) -> str:
    """`text` with at most about `length` characters: what a reason quotes can be as long as a row."""
    return text if len(text) <= length else f"{text[:length]}..."


class RowError(Exception):
    """A row cannot be used; `reason` is one clear line and `kind` groups rows that failed alike."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = one_line(reason)


def kind_of_value(value: object) -> str:
    """What a JSON value is, in the words a message uses."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return f"a number ({shorten(str(value))})"
    if isinstance(value, str):
        return "text"
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, (list, tuple)) else f"a {type(value).__name__}"
