"""Odd conversations: whatever the roles and texts, a row is refused with a reason or its mask is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import (
    CALLING,
    CALLING_MARKED,
    CHATML,
    GENERATION,
    INSTRUCT,
    NO_PROMPT,
    build,
    loss_runs,
    make_tokenizer,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from grads_dist.data.chat import ChatEncoder
from grads_dist.data.config import DataConfig
from grads_dist.data.formats import read_example
from grads_dist.data.rows import RowError

ROLES = ["system", "user", "assistant", "tool"]
# In the style of Llama 3: a start token, headers of special tokens, contents trimmed, no line break behind.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}<pad>\n\n{{ m.content | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<pad>\n\n{% endif %}"
)
# In the style of Gemma: strict about who may speak, and the model has another name.
STRICT = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
# No special token ends a turn; the mark ends before the end token.
PLAIN = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SHORT_MARK = GENERATION.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")


def whole(end: str) -> Callable[[str], str]:
    return lambda content: content + end


def trimmed(end: str) -> Callable[[str], str]:
    return lambda content: content.strip() + end


# Template -> what an answer of this content adds to what carries loss.
TEMPLATES: dict[str, tuple[str, Callable[[str], str]]] = {
    "chatml": (CHATML, whole("<|im_end|>")),
    "generation": (GENERATION, whole("<|im_end|>")),
    "short mark": (SHORT_MARK, whole("<|im_end|>")),
    "calling": (CALLING, whole("<|im_end|>")),
    "calling, marked": (CALLING_MARKED, whole("<|im_end|>")),
    "headers": (HEADERS, trimmed("<|im_end|>")),
    "strict": (STRICT, trimmed("<|im_end|>")),
    "instruct": (INSTRUCT, lambda content: f" {content.strip()} </s>"),
    # The space before an answer belongs to its first token.
    "no prompt": (NO_PROMPT, lambda content: f" {content}</s>"),
    "plain": (PLAIN, whole("\n\n")),
}

LOOK_ALIKES = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "</s>",
    "<s>",
    "<pad>",
    "{% generation %}",
    "assistant: ",
    "0",
    "1",
]
UNICODE = [
    "🤷🏽‍♀️",
    "e\u0301",
    "\u202eשלום",
    "ﷺ",
    "\u200b",
    "\ufeff",
    "\0",
    "\x85",
    "\u2028",
    "\r\n",
    "\u00a0",
    "𝕏",
    "\ufffd",
]
SURROGATES = ["\ud83d\ude00", "\ud800", "\udc00"]
PIECES = st.one_of(
    st.sampled_from([*LOOK_ALIKES, *UNICODE, " ", "\n", "hello", "the fox"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)
CONTENT = st.lists(PIECES, max_size=4).map("".join)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": CONTENT})
CHATS = st.lists(MESSAGE, min_size=1, max_size=6)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folders = [make_tokenizer(tmp_path_factory.mktemp("tokenizer"), bos=bos) for bos in (False, True)]
    return [AutoTokenizer.from_pretrained(folder) for folder in folders]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=CHATS, bos=st.booleans())
def test_a_chat_is_refused_or_its_mask_is_what_the_assistant_says(
    tokenizers: list[Any], name: str, messages: list[dict[str, Any]], bos: bool
) -> None:
    tokenizer = tokenizers[bos]
    template, expected = TEMPLATES[name]
    example = read_example({"messages": messages}, DataConfig("a.jsonl"), "messages")
    try:
        ids, loss = ChatEncoder(tokenizer, template).encode(example, True)  # type: ignore[arg-type]
    except RowError as error:
        assert error.reason and "\n" not in error.reason
        assert name in ("strict", "instruct", "no prompt", "plain")
        return
    answers = [expected(message["content"]) for message in messages if message["role"] == "assistant"]
    assert tokenizer.decode(ids[loss].tolist()) == "".join(answers)


@settings(max_examples=60, deadline=None)
@given(
    messages=st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "role": st.sampled_from([*ROLES, "robot", None, 3, [], "function_call"]),
                "from": st.sampled_from(["human", "gpt", "observation", "function_call", {}, None]),
                "content": st.none() | CONTENT | st.sampled_from([*SURROGATES, 1.5, [], {}]),
                "value": st.none() | CONTENT | st.just('{"name": "f", "arguments": {"x": null}}'),
                "tool_calls": st.sampled_from(
                    [
                        None,
                        [],
                        [{}],
                        "f",
                        [3],
                        [{"function": {"name": "f"}}],
                        [{"name": "f", "arguments": "{"}],
                    ]
                ),
                "name": st.none() | st.text(max_size=3),
            },
        )
        | st.sampled_from([None, 3, "hello", []]),
        max_size=4,
    ),
    tools=st.sampled_from([None, "", [], "[", '[{"name": "f"}]', {"name": "f"}, [3], 3]),
    name=st.sampled_from(sorted(TEMPLATES)),
)
def test_malformed_chats_never_crash(
    tokenizers: list[Any], messages: list[Any], tools: Any, name: str
) -> None:
    encoder = ChatEncoder(tokenizers[0], TEMPLATES[name][0])
    for row_format, column in (("messages", "messages"), ("sharegpt", "conversations")):
        row = {column: messages, "tools": tools, "system": "be kind"}
        try:
            example = read_example(row, DataConfig("a.jsonl"), row_format)  # type: ignore[arg-type]
            ids, loss = encoder.encode(example, True)  # type: ignore[arg-type]
        except RowError as error:
            assert error.reason and "\n" not in error.reason and len(error.reason) < 500
        else:
            assert len(ids) == len(loss)


@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_surrogates_in_a_file(tmp_path: Path, template: str) -> None:
    model = make_tokenizer(tmp_path / "model", template)
    contents = ["\\ud83d\\ude00", "a\\ud800b", "\\ude00\\ud83d", "ok"]
    lines = [f'{{"messages": [{{"role": "assistant", "content": "{text}"}}]}}\n' for text in contents]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    (tmp_path / "b.json").write_text(f"[{','.join(lines)}]")
    store = build(tmp_path, [str(tmp_path / "a.jsonl"), str(tmp_path / "b.json")], model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    said = [loss_runs(tokenizer, store.tokens(i), store.loss_mask(i)) for i in range(store.num_rows)]
    assert said == [["😀<|im_end|>"], ["ok<|im_end|>"]] * 2
    assert [index for index, _ in store.iter_rejected()] == [1, 2, 5, 6]
    assert all(reason.startswith("half a surrogate pair") for _, reason in store.iter_rejected())
    assert np.all(store.num_label_tokens >= 1) and json.loads(lines[0])["messages"][0]["content"] == "😀"
