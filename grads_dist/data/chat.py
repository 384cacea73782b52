"""Conversations to text by a chat template, and which characters of it the assistant says.

Two ways, chosen by the template: the spans it marks itself with `{% generation %}`, or growing prefixes: a
turn is what the text gains by it, and every prefix must be found again at the start of the whole.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import numpy as np

from grads_dist.data.formats import ROLES, Chat
from grads_dist.data.rows import RowError, kind_of_value, shorten
from grads_dist.data.spans import Spans, tokenize_spans
from grads_dist.data.template import ChatTemplate, Messages, Span
from grads_dist.data.tokenizer import special_ids

logger = logging.getLogger(__name__)

Method = Literal["generation", "prefix"]

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def mask_method(template: str) -> Method:
    """How the assistant's tokens are found under this template."""
    return "generation" if _GENERATION_TAG.search(template) else "prefix"


class ChatEncoder:
    """Turns conversations into tokens and marks those the assistant says."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.method = mask_method(template)
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, template)
        self._has_warned = False
        self._special = np.array(sorted(special_ids(tokenizer)), dtype=np.int64)

    def encode(self, chat: Chat, assistant_only: bool) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64[T] and bool[T], the tokens that carry loss: assistant turns with their end, or all.

        Raises RowError when the template refuses the conversation or hides where the turns are.
        """
        self._check_tool_calls(chat.messages)
        if not assistant_only:
            text = self._template.render(chat.messages)
            ids = tokenize_spans(self._tokenizer, text, ()).ids
            return ids, np.ones(len(ids), dtype=bool)
        find_turns = self._generation_turns if self.method == "generation" else self._prefix_turns
        text, turns = find_turns(chat)
        spans = tokenize_spans(self._tokenizer, text, (cut for turn in turns for cut in turn))
        loss = np.zeros(len(spans.ids), dtype=bool)
        openings = cache(partial(self._openings, chat.messages))
        for turn in turns:
            loss |= self._turn_tokens(spans, text, turn, openings)
        return spans.ids, loss

    def _turn_tokens(
        self, spans: Spans, text: str, turn: Span, openings: Callable[[], set[int]]
    ) -> np.ndarray:
        inside = spans.within(*turn)
        marked = np.flatnonzero(inside)
        if self.method == "generation":
            after = int(marked[-1]) + 1 if len(marked) else int(np.searchsorted(spans.starts, turn[0]))
            said = [k for k in marked if text[spans.starts[k] : spans.ends[k]].strip()]
            if not said or spans.ids[said[-1]] not in self._special:
                # The mark closes before the end-of-turn token, which the model has to learn to say.
                inside[after : self._turn_end(spans, text, after, openings)] = True
            return inside
        special = marked[np.isin(spans.ids[marked], self._special)]
        if len(special) and not text[spans.ends[special[-1]] : turn[1]].strip():
            # The line break that templates put after the end of a turn is theirs: nobody learns to say it.
            inside[special[-1] + 1 :] = False
        return inside

    def _turn_end(self, spans: Spans, text: str, after: int, openings: Callable[[], set[int]]) -> int:
        """Behind the end-of-turn token at `after`, or behind white space there; `after` if there is none."""
        is_space = after < len(spans.ids) and not text[spans.starts[after] : spans.ends[after]].strip()
        end = after + int(is_space and spans.ids[after] not in self._special)
        if end < len(spans.ids):
            token = int(spans.ids[end])
            if token == self._tokenizer.eos_token_id:
                return end + 1
            if token in self._special and token not in openings():
                return end + 1
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "a turn marked by the chat template has no end token: the model would not learn to stop"
            )
        return after

    def _openings(self, messages: Messages) -> set[int]:
        """The tokens that a next turn begins with, whoever speaks."""
        text = self._template.render(messages)
        header = (messages, True)
        turns = [([*messages, {"role": role, "content": "0"}], False) for role in ROLES]
        openings = {self._tokenizer.bos_token_id}
        for longer, add_generation_prompt in (header, *turns):
            try:
                added = self._template.render(longer, add_generation_prompt)
            except RowError:
                continue  # What may not follow here opens nothing.
            if added.startswith(text) and (opening := added[len(text) :].lstrip()):
                openings.update(tokenize_spans(self._tokenizer, opening, ()).ids[:1].tolist())
        return openings

    def _check_tool_calls(self, messages: Messages) -> None:
        for k, message in enumerate(messages):
            names = _called(message, k)
            if not names:
                continue
            before = self._template.render(messages[:k]) if k else ""
            after = self._template.render(messages[: k + 1])
            turn = after[_common_prefix(before, after) :]
            for name in names:
                if name not in turn:
                    raise RowError(
                        "chat template",
                        f"the chat template leaves out the call of {shorten(repr(name))} in messages[{k}]; "
                        "allowed: one that renders tool_calls (data.chat_template)",
                    )

    def _generation_turns(self, chat: Chat) -> tuple[str, list[Span]]:
        text, marks = self._template.render_marked(chat.messages)
        if chat.num_prompt:
            prompt = self._template.render(chat.messages[: chat.num_prompt], add_generation_prompt=True)
            _check_prefix(text, prompt, chat.num_prompt)
            marks = [mark for mark in marks if mark[0] >= len(prompt)]
        return text, marks

    def _prefix_turns(self, chat: Chat) -> tuple[str, list[Span]]:
        text = self._template.render(chat.messages)
        turns = []
        for k, message in enumerate(chat.messages):
            if k < chat.num_prompt or message["role"] != "assistant":
                continue
            after = text if k + 1 == len(chat.messages) else self._template.render(chat.messages[: k + 1])
            _check_prefix(text, after, k)
            start = self._turn_start(chat.messages, k, after)
            if _squeeze(message.get("content", "")) not in _squeeze(after[start:]):
                raise RowError("chat template", f"the chat template changes what messages[{k}] says")
            turns.append((start, len(after)))
        return text, turns

    def _turn_start(self, messages: Messages, k: int, after: str) -> int:
        """Where message k begins in `after`, the text up to its end, behind the header of its turn."""
        # Templates may look at the first message, so nothing is rendered where nothing precedes.
        before = self._template.render(messages[:k], add_generation_prompt=True) if k else ""
        _check_prefix(after, before, k)
        if k and before != self._template.render(messages[:k]):
            return len(before)
        # The template has no header to prompt with: it is what the turn of another answer begins with, too.
        content = messages[k].get("content", "")
        other = {"role": "assistant", "content": "1" if content.lstrip().startswith("0") else "0"}
        common = _common_prefix(after, self._template.render([*messages[:k], other]))
        if common < len(before):
            raise RowError("chat template", f"the text before messages[{k}] depends on what it says")
        # The space before the first word belongs to that word's token.
        return len(before) + len(after[len(before) : common].rstrip(" "))


def _check_prefix(text: str, prefix: str, k: int) -> None:
    if not text.startswith(prefix):
        raise RowError(
            "chat template",
            f"the turn messages[{k}] cannot be located: the chat template renders what comes before it "
            "differently once it is there; allowed: a template whose text only grows, or one with "
            "{% generation %} marks (data.chat_template)",
        )


def _called(message: dict[str, Any], k: int) -> list[str]:
    """The names of the functions that a message calls."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise RowError("wrong type", f"messages[{k}].tool_calls is {kind_of_value(calls)}, not a list")
    names = []
    for call in calls:
        function = call.get("function") or call if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise RowError("wrong type", f"messages[{k}].tool_calls has a call without a function name")
        names.append(name)
    return names


def _squeeze(text: str) -> str:
    """`text` without white space, which templates may trim."""
    return "".join(text.split())


def _common_prefix(first: str, second: str) -> int:
    for k, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return k
    return min(len(first), len(second))
