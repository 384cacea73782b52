"""Rendering conversations by a chat template, the same way on every day."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any

import jinja2

from grads_dist.data.rows import RowError, shorten
from grads_dist.errors import ConfigError

Span = tuple[int, int]
Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]]

TODAY = datetime(2025, 1, 1)
"""What `strftime_now` of a template tells: the tokens of a row must not depend on the day."""

_DIRECTIVES = "aAbBcdHIjmMpSUwWxXyYZ"
_MOST_QUOTED = 200
# What an expression of a template can raise on a row that it was not made for.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError,
    MemoryError,
)  # fmt: skip
LONGEST_RENDERING = 60.0
"""Seconds of computing that one rendering may take: far more than any conversation needs."""
LONGEST_TEXT = 1 << 24
"""Characters of a conversation: several times what the longest contexts hold."""


class ChatTemplate:
    """A tokenizer's special tokens in a Jinja template.

    Rendered by transformers' own function under `apply_chat_template`: same sandbox, but it gives the marked
    spans as characters.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._tokenizer = tokenizer
        self._head = _FIXED_DATE if "strftime_now" in template else ""
        self._template = self._head + template

    def render(
        self, messages: Messages, add_generation_prompt: bool = False, tools: Tools | None = None
    ) -> str:
        """The conversation as text, with the header that prompts an answer if asked.

        Raises RowError when the template refuses the conversation, ConfigError when it is no Jinja or has no
        end.
        """
        return self._render(messages, add_generation_prompt, tools, False)[0]

    def render_marked(self, messages: Messages, tools: Tools | None = None) -> tuple[str, list[Span]]:
        """The text and its spans marked by `{% generation %}`, in characters. Raises what `render` raises."""
        return self._render(messages, False, tools, True)

    def _render(
        self, messages: Messages, add_generation_prompt: bool, tools: Tools | None, is_marked: bool
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with _time_limit(LONGEST_RENDERING):
                texts, marks = render_jinja_template(
                    [messages],
                    tools=tools,
                    chat_template=self._template,
                    return_assistant_tokens_mask=is_marked,
                    add_generation_prompt=add_generation_prompt,
                    **self._tokenizer.special_tokens_map,
                )
        except jinja2.TemplateSyntaxError as error:
            line = error.lineno - self._head.count("\n")
            raise ConfigError(f"data.chat_template: broken Jinja, line {line}: {error.message}") from error
        except SyntaxError as error:
            # Of the Python that Jinja makes of the template.
            raise ConfigError(f"data.chat_template: broken Jinja: {error.msg}") from error
        except _EndlessError as error:
            raise ConfigError(
                f"data.chat_template: rendering a conversation takes more than {LONGEST_RENDERING:g} s; "
                "allowed: a template that ends (a file), in place of the model's own"
            ) from error
        except _TEMPLATE_ERRORS as error:
            fault = shorten(str(error) or type(error).__name__, _MOST_QUOTED)
            raise RowError("chat template", f"the chat template refuses the row: {fault}") from error
        if len(texts[0]) > LONGEST_TEXT:
            raise RowError(
                "chat template",
                f"the chat template makes {len(texts[0])} characters of the row; allowed: {LONGEST_TEXT}",
            )
        return texts[0], marks[0] if is_marked else []


class _EndlessError(BaseException):
    """A rendering took too long. No Exception: nothing inside a template's machinery may catch it."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _EndlessError inside the block once it has computed for `seconds`.

    By a signal, which Python delivers between two steps, and to the main thread alone: elsewhere there is no
    limit, and a single step, such as a power of huge numbers, is not interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise _EndlessError

    before = signal.signal(signal.SIGVTALRM, end)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _fixed_date() -> str:
    """A definition of `strftime_now` at `TODAY`, on a line of its own, which leaves no trace in the text.

    A macro, because transformers passes no functions through to the template.
    """
    replaced = {}
    for name in _DIRECTIVES:
        value = TODAY.strftime(f"%{name}")
        replaced[f"%{name}"] = value
        replaced[f"%-{name}"] = value.lstrip("0") or "0"
    chain = "".join(f"|replace({json.dumps(key)}, {json.dumps(value)})" for key, value in replaced.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{chain} }}}}{{% endmacro %}}\n"


_FIXED_DATE = _fixed_date()
