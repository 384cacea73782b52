"""Tool calls under a chat template: in the form that it takes, and none left out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from functools import cached_property
from typing import Any

from grads_dist.data.rows import RowError, kind_of_value, shorten
from grads_dist.data.template import ChatTemplate, Messages


class CallForm:
    """How a template takes the arguments of a call: as an object, like most, or as JSON text."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def shape(self, messages: Messages) -> Messages:
        """The messages with arguments, which are objects, in the template's form."""
        if not any(message.get("tool_calls") for message in messages) or not self._takes_text:
            return messages
        return [_with_text(message) for message in messages]

    @cached_property
    def _takes_text(self) -> bool:
        # Templates differ, and there is no way to tell but to try.
        return not self._renders({"x": "y"}) and self._renders('{"x": "y"}')

    def _renders(self, arguments: Any) -> bool:
        call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": arguments}}
        # Some templates need a content beside the calls, others none.
        for more in ({}, {"content": ""}):
            answer = {"role": "assistant", "tool_calls": [call], **more}
            with contextlib.suppress(RowError):
                self._template.render([{"role": "user", "content": "0"}, answer])
                return True
        return False


def check_tool_calls(render: Callable[..., str], messages: Messages) -> None:
    """Raise RowError where a message calls a function whose name is not in what it adds to the text."""
    for k, message in enumerate(messages):
        names = called(message, k)
        if not names:
            continue
        before = render(messages[:k]) if k else ""
        after = render(messages[: k + 1])
        turn = after[common_prefix(before, after) :]
        for name in names:
            if name not in turn:
                raise RowError(
                    "chat template",
                    f"the chat template leaves out the call of {shorten(repr(name))} in messages[{k}]; "
                    "allowed: one that renders tool_calls (data.chat_template)",
                )


def common_prefix(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    for k, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return k
    return min(len(first), len(second))


def called(message: dict[str, Any], k: int) -> list[str]:
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


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_call_with_text(call) for call in calls]} if calls else message


def _call_with_text(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call_with_text(call["function"])}
    if not isinstance(call.get("arguments"), dict):
        return call
    return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
