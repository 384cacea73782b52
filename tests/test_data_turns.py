"""Templates that look at where a turn stands, and markers that swallow white space: the mask stays right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_helpers import CHATML, build, chat, loss_runs, make_tokenizer, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from grads_dist.data.chat import ChatEncoder
from grads_dist.data.example import Chat
from grads_dist.data.rows import RowError

THOUGHT = "<think>\n\n</think>\n\n"
# In the style of Qwen 3: the last answer has a thought in front, maybe an empty one; others none.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set said = m.content or '' %}"
    "{% if m.role == 'assistant' %}{% set said = said.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{% endif %}{{ said }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# In the style of Phi 3: the end of the document stands behind the last turn.
ENDED = CHATML + "{% if not add_generation_prompt %}</s>{% endif %}"
# In the style of DeepSeek R1: the model is made to think, while the answers in the text have no thought.
PROMPTED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# The same end of turn, in every style.
STYLES = {"thinking": (THINKING, THOUGHT, ""), "ended": (ENDED, "", "\n</s>"), "prompted": (PROMPTED, "", "")}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def said(tokenizer: Any, template: str, messages: list[dict[str, Any]]) -> list[str]:
    return loss_runs(tokenizer, *ChatEncoder(tokenizer, template).encode(Chat(messages), True))


@pytest.mark.parametrize("name", STYLES)
def test_turns_that_change_when_the_talk_goes_on_are_located(tokenizer: Any, name: str) -> None:
    template, before, behind = STYLES[name]
    messages = chat("a", "the fox", "b", "t", "c", " four")["messages"]
    answers = ["the fox<|im_end|>", "t<|im_end|>", f"{before} four<|im_end|>{behind}"]
    assert said(tokenizer, template, messages) == answers
    assert said(tokenizer, template, messages[:-1]) == answers[:2]
    system = {"role": "system", "content": "t"}
    assert said(tokenizer, template, [system, *messages]) == answers


def test_calls_inside_a_talk_are_located(tokenizer: Any) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    messages = [
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "tool_calls": [call, call]},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "no"},
    ]
    written = '<call>weather{"city": "Rome"}</call>' * 2
    assert said(tokenizer, THINKING, messages) == [f"{written}<|im_end|>", f"{THOUGHT}no<|im_end|>"]


def test_thoughts_that_the_template_drops_cost_the_row_only_where_they_are_text(tokenizer: Any) -> None:
    messages = chat("a", "<think>\nwell\n</think>\n\nhello", "b", "four")["messages"]
    with pytest.raises(RowError, match=r"changes what messages\[1\] says"):
        said(tokenizer, THINKING, messages)
    messages[1] = {"role": "assistant", "content": "hello", "reasoning_content": "well"}
    assert said(tokenizer, THINKING, messages) == ["hello<|im_end|>", f"{THOUGHT}four<|im_end|>"]


def test_an_end_that_depends_on_the_place_is_refused(tokenizer: Any) -> None:
    """In the style of gpt-oss: nothing tells which token the turn inside of the talk ends with."""
    template = CHATML.replace(
        "{{ m.content }}<|im_end|>",
        "{{ m.content }}{% if loop.last and m.role == 'assistant' %}</s>{% else %}<|im_end|>{% endif %}",
    )
    assert said(tokenizer, template, chat("a", "hello")["messages"]) == ["hello</s>"]
    with pytest.raises(RowError, match=r"messages\[1\] cannot be located"):
        said(tokenizer, template, chat("a", "hello", "b", "four")["messages"])


TEXTS = st.lists(
    st.sampled_from(
        [
            "",
            " ",
            "\n",
            "<think>",
            "t",
            "hello",
            "<|im_end|>",
            "</s>",
            "<|im_start|>assistant\n",
            "0",
        ]
    ),
    max_size=3,
).map("".join)


@pytest.mark.parametrize("name", STYLES)
@settings(max_examples=50, deadline=None)
@given(
    messages=st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXTS}),
        min_size=1,
        max_size=6,
    )
)
def test_a_turn_is_refused_or_located(tokenizer: Any, name: str, messages: list[dict[str, Any]]) -> None:
    template, before, behind = STYLES[name]
    try:
        ids, loss = ChatEncoder(tokenizer, template).encode(Chat(messages), True)
    except RowError:
        return
    answers = [f"{message['content']}<|im_end|>" for message in messages if message["role"] == "assistant"]
    if name == "thinking":
        answers = [answer.lstrip("\n") for answer in answers]
    if len(messages) == 1 and name == "thinking":
        before = ""  # Nothing tells the thought from the header where nothing comes before it.
    if messages[-1]["role"] == "assistant":
        answers[-1] = f"{before}{answers[-1]}{behind}"
    assert tokenizer.decode(ids[loss].tolist()) == "".join(answers)


@pytest.fixture(scope="module")
def swallowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose turn markers swallow the white space behind them, like those of Phi 3."""
    folder = make_tokenizer(tmp_path_factory.mktemp("swallowing"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|answer|>", rstrip=True)]})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("marks", [False, True])
def test_a_header_that_swallows_the_start_of_an_answer_carries_no_loss(swallowing: Path, marks: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(swallowing)
    opening, closing = ("{% generation %}", "{% endgeneration %}") if marks else ("", "")
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|im_end|>{% else %}<|answer|>\n"
        f"{opening}{{{{ m.content }}}}<|im_end|>{closing}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|answer|>\n{% endif %}"
    )
    assert tokenizer.tokenize("<|answer|>\n  hello")[0] == "<|answer|>\n  "
    messages = chat("a", "  hello", "b", "\n")["messages"]
    assert said(tokenizer, template, messages) == ["hello<|im_end|>", "<|im_end|>"]
    asked = Chat(messages, num_prompt=1)
    ids, loss = ChatEncoder(tokenizer, template).encode(asked, False)
    assert loss_runs(tokenizer, ids, loss) == ["hello<|im_end|>b<|im_end|><|answer|><|im_end|>"]


def test_a_prompt_that_swallows_the_start_of_a_completion_carries_no_loss(
    tmp_path: Path, swallowing: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a<|answer|>", "completion": " hello"}])
    store = build(tmp_path, path, swallowing)
    tokenizer = AutoTokenizer.from_pretrained(swallowing)
    assert loss_runs(tokenizer, store.tokens(0), store.loss_mask(0)) == ["hello</s>"]


def test_marks_around_nothing_that_was_said_are_refused(tokenizer: Any) -> None:
    """As of templates for pictures, which take content as a list of parts."""
    template = CHATML.replace(
        "{{ m.content }}<|im_end|>",
        "{% generation %}{% for part in m.content if part.text is defined %}{{ part.text }}{% endfor %}"
        "<|im_end|>{% endgeneration %}",
    )
    with pytest.raises(RowError, match=r"the chat template changes what messages\[1\] says"):
        said(tokenizer, template, chat("a", "hello")["messages"])


def test_turns_without_an_end_are_warned_about(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """In the style of GLM 4: the header of the next turn is what ends an answer."""
    template = CHATML.replace("<|im_end|>\n", "")
    with caplog.at_level("WARNING", "grads_dist"):
        assert said(tokenizer, template, chat("a", "hello", "b", "four")["messages"]) == ["hello", "four"]
    assert caplog.text.count("has no end token") == 1


def test_calls_beside_a_content_that_has_to_be_there(tokenizer: Any) -> None:
    """In the style of DeepSeek V3."""
    template = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content + '' }}{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}"
        "{% endfor %}",
    )
    messages = chat("a", "")["messages"]
    messages[1]["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert said(tokenizer, template, messages) == ['f{"x": 1}<|im_end|>']


@pytest.mark.parametrize("key", ["weight", "train"])
def test_answers_that_shall_carry_no_loss_are_refused(tokenizer: Any, key: str) -> None:
    messages = chat("a", "hello", "b", "four")["messages"]
    for message, value in zip(messages, [0, 1, False, True], strict=True):
        message[key] = value
    assert said(tokenizer, CHATML, messages) == ["hello<|im_end|>", "four<|im_end|>"]
    messages[1][key] = 0
    with pytest.raises(RowError, match=rf"messages\[1\].{key} is 0: loss on single turns is not supported"):
        said(tokenizer, CHATML, messages)
    ids, loss = ChatEncoder(tokenizer, CHATML).encode(Chat(messages, num_prompt=3), True)
    assert loss_runs(tokenizer, ids, loss) == ["four<|im_end|>"]
