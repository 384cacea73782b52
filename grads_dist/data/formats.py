"""The formats of a row: each is checked and read into an example."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from grads_dist.data.config import DataConfig
from grads_dist.data.conversation import read_alpaca, read_messages, read_sharegpt, read_tools
from grads_dist.data.example import Chat, Completion, Example, Text, Tokens
from grads_dist.data.rows import RowError, kind_of_value, shorten
from grads_dist.data.values import column, parsed, text

RowFormat = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text", "tokens"]
REQUIRED: dict[RowFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "tokens": ("input_ids",),
}
OPTIONAL: dict[RowFormat, tuple[str, ...]] = {
    "messages": ("tools",),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system", "history", "tools"),
    "prompt_completion": ("tools",),
    "text": (),
    "tokens": ("labels", "attention_mask"),
}
CHATS: tuple[RowFormat, ...] = ("messages", "sharegpt", "alpaca")
"""The formats whose rows are always conversations."""
IGNORED_LABEL = -100


def used_columns(config: DataConfig, row_format: RowFormat) -> list[str]:
    """The corpus's columns that this format reads."""
    return [config.column(name) for name in (*REQUIRED[row_format], *OPTIONAL[row_format], "id")]


def read_id(row: dict[str, Any], config: DataConfig, index: int) -> str:
    """The row's own id as text, or its number where it has none."""
    value = row.get(config.column("id"))
    return str(index) if value is None or value == "" else str(value)


def read_example(row: dict[str, Any], config: DataConfig, row_format: RowFormat) -> Example:
    """Check `row` into an example. Raises RowError with the first thing that is wrong."""
    if row_format == "messages":
        name = config.column("messages")
        return Chat(read_messages(column(row, name), name, config), tools=read_tools(row, config))
    if row_format == "sharegpt":
        return read_sharegpt(row, config)
    if row_format == "alpaca":
        return read_alpaca(row, config)
    if row_format == "prompt_completion":
        return _prompt_completion(row, config)
    if row_format == "text":
        name = config.column("text")
        return Text(text(column(row, name), name))
    return _tokens(row, config)


def _prompt_completion(row: dict[str, Any], config: DataConfig) -> Chat | Completion:
    names = [config.column("prompt"), config.column("completion")]
    prompt, completion = (column(row, name) for name in names)
    if isinstance(prompt, list) and isinstance(completion, list):
        before = read_messages(prompt, names[0], config)
        after = read_messages(completion, names[1], config)
        return Chat(before + after, num_prompt=len(before), tools=read_tools(row, config))
    if isinstance(prompt, list) != isinstance(completion, list):
        raise RowError(
            "wrong type",
            f"{names[0]} is {kind_of_value(prompt)} but {names[1]} is {kind_of_value(completion)}; "
            "allowed: text in both, or a list of messages in both",
        )
    return Completion(text(prompt, names[0]), text(completion, names[1]))


def _tokens(row: dict[str, Any], config: DataConfig) -> Tokens:
    name, label_name = config.column("input_ids"), config.column("labels")
    input_ids = _integers(column(row, name), name)
    labels = row.get(label_name)
    if labels is None or labels == "":
        loss = np.ones(len(input_ids), dtype=bool)
    else:
        loss = _label_loss(input_ids, name, _integers(labels, label_name), label_name)
    _check_padding(row, loss)
    return Tokens(input_ids, loss)


def _label_loss(input_ids: np.ndarray, name: str, labels: np.ndarray, label_name: str) -> np.ndarray:
    """bool[len(input_ids)]: which tokens the labels give loss."""
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
    return labels != IGNORED_LABEL


def _check_padding(row: dict[str, Any], loss: np.ndarray) -> None:
    """Raise RowError for padding that would carry loss, or stand before what does and be seen by it."""
    value = row.get("attention_mask")
    if value is None or value == "" or not loss.any():
        return
    is_padding = _integers(value, "attention_mask")[: int(np.flatnonzero(loss)[-1]) + 1] == 0
    if is_padding.any():
        k = int(np.flatnonzero(is_padding)[0])
        raise RowError("padding", f"attention_mask[{k}] is 0; allowed: tokens without padding")


def _integers(value: object, where: str) -> np.ndarray:
    """int64[len(value)]."""
    value = parsed(value)
    if not isinstance(value, list):
        raise RowError("wrong type", f"{where} is {kind_of_value(value)}, not a list of whole numbers")
    for k, item in enumerate(value):
        # type() and not isinstance: true and false are ints to Python.
        if type(item) is not int:
            raise RowError("wrong type", f"{where}[{k}] is {kind_of_value(item)}, not a whole number")
        if not -(2**31) <= item < 2**31:
            raise RowError("token id", f"{where}[{k}] is {shorten(str(item))}, which is no token id")
    return np.array(value, dtype=np.int64)
