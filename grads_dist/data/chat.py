"""Conversations to text by a chat template, and which characters of it the assistant says.

Two ways, chosen by the template: the spans it marks itself with `{% generation %}`, or growing prefixes: a
turn is what the text gains by it, and every prefix must be found again at the start of the whole.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal

import numpy as np

from grads_dist.data.calls import CallForm, check_tool_calls
from grads_dist.data.config import ROLES
from grads_dist.data.example import Chat
from grads_dist.data.rows import RowError
from grads_dist.data.spans import Spans, tokenize_spans
from grads_dist.data.template import ChatTemplate, Messages, Span
from grads_dist.data.tokenizer import special_ids
from grads_dist.data.turns import Render, Turn, check_prefix, check_said, check_trained, prefix_turns

logger = logging.getLogger(__name__)

Method = Literal["generation", "prefix"]

_NO_END = "a turn under the chat template has no end token: the model would not learn to stop"
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
        self._calls = CallForm(self._template)
        self._shows_tools = re.search(r"\btools\b", template) is not None
        self._has_warned: set[str] = set()
        self._special = np.array(sorted(special_ids(tokenizer)), dtype=np.int64)
        self._special_texts = tuple(tokenizer.convert_ids_to_tokens(self._special.tolist()))

    def encode(
        self, chat: Chat, assistant_only: bool, completion_only: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64[T] and bool[T], the tokens that carry loss: assistant turns with their end, or all.

        completion_only: of these, only what comes after the messages of the prompt. Raises RowError when the
        template refuses the conversation or hides where the turns are.
        """
        chat = replace(chat, messages=self._calls.shape(chat.messages))
        if chat.tools and not self._shows_tools:
            self._warn_once("the chat template does not show the rows' tools to the model")
        render = partial(self._template.render, tools=chat.tools)
        check_tool_calls(render, chat.messages)
        num_prompt = chat.num_prompt if completion_only else 0
        check_trained(chat.messages, num_prompt)
        if not assistant_only:
            text = render(chat.messages)
            start = len(_prompt(render, text, chat.messages, num_prompt))
            spans = tokenize_spans(self._tokenizer, text, [start] if start else [])
            if not start:
                return spans.ids, np.ones(len(spans.ids), dtype=bool)
            return spans.ids, spans.within(start, len(text), self._special)
        if self.method == "generation":
            text, turns = self._generation_turns(render, chat, num_prompt)
        else:
            text = render(chat.messages)
            turns = prefix_turns(render, text, chat.messages, num_prompt, self._special_texts)
        spans = tokenize_spans(
            self._tokenizer, text, (cut for turn in turns for cut in (turn.start, turn.end))
        )
        loss = np.zeros(len(spans.ids), dtype=bool)
        openings = cache(partial(self._openings, render, chat.messages))
        for turn in turns:
            loss |= self._turn_tokens(spans, text, turn, openings)
        return spans.ids, loss

    def _turn_tokens(
        self, spans: Spans, text: str, turn: Turn, openings: Callable[[], set[int]]
    ) -> np.ndarray:
        inside = spans.within(turn.start, turn.end, self._special)
        marked = np.flatnonzero(inside)
        if self.method == "generation":
            if turn.text_end == turn.end:
                # The mark closes before the end-of-turn token, which the model has to learn to say.
                after = int(marked[-1]) + 1 if len(marked) else int(np.searchsorted(spans.starts, turn.start))
                inside[after : self._turn_end(spans, text, after, openings)] = True
            return inside
        behind = marked[spans.starts[marked] >= turn.text_end]
        special = behind[np.isin(spans.ids[behind], self._special)]
        if len(special) and not text[spans.ends[special[-1]] : turn.end].strip():
            # The line break that templates put after the end of a turn is theirs: nobody learns to say it.
            inside[special[-1] + 1 :] = False
        if turn.text_end == turn.end:
            self._warn_once(_NO_END)
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
        self._warn_once(_NO_END)
        return after

    def _warn_once(self, message: str) -> None:
        if message not in self._has_warned:
            self._has_warned.add(message)
            logger.warning(message)

    def _openings(self, render: Render, messages: Messages) -> set[int]:
        """The tokens that a next turn begins with, whoever speaks."""
        text = render(messages)
        header = (messages, True)
        turns = [([*messages, {"role": role, "content": "0"}], False) for role in ROLES]
        openings = {self._tokenizer.bos_token_id}
        for longer, add_generation_prompt in (header, *turns):
            try:
                added = render(longer, add_generation_prompt)
            except RowError:
                continue  # What may not follow here opens nothing.
            if added.startswith(text) and (opening := added[len(text) :].lstrip()):
                openings.update(tokenize_spans(self._tokenizer, opening, ()).ids[:1].tolist())
        return openings

    def _generation_turns(self, render: Render, chat: Chat, num_prompt: int) -> tuple[str, list[Turn]]:
        text, marks = self._template.render_marked(chat.messages, chat.tools)
        check_said(chat.messages, "".join(text[start:end] for start, end in marks))
        first = len(_prompt(render, text, chat.messages, num_prompt))
        turns = [
            Turn(start, end, start if is_closed else end)
            for (start, end), is_closed in zip(marks, self._are_closed(chat, text, marks), strict=True)
        ]
        return text, [turn for turn in turns if turn.start >= first]

    def _are_closed(self, chat: Chat, text: str, marks: list[Span]) -> list[bool]:
        """Whether each mark takes in a special token at the end of its turn."""
        if any(
            message.get("content", "").rstrip().endswith(self._special_texts) for message in chat.messages
        ):
            # An answer that ends with one itself would pass for closed: shorter ones show the template's own.
            plain = [{**message, "content": "0"} for message in chat.messages]
            with contextlib.suppress(RowError):
                plain_text, plain_marks = self._template.render_marked(plain, chat.tools)
                if len(plain_marks) == len(marks):
                    text, marks = plain_text, plain_marks
        return [text[start:end].rstrip().endswith(self._special_texts) for start, end in marks]


def _prompt(render: Render, text: str, messages: Messages, num_prompt: int) -> str:
    """What `text` says before the completion, with the header of the answer if it begins with one."""
    if not num_prompt:
        return ""
    prompt = render(messages[:num_prompt], messages[num_prompt]["role"] == "assistant")
    check_prefix(text, prompt, num_prompt)
    return prompt
