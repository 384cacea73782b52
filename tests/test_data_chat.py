"""Chat templates: which tokens carry loss, and which templates are refused."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import pytest
from data_helpers import (
    CHATML,
    GENERATION,
    INSTRUCT,
    NO_PROMPT,
    NO_SYSTEM,
    REVERSED,
    SHOUTING,
    chat,
    loss_runs,
    make_tokenizer,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from grads_dist.data.chat import ChatEncoder, mask_method
from grads_dist.data.example import Chat
from grads_dist.data.rows import RowError
from grads_dist.errors import ConfigError

CUTTING = CHATML.replace("{{ m.content }}", "{{ m.content[:2] }}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    return {bos: make_tokenizer(tmp_path_factory.mktemp("tokenizer"), bos=bos) for bos in (False, True)}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bos-trimmed"])
def tokenizer(request: pytest.FixtureRequest, folders: dict[bool, Any]) -> Any:
    return AutoTokenizer.from_pretrained(folders[request.param])


def said(tokenizer: Any, template: str, row: dict[str, Any], num_prompt: int = 0) -> list[str]:
    return loss_runs(
        tokenizer, *ChatEncoder(tokenizer, template).encode(Chat(row["messages"], num_prompt), True)
    )


def test_method_follows_the_template() -> None:
    assert mask_method(CHATML) == "prefix"
    assert mask_method(GENERATION) == "generation"
    assert mask_method("{%- generation -%}x{%- endgeneration -%}") == "generation"


@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_assistant_turns_with_their_end_carry_loss(tokenizer: Any, template: str) -> None:
    row = chat("what is two?", "the fox", "hello", " four.\n")
    assert said(tokenizer, template, row) == ["the fox<|im_end|>", " four.\n<|im_end|>"]


def test_whole_text_is_tokenized_once_without_second_bos(tokenizer: Any) -> None:
    ids, _ = ChatEncoder(tokenizer, "<s>" + CHATML).encode(Chat(chat("a", "b")["messages"]), True)
    assert tokenizer.decode(ids.tolist()) == (
        "<s><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    )


def test_mark_that_stops_before_the_end_of_turn_is_extended_to_it(tokenizer: Any) -> None:
    template = GENERATION.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}</s>")
    assert said(tokenizer, template, chat("a", "hello", "b", "")) == ["hello</s>", "</s>"]


@pytest.mark.parametrize(
    ("between", "said_last"),
    [
        ("{% endgeneration %}<|im_end|>", "<|im_end|>"),
        ("{% endgeneration %}{{ '\n' }}<|im_end|>", "\n<|im_end|>"),
        ("\n<|im_end|>\n{% endgeneration %}", "\n<|im_end|>\n"),
        ("{% endgeneration %}", ""),
        ("{% endgeneration %}<s>", ""),
        ("{% endgeneration %} or so <|im_end|>", ""),
    ],
)
def test_end_of_turn_need_not_be_the_eos_token(
    tokenizer: Any, between: str, said_last: str, caplog: pytest.LogCaptureFixture
) -> None:
    template = GENERATION.replace("<|im_end|>{% endgeneration %}", between)
    with caplog.at_level(logging.WARNING, "grads_dist"):
        assert said(tokenizer, template, chat("a", "hello", "b", "four")) == [
            f"hello{said_last}",
            f"four{said_last}",
        ]
    # Once, and only where the answers have no end.
    assert caplog.text.count("has no end token") == (said_last == "")


def test_next_speaker_is_no_end_of_turn(tokenizer: Any) -> None:
    """Each role has a token of its own that opens its turn, and nothing closes one."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}<|im_end|>{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    assert said(tokenizer, template, chat("a", "hello", "b", "four")) == ["hello", "four"]


def test_conversation_may_start_with_the_assistant(tokenizer: Any) -> None:
    template = "{% if messages[0].role == 'system' %}no{% endif %}" + CHATML
    row = {"messages": [{"role": "assistant", "content": "0 hello"}, *chat("a", "b")["messages"]]}
    assert said(tokenizer, template, row) == ["0 hello<|im_end|>", "b<|im_end|>"]


CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}


@pytest.mark.parametrize("template", [CHATML, GENERATION])
@pytest.mark.parametrize("call", [CALL, CALL["function"]], ids=["nested", "flat"])
def test_tool_calls_that_the_template_leaves_out_are_refused(
    tokenizer: Any, template: str, call: dict[str, Any]
) -> None:
    messages = chat("is it get_weather?", "a")["messages"]
    messages[1]["tool_calls"] = [call]
    with pytest.raises(RowError, match=r"leaves out the call of 'get_weather' in messages\[1\]"):
        said(tokenizer, template, {"messages": messages})
    calling = template.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ (c.function or c).name }}{% endfor %}",
    )
    assert said(tokenizer, calling, {"messages": messages}) == ["aget_weather<|im_end|>"]
    messages[1]["tool_calls"] = [{"function": {}}]
    with pytest.raises(RowError, match="a call without a function name"):
        said(tokenizer, template, {"messages": messages})


@pytest.mark.parametrize("line_start", ["", "\n", "  "])
def test_the_date_of_a_template_stands_still(tokenizer: Any, line_start: str) -> None:
    dated = line_start + "{% if true %}{{ strftime_now('%d %b %Y, %-d') }}{% endif %}"
    for rest in (CHATML, GENERATION):
        ids, _ = ChatEncoder(tokenizer, dated + rest).encode(Chat(chat("a", "b")["messages"]), True)
        other = (line_start if line_start == "\n" else "") + "01 Jan 2025, 1"
        plain, _ = ChatEncoder(tokenizer, other + rest).encode(Chat(chat("a", "b")["messages"]), True)
        assert tokenizer.decode(ids.tolist()) == tokenizer.decode(plain.tolist())
    with pytest.raises(ConfigError, match="broken Jinja, line 2"):
        ChatEncoder(tokenizer, "{{ strftime_now('%d') }}\n{% for %}").encode(
            Chat(chat("a", "b")["messages"]), True
        )


def test_a_complaint_of_the_template_is_shortened(tokenizer: Any) -> None:
    template = "{{ raise_exception(messages[0].content) }}"
    with pytest.raises(RowError, match="refuses the row: xxx") as failure:
        said(tokenizer, template, chat("x" * 100_000, "b"))
    assert len(failure.value.reason) < 300


def test_instruct_style_has_no_header(tokenizer: Any) -> None:
    assert said(tokenizer, INSTRUCT, chat("hi", " hello ", "two", "four")) == [" hello </s>", " four </s>"]


def test_header_without_generation_prompt_carries_no_loss(tokenizer: Any) -> None:
    row = chat("hi", "assistant 0", "two", "00", "x", "")
    # The space before an answer belongs to its first token.
    assert said(tokenizer, NO_PROMPT, row) == [" assistant 0</s>", " 00</s>", " </s>"]


def test_turns_without_special_tokens_end_with_their_line_break(tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert said(tokenizer, template, chat("a", "hello", "b", "four")) == ["hello\n\n", "four\n\n"]


def test_messages_of_the_prompt_carry_no_loss(tokenizer: Any) -> None:
    row = chat("a", "one", "b", "two")
    for template in (CHATML, GENERATION):
        assert said(tokenizer, template, row, num_prompt=3) == ["two<|im_end|>"]


def test_everything_carries_loss_when_asked(tokenizer: Any) -> None:
    ids, loss = ChatEncoder(tokenizer, REVERSED).encode(Chat(chat("a", "b")["messages"]), False)
    assert loss.all() and len(ids) == len(loss)


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        (REVERSED, chat("a", "b"), "cannot be located"),
        (SHOUTING, chat("a", "hello"), "changes what messages[1] says"),
        (CUTTING, chat("a", "hello"), "changes what messages[1]"),
        (NO_SYSTEM, {"messages": [{"role": "system", "content": "x"}]}, "no system role"),
        ("{{ messages[0].content + 1 }}", chat("a", "b"), "the chat template refuses the row"),
        ("{{ messages.append(1) }}", chat("a", "b"), "the chat template refuses the row"),
        ("{{ ''.__class__.__mro__ }}", chat("a", "b"), "the chat template refuses the row"),
        # Earlier answers vanish once the talk goes on, as with templates that drop reasoning.
        ("{{ messages[-1].role }}:{{ messages[-1].content }}", chat("a", "b", "c", "d"), "cannot be located"),
    ],
)  # fmt: skip
def test_templates_that_hide_the_turns_are_refused(
    tokenizer: Any, template: str, row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RowError, match="(?s)" + reason.replace("[", r"\[")) as failure:
        ChatEncoder(tokenizer, template).encode(Chat(row["messages"]), True)
    assert failure.value.kind == "chat template"
    assert "\n" not in failure.value.reason


def test_broken_template_is_a_configuration_error(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.chat_template: broken Jinja, line 1"):
        ChatEncoder(tokenizer, "{% for %}").encode(Chat(chat("a", "b")["messages"]), True)


def test_half_a_surrogate_pair_is_a_row_error(tokenizer: Any) -> None:
    with pytest.raises(RowError, match="surrogate"):
        ChatEncoder(tokenizer, CHATML).encode(Chat(chat("a", "\ud800")["messages"]), True)


def test_no_token_crosses_the_start_of_an_answer() -> None:
    # One token joins the header's line break with the first one of the answer.
    vocabulary = {c: k for k, c in enumerate([*pre_tokenizers.ByteLevel.alphabet(), "ĊĊ", "</s>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    joining = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    template = CHATML.replace("<|im_end|>", "</s>").replace("<|im_start|>", "")
    row = chat("a", "\nx")
    ids, _ = ChatEncoder(joining, template).encode(Chat(row["messages"]), False)
    assert vocabulary["ĊĊ"] in ids
    assert said(joining, template, row) == ["\nx</s>"]


ODD = st.sampled_from(
    ["<|im_end|>", "<|im_start|>assistant\n", "</s>", "\0", "🤷🏽‍♀️", "{{ x }}", "\r\n", "e\u0301"]
)
CONTENT = st.lists(
    st.one_of(ODD, st.text(st.characters(exclude_categories=["Cs"]), max_size=8)), max_size=4
).map("".join)


@cache
def shared_tokenizer(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@settings(max_examples=40, deadline=None)
@given(turns=st.lists(CONTENT, min_size=1, max_size=6), bos=st.booleans(), system=st.none() | CONTENT)
@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_loss_is_on_exactly_what_the_assistant_says(
    folders: dict[bool, Any], template: str, turns: list[str], bos: bool, system: str | None
) -> None:
    tokenizer = shared_tokenizer(str(folders[bos]))
    messages = chat(*turns)["messages"]
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    ids, loss = ChatEncoder(tokenizer, template).encode(Chat(messages), True)
    answers = [f"{turn}<|im_end|>" for turn in turns[1::2]]
    assert tokenizer.decode(ids[loss].tolist()) == "".join(answers)
    assert loss_runs(tokenizer, ids, loss) == answers
