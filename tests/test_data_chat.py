"""Chat templates: which tokens carry loss, and which templates are refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
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
    make_tokenizer,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from grads_dist.data.chat import ChatEncoder, mask_method
from grads_dist.data.formats import Chat
from grads_dist.data.rows import RowError
from grads_dist.errors import ConfigError

# Like templates of reasoning models: only the last answer is shown with its reasoning.
REASONING = CHATML.replace(
    "{{ m.content }}",
    "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}",
)
CUTTING = CHATML.replace("{{ m.content }}", "{{ m.content[:2] }}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    return {bos: make_tokenizer(tmp_path_factory.mktemp("tokenizer"), bos=bos) for bos in (False, True)}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bos-trimmed"])
def tokenizer(request: pytest.FixtureRequest, folders: dict[bool, Any]) -> Any:
    return AutoTokenizer.from_pretrained(folders[request.param])


def loss_runs(tokenizer: Any, ids: np.ndarray, loss: np.ndarray) -> list[str]:
    """The decoded runs of tokens that carry loss."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], loss, [False]]).astype(int)))
    return [tokenizer.decode(ids[a:b].tolist()) for a, b in zip(edges[::2], edges[1::2], strict=True)]


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
        (REASONING, chat("a", "b", "c", "d"), "messages[1] cannot be located"),
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
