"""The four formats of a row: telling them apart by their columns, and checking a row into an example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from grads_dist.data.config import DataConfig
from grads_dist.data.rows import RowError, kind_of_value, shorten
from grads_dist.errors import ConfigError, DataError

RowFormat = Literal["messages", "prompt_completion", "text", "tokens"]
REQUIRED: dict[RowFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "tokens": ("input_ids",),
}
ROLES = ("system", "user", "assistant", "tool")
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Chat:
    """A conversation; of the messages from `num_prompt` on, the assistant's carry loss."""

    messages: list[dict[str, Any]]
    num_prompt: int = 0


@dataclass(frozen=True)
class Completion:
    """Text and how it goes on; what comes after the prompt carries loss."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """Text that carries loss throughout."""

    text: str


@dataclass(frozen=True)
class Tokens:
    """Token ids int64[T] and bool[T], whether each carries loss."""

    input_ids: np.ndarray
    loss: np.ndarray


Example = Chat | Completion | Text | Tokens


def resolve_format(config: DataConfig, columns: list[str], is_schema: bool = False) -> RowFormat:
    """The format of the rows: the configured one, or for `auto` the only one whose columns are there.

    columns: those of the first rows, or of all if `is_schema` is set. Raises DataError when no format fits or
    a column that is asked for does not exist, ConfigError when several fit.
    """
    found = ", ".join(shorten(repr(column)) for column in columns) or "none"
    for name, column in config.columns.items():
        if column not in columns:
            raise DataError(f"data.columns.{name}: no column {column!r} in the first rows; found: {found}")
    if config.format != "auto":
        missing = [repr(name) for name in map(config.column, REQUIRED[config.format]) if name not in columns]
        if missing and is_schema:
            raise DataError(f"data.format: {config.format} needs {' and '.join(missing)}; found: {found}")
        return config.format
    fitting = [name for name, needed in REQUIRED.items() if {*map(config.column, needed)} <= {*columns}]
    if len(fitting) > 1:
        raise ConfigError(f"data.format: the columns fit {' and '.join(fitting)}; set it to one of them")
    if not fitting:
        allowed = " | ".join(" + ".join(needed) for needed in REQUIRED.values())
        raise DataError(
            f"data.format: no format fits the columns of the first rows; found: {found}; "
            f"allowed: {allowed} (data.columns renames)"
        )
    return fitting[0]


def used_columns(config: DataConfig, row_format: RowFormat) -> list[str]:
    """The corpus's columns that this format reads."""
    optional = ("labels", "id") if row_format == "tokens" else ("id",)
    return [config.column(name) for name in (*REQUIRED[row_format], *optional)]


def read_id(row: dict[str, Any], config: DataConfig, index: int) -> str:
    """The row's own id as text, or its number where it has none."""
    value = row.get(config.column("id"))
    return str(index) if value is None or value == "" else str(value)


def read_example(row: dict[str, Any], config: DataConfig, row_format: RowFormat) -> Example:
    """Check `row` into an example. Raises RowError with the first thing that is wrong."""
    if row_format == "messages":
        name = config.column("messages")
        return Chat(_messages(_column(row, name), name))
    if row_format == "prompt_completion":
        return _prompt_completion(row, config)
    if row_format == "text":
        name = config.column("text")
        return Text(_text(_column(row, name), name))
    return _tokens(row, config)


def _column(row: dict[str, Any], name: str) -> Any:
    if name not in row:
        found = ", ".join(shorten(repr(key)) for key in list(row)[:8]) or "none"
        raise RowError("missing column", f"no column {name!r}; the row has: {found}")
    return row[name]


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise RowError("wrong type", f"{where} is {kind_of_value(value)}, not text")
    return value


def _messages(value: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise RowError("wrong type", f"{where} is {kind_of_value(value)}, not a list of messages")
    if not value:
        raise RowError("empty", f"{where} is empty")
    return [_message(message, f"{where}[{k}]") for k, message in enumerate(value)]


def _message(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError("wrong type", f"{where} is {kind_of_value(value)}, not an object")
    # Parquet gives every message every field of the schema; templates test for presence.
    message = {key: field for key, field in value.items() if field is not None}
    if message.get("role") not in ROLES:
        fault = f"unknown role {shorten(repr(message['role']))}" if "role" in message else "no role"
        raise RowError("unknown role", f"{fault} in {where}; allowed: {', '.join(ROLES)}")
    if "content" in message or not message.get("tool_calls"):
        _text(message.get("content"), f"{where}.content")
    return message


def _prompt_completion(row: dict[str, Any], config: DataConfig) -> Chat | Completion:
    names = [config.column("prompt"), config.column("completion")]
    prompt, completion = (_column(row, name) for name in names)
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _messages(prompt, names[0])
        return Chat(before + _messages(completion, names[1]), num_prompt=len(before))
    if isinstance(prompt, list) != isinstance(completion, list):
        raise RowError(
            "wrong type",
            f"{names[0]} is {kind_of_value(prompt)} but {names[1]} is {kind_of_value(completion)}; "
            "allowed: text in both, or a list of messages in both",
        )
    return Completion(_text(prompt, names[0]), _text(completion, names[1]))


def _tokens(row: dict[str, Any], config: DataConfig) -> Tokens:
    name, label_name = config.column("input_ids"), config.column("labels")
    input_ids = _integers(_column(row, name), name)
    if row.get(label_name) is None:
        return Tokens(input_ids, np.ones(len(input_ids), dtype=bool))
    labels = _integers(row[label_name], label_name)
    if len(labels) != len(input_ids):
        raise RowError("labels", f"{label_name} has {len(labels)} entries, {name} has {len(input_ids)}")
    wrong = np.flatnonzero((labels != input_ids) & (labels != IGNORED_LABEL))
    if len(wrong):
        k = int(wrong[0])
        raise RowError(
            "labels",
            f"{label_name}[{k}] is {labels[k]} but {name}[{k}] is {input_ids[k]}; "
            f"allowed: the token itself or {IGNORED_LABEL} (labels are not shifted)",
        )
    return Tokens(input_ids, labels != IGNORED_LABEL)


def _integers(value: object, where: str) -> np.ndarray:
    """int64[len(value)]."""
    if not isinstance(value, list):
        raise RowError("wrong type", f"{where} is {kind_of_value(value)}, not a list of whole numbers")
    for k, item in enumerate(value):
        # type() and not isinstance: true and false are ints to Python.
        if type(item) is not int:
            raise RowError("wrong type", f"{where}[{k}] is {kind_of_value(item)}, not a whole number")
        if not -(2**31) <= item < 2**31:
            raise RowError("token id", f"{where}[{k}] is {shorten(str(item))}, which is no token id")
    return np.array(value, dtype=np.int64)
