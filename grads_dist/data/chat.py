"""Conversations to text by a chat template, and which characters of it the assistant says.

Two ways, chosen by the template: the spans it marks itself with `{% generation %}`, or growing prefixes: a
turn is what the text gains by it, and every prefix must be found again at the start of the whole.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import jinja2
import numpy as np

from grads_dist.data.formats import Chat
from grads_dist.data.rows import RowError
from grads_dist.data.spans import Spans, tokenize_spans
from grads_dist.data.tokenizer import special_ids
from grads_dist.errors import ConfigError

Method = Literal["generation", "prefix"]
Span = tuple[int, int]
Messages = list[dict[str, Any]]

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# What an expression of a template can raise on a row that it was not made for.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip


def mask_method(template: str) -> Method:
    """How the assistant's tokens are found under this template."""
    return "generation" if _GENERATION_TAG.search(template) else "prefix"


class ChatEncoder:
    """Turns conversations into tokens and marks those the assistant says."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.method = mask_method(template)
        self._tokenizer = tokenizer
        self._template = template
        self._special = np.array(sorted(special_ids(tokenizer)), dtype=np.int64)

    def encode(self, chat: Chat, assistant_only: bool) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64[T] and bool[T], the tokens that carry loss: assistant turns with their end, or all.

        Raises RowError when the template refuses the conversation or hides where the turns are.
        """
        if not assistant_only:
            text, _ = self._render(chat.messages)
            ids = tokenize_spans(self._tokenizer, text, ()).ids
            return ids, np.ones(len(ids), dtype=bool)
        find_turns = self._generation_turns if self.method == "generation" else self._prefix_turns
        text, turns = find_turns(chat)
        spans = tokenize_spans(self._tokenizer, text, (cut for turn in turns for cut in turn))
        loss = np.zeros(len(spans.ids), dtype=bool)
        for turn in turns:
            loss |= self._turn_tokens(spans, text, turn)
        return spans.ids, loss

    def _turn_tokens(self, spans: Spans, text: str, turn: Span) -> np.ndarray:
        inside = spans.within(*turn)
        marked = np.flatnonzero(inside)
        if self.method == "generation":
            # A template may close its mark before the end-of-turn token, which the model has to learn to say.
            after = marked[-1] + 1 if len(marked) else int(np.searchsorted(spans.starts, turn[0]))
            ended = len(marked) and spans.ids[marked[-1]] in self._special
            if not ended and after < len(spans.ids) and spans.ids[after] == self._tokenizer.eos_token_id:
                inside[after] = True
            return inside
        special = marked[np.isin(spans.ids[marked], self._special)]
        if len(special) and not text[spans.ends[special[-1]] : turn[1]].strip():
            # The line break that templates put after the end of a turn is theirs: nobody learns to say it.
            inside[special[-1] + 1 :] = False
        return inside

    def _generation_turns(self, chat: Chat) -> tuple[str, list[Span]]:
        text, marks = self._render(chat.messages, track=True)
        if chat.num_prompt:
            prompt, _ = self._render(chat.messages[: chat.num_prompt], add_generation_prompt=True)
            _check_prefix(text, prompt, chat.num_prompt)
            marks = [mark for mark in marks if mark[0] >= len(prompt)]
        return text, marks

    def _prefix_turns(self, chat: Chat) -> tuple[str, list[Span]]:
        text, _ = self._render(chat.messages)
        turns = []
        for k, message in enumerate(chat.messages):
            if k < chat.num_prompt or message["role"] != "assistant":
                continue
            after = text if k + 1 == len(chat.messages) else self._render(chat.messages[: k + 1])[0]
            _check_prefix(text, after, k)
            start = self._turn_start(chat.messages, k, after)
            if _squeeze(message.get("content", "")) not in _squeeze(after[start:]):
                raise RowError("chat template", f"the chat template changes what messages[{k}] says")
            turns.append((start, len(after)))
        return text, turns

    def _turn_start(self, messages: Messages, k: int, after: str) -> int:
        """Where message k begins in `after`, the text up to its end, behind the header of its turn."""
        before, _ = self._render(messages[:k], add_generation_prompt=True)
        _check_prefix(after, before, k)
        if before != self._render(messages[:k])[0]:
            return len(before)
        # The template has no header to prompt with: it is what the turn of another answer begins with, too.
        content = messages[k].get("content", "")
        other = {"role": "assistant", "content": "1" if content.lstrip().startswith("0") else "0"}
        common = _common_prefix(after, self._render([*messages[:k], other])[0])
        if common < len(before):
            raise RowError("chat template", f"the text before messages[{k}] depends on what it says")
        # The space before the first word belongs to that word's token.
        return len(before) + len(after[len(before) : common].rstrip(" "))

    def _render(
        self, messages: Messages, add_generation_prompt: bool = False, track: bool = False
    ) -> tuple[str, list[Span]]:
        """The text, and the spans marked by `{% generation %}` if `track` is set.

        transformers' own function under `apply_chat_template`: same sandbox, but it gives the spans as
        characters and renders the empty conversation.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, marks = render_jinja_template(
                [messages],
                chat_template=self._template,
                return_assistant_tokens_mask=track,
                add_generation_prompt=add_generation_prompt,
                **self._tokenizer.special_tokens_map,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"data.chat_template: broken Jinja, line {error.lineno}: {error.message}"
            ) from error
        except _TEMPLATE_ERRORS as error:
            raise RowError("chat template", f"the chat template refuses the row: {error}") from error
        return texts[0], marks[0] if track else []


def _check_prefix(text: str, prefix: str, k: int) -> None:
    if not text.startswith(prefix):
        raise RowError(
            "chat template",
            f"the turn messages[{k}] cannot be located: the chat template renders what comes before it "
            "differently once it is there; allowed: a template whose text only grows, or one with "
            "{% generation %} marks (data.chat_template)",
        )


def _squeeze(text: str) -> str:
    """`text` without white space, which templates may trim."""
    return "".join(text.split())


def _common_prefix(first: str, second: str) -> int:
    for k, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return k
    return min(len(first), len(second))
