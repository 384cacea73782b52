"""Formats: told apart by columns, and rows checked with one clear reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from grads_dist.data.config import DataConfig
from grads_dist.data.detect import resolve_format
from grads_dist.data.example import Chat, Completion, Text, Tokens
from grads_dist.data.formats import read_example, read_id
from grads_dist.data.rows import RowError
from grads_dist.errors import ConfigError, DataError

ALLOWED = "allowed: system, user, assistant, tool"


def config(**options: Any) -> DataConfig:
    return DataConfig("a.jsonl", **options)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["id", "messages", "prompt"], "messages"),
        (["completion", "prompt"], "prompt_completion"),
        (["text", "source"], "text"),
        (["input_ids", "labels"], "tokens"),
    ],
)
def test_format_follows_the_columns(columns: list[str], expected: str) -> None:
    assert resolve_format(config(), columns) == expected


def test_renamed_columns_count_and_explicit_formats_win() -> None:
    assert resolve_format(config(columns={"text": "body"}), ["body"]) == "text"
    assert resolve_format(config(format="text"), ["messages", "text"]) == "text"


def test_columns_that_fit_no_format_are_named() -> None:
    with pytest.raises(DataError) as failure:
        resolve_format(config(), ["dialog", "id"])
    assert str(failure.value) == (
        "data.format: no format fits the columns of the first rows; found: 'dialog', 'id'; "
        "allowed: messages | conversations | instruction + output | prompt + completion | text | input_ids "
        "(data.columns renames)"
    )


@pytest.mark.parametrize("mask", ["completion_mask", "assistant_masks"])
def test_masks_that_would_not_be_read_are_refused(mask: str) -> None:
    with pytest.raises(DataError, match=f"data.format: '{mask}' beside token ids is not read"):
        resolve_format(config(), ["input_ids", mask])
    assert resolve_format(config(), ["input_ids", "labels", mask]) == "tokens"
    assert resolve_format(config(format="tokens"), ["input_ids", mask]) == "tokens"


def test_explicit_format_needs_its_columns_in_a_schema_but_not_in_the_first_rows() -> None:
    assert resolve_format(config(format="messages"), ["text"]) == "messages"
    with pytest.raises(DataError, match="data.format: messages needs 'messages'; found: 'text'"):
        resolve_format(config(format="messages"), ["text"], is_schema=True)


def test_columns_that_fit_several_formats_are_refused() -> None:
    with pytest.raises(ConfigError, match="data.format: the columns fit messages and alpaca; set it to one"):
        resolve_format(config(), ["text", "messages", "instruction", "output"])


def test_renamed_column_that_does_not_exist_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"data\.columns\.id: no column 'uid' in the first rows; found: 'text'"
    ):
        resolve_format(config(columns={"id": "uid"}), ["text"])


def message(role: Any = "user", content: Any = "x", **rest: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **rest}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([message(), message("robot")], f"unknown role 'robot' in messages[1]; {ALLOWED} (data.roles maps)"),
        ([message(None)], f"no role in messages[0]; {ALLOWED}"),
        ([message(["user"])], f"unknown role ['user'] in messages[0]; {ALLOWED} (data.roles maps)"),
        ([{"content": "x"}], f"no role in messages[0]; {ALLOWED}"),
        ([message(content=None)], "messages[0].content is null, not text"),
        ([message(content=float("nan"))], "messages[0].content is a number (nan), not text"),
        ([message(content=[{"type": "text"}])], "messages[0].content is a list, not text"),
        (["hello"], "messages[0] is text, not an object"),
        ([], "messages is empty"),
        ("hello", "messages is text, not a list of messages"),
        (None, "messages is null, not a list of messages"),
    ],
)
def test_bad_messages(messages: Any, reason: str) -> None:
    with pytest.raises(RowError) as failure:
        read_example({"messages": messages}, config(), "messages")
    assert failure.value.reason == reason


def test_missing_column_names_what_is_there() -> None:
    with pytest.raises(RowError) as failure:
        read_example({"prompt": "a", "answer": "b"}, config(), "prompt_completion")
    assert failure.value.reason == "no column 'completion'; the row has: 'prompt', 'answer'"


def test_fields_without_a_value_are_dropped_and_calls_need_no_content() -> None:
    call = message("assistant", None, tool_calls=[{"name": "f"}], name=None)
    example = read_example({"messages": [call]}, config(), "messages")
    assert example == Chat([{"role": "assistant", "tool_calls": [{"name": "f"}]}])


def test_an_empty_list_of_calls_is_absent() -> None:
    row = {"messages": [{"role": "assistant", "content": "a", "tool_calls": []}]}
    example = read_example(row, config(), "messages")
    assert isinstance(example, Chat) and example.messages == [{"role": "assistant", "content": "a"}]


def test_prompts_are_text_or_messages() -> None:
    row = {"q": "a", "completion": "b"}
    assert read_example(row, config(columns={"prompt": "q"}), "prompt_completion") == Completion("a", "b")
    row = {"prompt": [message()], "completion": [message("assistant", "y")]}
    assert read_example(row, config(), "prompt_completion") == Chat([message(), message("assistant", "y")], 1)
    with pytest.raises(RowError, match="prompt is text but completion is a list; allowed: text in both"):
        read_example({"prompt": "a", "completion": [message()]}, config(), "prompt_completion")


def test_text() -> None:
    assert read_example({"text": "a\0b"}, config(), "text") == Text("a\0b")
    with pytest.raises(RowError, match=r"text is a number \(3\), not text"):
        read_example({"text": 3}, config(), "text")


def test_tokens_with_and_without_labels() -> None:
    example = read_example({"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}, config(), "tokens")
    assert isinstance(example, Tokens)
    assert example.input_ids.tolist() == [5, 6, 7] and example.loss.tolist() == [False, True, False]
    for row in ({"input_ids": [5, 6]}, {"input_ids": [5, 6], "labels": None}):
        example = read_example(row, config(), "tokens")
        assert isinstance(example, Tokens) and np.all(example.loss)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"input_ids": [5, 6, 7], "labels": [5, 7, 8]},
            "labels[1] is 7 but input_ids[1] is 6; "
            "allowed: the token itself or -100 (labels are not shifted)",
        ),
        ({"input_ids": [5, 6], "labels": [5]}, "labels has 1 entries, input_ids has 2"),
        ({"input_ids": [5, 6.0]}, "input_ids[1] is a number (6.0), not a whole number"),
        ({"input_ids": [True]}, "input_ids[0] is a boolean, not a whole number"),
        ({"input_ids": [2**31]}, "input_ids[0] is 2147483648, which is no token id"),
        ({"input_ids": "5 6"}, "input_ids is text, not a list of whole numbers"),
        ({"input_ids": [1, 2], "labels": [None, 2]}, "labels[0] is null, not a whole number"),
    ],
)
def test_bad_tokens(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as failure:
        read_example(row, config(), "tokens")
    assert failure.value.reason == reason


def test_padding_must_neither_carry_loss_nor_precede_it() -> None:
    row: dict[str, Any] = {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}
    with pytest.raises(RowError, match=r"attention_mask\[2\] is 0; allowed: tokens without padding"):
        read_example(row, config(), "tokens")
    with pytest.raises(RowError, match=r"attention_mask\[0\] is 0"):
        read_example({**row, "labels": [-100, 6, -100], "attention_mask": [0, 1, 1]}, config(), "tokens")
    example = read_example({**row, "labels": [5, 6, -100]}, config(), "tokens")
    assert isinstance(example, Tokens) and example.loss.tolist() == [True, True, False]


def test_ids_are_text_and_default_to_the_row_number() -> None:
    ids = [read_id(row, config(), 7) for row in ({"id": "a"}, {"id": 12}, {"id": None}, {"id": ""}, {})]
    assert ids == ["a", "12", "7", "7", "7"]
    assert read_id({"uid": "u"}, config(columns={"id": "uid"}), 7) == "u"
