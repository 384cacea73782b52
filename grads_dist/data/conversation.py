"""Conversations as files write them, to the messages that chat templates take."""

from __future__ import annotations

from typing import Any

from grads_dist.data.config import CALL_TAG, ROLES, DataConfig
from grads_dist.data.example import Chat
from grads_dist.data.rows import RowError, kind_of_value, shorten
from grads_dist.data.values import column, parsed, text

TAGS = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
}
"""What the role tags of ShareGPT files stand for, beside the roles themselves and `CALL_TAG`."""


def read_messages(value: object, where: str, config: DataConfig) -> list[dict[str, Any]]:
    """The messages of a conversation in canonical form: `role`, `content`, and what else they have.

    Roles may be under `from` and texts under `value`, with the tags of ShareGPT; in the result, calls have
    their arguments as objects. Raises RowError with the first thing that is wrong.
    """
    value = parsed(value)
    if not isinstance(value, list):
        raise RowError("wrong type", f"{where} is {kind_of_value(value)}, not a list of messages")
    if not value:
        raise RowError("empty", f"{where} is empty")
    return [_message(message, f"{where}[{k}]", config) for k, message in enumerate(value)]


def read_sharegpt(row: dict[str, Any], config: DataConfig) -> Chat:
    """`conversations`, with a `system` and a `tools` column if there are. Raises RowError."""
    name = config.column("conversations")
    messages = read_messages(column(row, name), name, config)
    return Chat(_with_system(messages, row, config), tools=read_tools(row, config))


def read_alpaca(row: dict[str, Any], config: DataConfig) -> Chat:
    """`instruction`, `input` and `output` as a conversation, after `system` and `history` if there are.

    The user says the instruction, a line break and the input, or only the one that is not empty. Raises
    RowError.
    """
    asked = [_optional_text(column(row, config.column("instruction")), config.column("instruction"))]
    asked.append(_optional_text(row.get(config.column("input")), config.column("input")))
    output = text(column(row, config.column("output")), config.column("output"))
    turns = [*_history(row, config), ("\n".join(part for part in asked if part), output)]
    messages = [
        {"role": role, "content": said}
        for turn in turns
        for role, said in zip(("user", "assistant"), turn, strict=True)
    ]
    return Chat(_with_system(messages, row, config), tools=read_tools(row, config))


def read_tools(row: dict[str, Any], config: DataConfig) -> list[dict[str, Any]] | None:
    """The `tools` column: a list of objects, or JSON text of one; None where it is empty. Raises RowError."""
    name = config.column("tools")
    tools = parsed(row.get(name))
    if tools is None or tools == "" or tools == []:
        return None
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list):
        raise RowError("wrong type", f"{name} is {kind_of_value(tools)}, not a list of objects")
    tools = [parsed(tool) for tool in tools]
    for k, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise RowError("wrong type", f"{name}[{k}] is {kind_of_value(tool)}, not an object")
    return tools


def _message(value: object, where: str, config: DataConfig) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError("wrong type", f"{where} is {kind_of_value(value)}, not an object")
    role_key = _key(value, "role", "from", config)
    content_key = _key(value, "content", "value", config)
    tag = value.get(role_key)
    if isinstance(tag, str) and config.roles.get(tag, tag) == CALL_TAG:
        return {"role": "assistant", "tool_calls": _calls(value.get(content_key), f"{where}.{content_key}")}
    message: dict[str, Any] = {"role": _role(tag, role_key in value, where, config)}
    content = value.get(content_key)
    if content is not None:
        message["content"] = content
    for key, field in value.items():
        # Templates test for presence, and a table gives every message every field of its schema.
        if key not in (role_key, content_key) and field is not None:
            message.setdefault(key, field)
    _gather_calls(message)
    if "content" in message or not message.get("tool_calls"):
        text(content, f"{where}.{content_key}")
    return message


def _key(message: dict[str, Any], name: str, other: str, config: DataConfig) -> str:
    if name in config.columns:
        return config.columns[name]
    return other if name not in message and other in message else name


def _role(tag: object, is_there: bool, where: str, config: DataConfig) -> str:
    if isinstance(tag, str):
        role = config.roles.get(tag) or TAGS.get(tag, tag)
        if role in ROLES:
            return role
    allowed = f"in {where}; allowed: {', '.join(ROLES)}"
    if not is_there or tag is None:
        raise RowError("unknown role", f"no role {allowed}")
    raise RowError("unknown role", f"unknown role {shorten(repr(tag))} {allowed} (data.roles maps)")


def _gather_calls(message: dict[str, Any]) -> None:
    """Bring the calls of a message into one form: `tool_calls`, with arguments as objects."""
    call = parsed(message.get("function_call"))
    if isinstance(call, dict) and not message.get("tool_calls"):
        del message["function_call"]
        message["tool_calls"] = [{"type": "function", "function": call}]
    calls = parsed(message.get("tool_calls"))
    if calls == []:
        # Files give every message the key; templates test for its presence.
        del message["tool_calls"]
    elif isinstance(calls, list):
        message["tool_calls"] = [_call(call) for call in calls]


def _call(call: Any) -> Any:
    """The call with its arguments as an object: files often hold them as JSON text."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"])}
    arguments = parsed(call.get("arguments"))
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _calls(value: object, where: str) -> list[dict[str, Any]]:
    calls = parsed(value)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RowError("wrong type", f"{where} is no JSON of a call with a name, or a list of such calls")
    return [{"type": "function", "function": _call(call)} for call in calls]


def _with_system(
    messages: list[dict[str, Any]], row: dict[str, Any], config: DataConfig
) -> list[dict[str, Any]]:
    """With the `system` column in front, unless it is empty or the conversation begins with its own."""
    system = _optional_text(row.get(config.column("system")), config.column("system"))
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _history(row: dict[str, Any], config: DataConfig) -> list[tuple[str, str]]:
    name = config.column("history")
    value = parsed(row.get(name))
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise RowError("wrong type", f"{name} is {kind_of_value(value)}, not a list of pairs")
    pairs = []
    for k, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("wrong type", f"{name}[{k}] is not a pair of a question and its answer")
        pairs.append((text(pair[0], f"{name}[{k}][0]"), text(pair[1], f"{name}[{k}][1]")))
    return pairs


def _optional_text(value: object, where: str) -> str:
    return "" if value is None else text(value, where)
