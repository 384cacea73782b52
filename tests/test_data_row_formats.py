"""Formats of rows: the same conversation gives the same tokens and labels, however it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import CALLING, CALLING_MARKED, GENERATION, build, make_tokenizer, write_jsonl
from test_data_tokenize import decoded

from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.data.detect import resolve_format, resolve_formats
from grads_dist.data.example import Chat
from grads_dist.data.formats import RowFormat, read_example
from grads_dist.data.rows import RowError
from grads_dist.data.target import about_target, target_config
from grads_dist.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("model"), CALLING)


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def turn(tag: str, value: Any) -> dict[str, Any]:
    return {"from": tag, "value": value}


CALL = {"name": "weather", "arguments": {"city": "Rome", "days": 2}}
OTHER = {"name": "clock", "arguments": {}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def calls(*functions: dict[str, Any]) -> dict[str, Any]:
    made = [{"type": "function", "function": function} for function in functions]
    return {"role": "assistant", "tool_calls": made}


USER, ANSWER = message("user", "hello\nthe fox"), message("assistant", "four.")
SYSTEM = message("system", "you are")
EARLIER = [message("user", "one?"), message("assistant", "two")]
TALK = [message("user", "rain?"), calls(CALL), message("tool", "sun"), message("assistant", "no")]

SAME: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "sharegpt": (
        {"conversations": [turn("system", "you are"), turn("human", USER["content"]), turn("gpt", "four.")]},
        [{"messages": [SYSTEM, USER, ANSWER]}],
    ),
    "sharegpt, other tags": (
        {"conversations": [turn("user", USER["content"]), turn("model", "four."), turn("assistant", "")]},
        [{"messages": [USER, ANSWER, message("assistant", "")]}],
    ),
    "sharegpt, system column": (
        {"conversations": [turn("human", USER["content"]), turn("gpt", "four.")], "system": "you are"},
        [{"messages": [SYSTEM, USER, ANSWER]}],
    ),
    "sharegpt, its own system goes first": (
        {"conversations": [turn("system", "you are"), turn("human", "a"), turn("gpt", "b")], "system": "x"},
        [{"messages": [SYSTEM, message("user", "a"), message("assistant", "b")]}],
    ),
    "sharegpt, role and content": (
        {"conversations": [USER, ANSWER], "system": ""},
        [{"messages": [USER, ANSWER]}],
    ),
    "sharegpt, a call": (
        {
            "conversations": [
                turn("human", "rain?"),
                turn("function_call", json.dumps(CALL)),
                turn("observation", "sun"),
                turn("gpt", "no"),
            ],
            "tools": json.dumps(TOOLS),
        },
        [{"messages": TALK, "tools": TOOLS}],
    ),
    "sharegpt, several calls": (
        {
            "conversations": [
                turn("human", "rain?"),
                turn("function_call", [CALL, {**OTHER, "arguments": "{}"}]),
                turn("function", "sun"),
                turn("tool", "noon"),
            ]
        },
        [{"messages": [TALK[0], calls(CALL, OTHER), message("tool", "sun"), message("tool", "noon")]}],
    ),
    "alpaca": (
        {"instruction": "hello", "input": "the fox", "output": "four."},
        [{"messages": [USER, ANSWER]}],
    ),
    "alpaca, no input": (
        {"instruction": "hello\nthe fox", "input": "", "output": "four.", "system": None, "history": None},
        [{"messages": [USER, ANSWER]}],
    ),
    "alpaca, system and history": (
        {
            "instruction": "hello",
            "input": "the fox",
            "output": "four.",
            "system": "you are",
            "history": [["one?", "two"]],
        },
        [{"messages": [SYSTEM, *EARLIER, USER, ANSWER]}],
    ),
    "calls with arguments as text": (
        {"messages": [TALK[0], calls({**CALL, "arguments": json.dumps(CALL["arguments"])}), *TALK[2:]]},
        [{"messages": TALK, "tools": []}],
    ),
    "calls without a type, a single function_call": (
        {
            "messages": [
                TALK[0],
                {"role": "assistant", "content": None, "function_call": CALL},
                message("function", "sun"),
                TALK[3],
            ]
        },
        [{"messages": TALK}],
    ),
    "prompt and completion": (
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        [{"messages": [SYSTEM, USER, ANSWER]}],
    ),
    "json text": (
        {"messages": json.dumps([USER, ANSWER]), "tools": ""},
        [{"messages": [USER, ANSWER]}],
    ),
}


@pytest.mark.parametrize("marked", [False, True], ids=["prefix", "generation"])
@pytest.mark.parametrize("name", SAME)
def test_a_row_gives_what_the_same_messages_give(
    tmp_path: Path, model: Path, name: str, marked: bool
) -> None:
    row, same = SAME[name]
    options = {}
    if marked:
        (tmp_path / "t.jinja").write_text(CALLING_MARKED)
        options["chat_template"] = str(tmp_path / "t.jinja")
    paths = [write_jsonl(tmp_path / f"{k}.jsonl", rows) for k, rows in enumerate([[row], same])]
    store = build(tmp_path, list(map(str, paths)), model, **options)
    assert list(store.iter_rejected()) == []
    first, second = decoded(store, model)
    assert first == second and first[1] != ""
    assert store.tokens(0).tolist() == store.tokens(1).tolist()
    assert store.loss_mask(0).tolist() == store.loss_mask(1).tolist()


def test_calls_and_tools_reach_the_model(tmp_path: Path, model: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TALK, "tools": TOOLS}])
    text, loss = decoded(build(tmp_path, path, model), model)[0]
    assert text.startswith(f"<|im_start|>tools\n{json.dumps(TOOLS)}<|im_end|>\n")
    assert loss == 'weather({"city": "Rome", "days": 2})<|im_end|>no<|im_end|>'


def test_a_table_that_pads_calls_with_nulls_gives_the_same_tokens(tmp_path: Path, model: Path) -> None:
    rows = [
        {"messages": [TALK[0], calls(CALL)], "tools": TOOLS},
        {"messages": [TALK[0], calls({"name": "clock", "arguments": {"zone": "UTC"}})], "tools": []},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() != rows
    stores = [
        build(tmp_path, path, model)
        for path in (tmp_path / "a.parquet", write_jsonl(tmp_path / "a.jsonl", list(rows)))
    ]
    assert decoded(stores[0], model) == decoded(stores[1], model)


def test_a_template_that_takes_arguments_as_text_gets_text(tmp_path: Path, model: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(CALLING.replace("c.function.arguments | tojson", "'' + c.function.arguments"))
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TALK}])
    store = build(tmp_path, path, model, chat_template=str(template))
    assert decoded(store, model)[0][1] == 'weather({"city": "Rome", "days": 2})<|im_end|>no<|im_end|>'


def test_a_template_without_tools_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_tokenizer(tmp_path / "model")
    rows = [{"messages": [USER, ANSWER], "tools": TOOLS}] * 2
    build(tmp_path, write_jsonl(tmp_path / "a.jsonl", list(rows)), model)
    assert caplog.text.count("the chat template does not show the rows' tools to the model") == 1


BAD: list[tuple[RowFormat, dict[str, Any], str]] = [
    (
        "sharegpt",
        {"conversations": [turn("robot", "x")]},
        "unknown role 'robot' in conversations[0]; allowed:",
    ),
    ("sharegpt", {"conversations": [turn("gpt", 3)]}, "conversations[0].value is a number (3), not text"),
    ("sharegpt", {"conversations": [{"from": "gpt"}]}, "conversations[0].content is null, not text"),
    ("sharegpt", {"conversations": [{"value": "x"}]}, "no role in conversations[0]; allowed:"),
    ("sharegpt", {"conversations": "hello"}, "conversations is text, not a list of messages"),
    (
        "sharegpt",
        {"conversations": [turn("function_call", "f(x)")]},
        "conversations[0].value is no JSON of a call",
    ),
    (
        "sharegpt",
        {"conversations": [turn("function_call", "[]")]},
        "conversations[0].value is no JSON of a call",
    ),
    ("sharegpt", {"conversations": [turn("gpt", "x")], "system": 3}, "system is a number (3), not text"),
    (
        "sharegpt",
        {"conversations": [turn("gpt", "x")], "tools": "none"},
        "tools is text, not a list of objects",
    ),
    ("messages", {"messages": [ANSWER], "tools": [3]}, "tools[0] is a number (3), not an object"),
    ("alpaca", {"instruction": "x"}, "no column 'output'; the row has: 'instruction'"),
    ("alpaca", {"instruction": "x", "output": None}, "output is null, not text"),
    ("alpaca", {"instruction": 3, "output": "x"}, "instruction is a number (3), not text"),
    ("alpaca", {"instruction": "x", "output": "y", "history": "z"}, "history is text, not a list of pairs"),
    (
        "alpaca",
        {"instruction": "x", "output": "y", "history": [["z"]]},
        "history[0] is not a pair of a question",
    ),
    (
        "alpaca",
        {"instruction": "x", "output": "y", "history": [["z", 1]]},
        "history[0][1] is a number (1), not",
    ),
]


@pytest.mark.parametrize(("row_format", "row", "reason"), BAD)
def test_bad_rows(row_format: RowFormat, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as failure:
        read_example(row, DataConfig("a.jsonl"), row_format)
    assert failure.value.reason.startswith(reason)


def test_odd_names_of_columns_keys_and_roles(tmp_path: Path) -> None:
    row = {
        "conv": [{"speaker": "customer", "said": "hi"}, {"speaker": "gpt", "said": "yes"}],
        "sys": "you are",
    }
    columns = {"role": "speaker", "content": "said"}
    expected = [message("user", "hi"), message("assistant", "yes")]
    config = DataConfig("a", columns={"messages": "conv", **columns}, roles={"customer": "user"})
    assert resolve_format(config, list(row)) == "messages"
    assert read_example(row, config, "messages") == Chat(expected)
    config = DataConfig(
        "a", columns={"conversations": "conv", "system": "sys", **columns}, roles={"customer": "user"}
    )
    assert resolve_format(config, list(row)) == "sharegpt"
    assert read_example(row, config, "sharegpt") == Chat([SYSTEM, *expected])
    row = {"conversations": [turn("call", json.dumps(CALL)), turn("function_call", "x")]}
    config = DataConfig("a", roles={"call": "function_call", "function_call": "user"})
    assert read_example(row, config, "sharegpt") == Chat([calls(CALL), message("user", "x")])
    row = {"q": "hi", "context": "there", "response": "yes", "past": [["a", "b"]]}
    names = {"instruction": "q", "input": "context", "output": "response", "history": "past"}
    config = DataConfig("a", columns=names)
    assert resolve_format(config, list(row)) == "alpaca"
    chat = read_example(row, config, "alpaca")
    assert isinstance(chat, Chat) and [m["content"] for m in chat.messages] == ["a", "b", "hi\nthere", "yes"]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["messages", "text"], "messages"),
        (["conversations", "text", "system"], "sharegpt"),
        (["instruction", "input", "output", "text"], "alpaca"),
        (["prompt", "completion", "text"], "prompt_completion"),
        (["input_ids", "labels", "messages", "text"], "tokens"),
        (["prompt", "messages"], "messages"),
        (["text", "label"], "text"),
    ],
)
def test_order_of_precedence(columns: list[str], expected: str) -> None:
    assert resolve_format(DataConfig("a"), columns) == expected


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        (["messages", "conversations"], "messages and sharegpt"),
        (["messages", "prompt", "completion", "text"], "messages and prompt_completion"),
        (["instruction", "output", "prompt", "completion"], "alpaca and prompt_completion"),
    ],
)
def test_true_ambiguities_are_refused_by_name(columns: list[str], names: str) -> None:
    with pytest.raises(ConfigError, match=f"data.format: the columns fit {names}; set it to one of them"):
        resolve_format(DataConfig("a"), columns)
    assert resolve_format(DataConfig("a", format="messages"), columns) == "messages"


def test_a_column_that_is_named_decides() -> None:
    columns = ["prompt", "chosen", "rejected", "messages"]
    assert resolve_format(DataConfig("a", columns={"completion": "chosen"}), columns) == "prompt_completion"
    assert resolve_format(DataConfig("a", columns={"messages": "chosen"}), columns) == "messages"
    assert resolve_format(DataConfig("a", format="messages"), columns) == "messages"


@pytest.mark.parametrize(
    "columns",
    [
        ["prompt", "chosen", "rejected"],
        ["conversations", "chosen", "rejected"],
        ["prompt", "completion", "label"],
        ["instruction", "output", "kto_tag"],
    ],
)
def test_preferences_are_refused_by_name(columns: list[str]) -> None:
    with pytest.raises(DataError) as failure:
        resolve_format(DataConfig("a"), columns)
    assert "are preferences, which have no single answer to learn; allowed: the good answers alone" in str(
        failure.value
    )


def test_each_file_has_its_own_format(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [SAME["sharegpt"][0], "{broken"])
    (folder / "b.csv").write_text("instruction,output,id\nhello,four.,x\nhi,\n")
    write_jsonl(folder / "c.json", [{"text": "hello world"}])
    write_jsonl(folder / "d.jsonl", ["{broken"])
    store = build(tmp_path, folder, model, num_workers=2)
    assert store.meta["format"] == "sharegpt and alpaca and text"
    assert [loss for _, loss in decoded(store, model)] == ["four.<|im_end|>"] * 2 + [" world</s>"]
    assert store.ids[:] == ["0", "x", "4"] and store.index.tolist() == [0, 2, 4]
    assert [index for index, _ in store.iter_rejected()] == [1, 3, 5]
    write_jsonl(folder / "e.jsonl", [{"other": 1}])
    with pytest.raises(
        DataError, match=r"fits the columns of the first rows of '.*e\.jsonl'; found: 'other'"
    ):
        build(tmp_path, folder, model)


def test_chats_need_a_template(tmp_path: Path) -> None:
    model = make_tokenizer(tmp_path / "model", template=None)
    for k, row in enumerate((SAME["alpaca"][0], SAME["sharegpt"][0])):
        path = write_jsonl(tmp_path / f"{k}.jsonl", [row])
        with pytest.raises(ConfigError) as failure:
            build(tmp_path, path, model)
        assert str(failure.value) == (
            "data.chat_template: the rows are chats and the tokenizer has no chat template; give a Jinja file"
        )


# Which tokens carry loss, by TRL's two options

BOTH = {
    "prompt": [*EARLIER, USER],
    "completion": [ANSWER, message("user", "so?"), message("assistant", "yes")],
}
ANSWERS = ["two<|im_end|>", "four.<|im_end|>", "yes<|im_end|>"]


@pytest.mark.parametrize("template", [CALLING, GENERATION])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "".join(ANSWERS[1:])),
        ({"completion_only_loss": True}, "".join(ANSWERS[1:])),
        ({"completion_only_loss": False}, "".join(ANSWERS)),
        ({"assistant_only_loss": False}, "four."),
        ({"assistant_only_loss": False, "completion_only_loss": False}, None),
    ],
)
def test_assistant_and_completion_only_loss(
    tmp_path: Path, template: str, options: dict[str, Any], expected: str | None
) -> None:
    model = make_tokenizer(tmp_path / "model", template)
    path = write_jsonl(tmp_path / "a.jsonl", [BOTH])
    text, loss = decoded(build(tmp_path, path, model, **options), model)[0]
    if expected is None:
        # The first token of a row has nothing before it to predict it.
        expected = text.removeprefix("<|im_start|>")
    elif expected == "four.":
        expected = text[text.index("four.") :]
        assert "so?" in expected and "assistant" in expected
    assert loss == expected


def test_a_completion_may_begin_with_another_speaker(tmp_path: Path, model: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": [SYSTEM, ANSWER], "completion": [USER, ANSWER]}])
    assert decoded(build(tmp_path, path, model), model)[0][1] == "four.<|im_end|>"


def test_completion_only_loss_is_refused_where_there_is_no_completion(tmp_path: Path, model: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [USER, ANSWER]}])
    with pytest.raises(ConfigError, match="data.completion_only_loss: True is about rows of a prompt and"):
        build(tmp_path, path, model, completion_only_loss=True)


# Target sets


def test_target_set_is_read_with_the_same_options(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    write_jsonl(tmp_path / "b.jsonl", [{"messages": [USER, ANSWER]}] * 2)
    config = DataConfig(
        str(tmp_path / "a.jsonl"),
        target=str(tmp_path / "b.jsonl"),
        limit=1,
        max_length=64,
        completion_only_loss=True,
        cache_dir=str(tmp_path / "cache"),
    )
    target = target_config(config)
    corpus = Corpus.open(target)
    assert corpus.num_rows == 2 and resolve_formats(target, corpus) == ["messages"]
    assert (target.path, target.target, target.limit, target.max_length) == (config.target, None, None, 64)
    with pytest.raises(ConfigError, match="data.target: unset"):
        target_config(target)


def test_options_of_a_dataset_are_kept_for_a_target_that_is_one(tmp_path: Path) -> None:
    config = DataConfig("org/a", split="train", name="x", revision="v1", target="org/b")
    assert target_config(config).split == "train"
    config = DataConfig("org/a", split="train", name="x", revision="v1", target=str(tmp_path / "b.jsonl"))
    target = target_config(config)
    assert (target.split, target.name, target.revision) == (None, None, None)


def test_faults_of_the_target_set_name_it(tmp_path: Path) -> None:
    config = DataConfig("a.jsonl", target=str(tmp_path / "gone.jsonl"))
    with pytest.raises(ConfigError, match=r"^data\.target: '.*gone\.jsonl' matches no file$"), about_target():
        Corpus.open(target_config(config))
    config = DataConfig(
        "a.jsonl", target=str(write_jsonl(tmp_path / "b.jsonl", [{"x": 1}])), cache_dir=str(tmp_path)
    )
    with pytest.raises(DataError, match=r"^data\.target: data\.format: no format fits"), about_target():
        resolve_formats(target_config(config), Corpus.open(target_config(config)))
