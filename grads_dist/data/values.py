"""Checks of a row's values, each with one clear reason where they fail."""

from __future__ import annotations

import json
from typing import Any

from grads_dist.data.rows import RowError, kind_of_value, shorten


def column(row: dict[str, Any], name: str) -> Any:
    """What the row holds under `name`; RowError when there is no such column."""
    if name not in row:
        found = ", ".join(shorten(repr(key)) for key in list(row)[:8]) or "none"
        raise RowError("missing column", f"no column {name!r}; the row has: {found}")
    return row[name]


def text(value: object, where: str) -> str:
    """`value`, which has to be text."""
    if not isinstance(value, str):
        raise RowError("wrong type", f"{where} is {kind_of_value(value)}, not text")
    return value


def parsed(value: object) -> Any:
    """A list or object that is written as JSON text, as tables and CSV files hold it; else `value` itself."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
