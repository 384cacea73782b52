"""The stanza of a subset for LLaMA-Factory's dataset_info.json, as its data/README.md has the fields."""

from __future__ import annotations

from typing import Any

from grads_dist.data.config import CALL_TAG
from grads_dist.selection.exported import Exported, Messages, UnreadableError

_TAG_FIELDS = {
    "user": "user_tag",
    "assistant": "assistant_tag",
    "tool": "observation_tag",
    CALL_TAG: "function_tag",
    "system": "system_tag",
}
# Of roles that the first rows do not have, by the key of the role: ShareGPT's and OpenAI's.
_USUAL = {
    "from": {"user": "human", "assistant": "gpt", "tool": "observation"},
    "role": {"user": "user", "assistant": "assistant", "tool": "tool"},
}
_COLUMNS = {"instruction": "prompt", "input": "query", "output": "response"} | {
    name: name for name in ("history", "system", "tools")
}


def llama_factory_stanza(exported: Exported) -> dict[str, Any]:
    """What dataset_info.json says of the subset, under its name. Raises UnreadableError with the reason."""
    return {"file_name": exported.path, **_layout(exported)}


def _layout(exported: Exported) -> dict[str, Any]:
    row_format = exported.row_format
    if row_format is None:
        raise UnreadableError("takes files of one format, and these differ or have one of their own")
    if row_format == "tokens":
        raise UnreadableError("reads no token ids")
    lists = [name for name in exported.as_text if name != "tools"]
    if lists:
        raise UnreadableError(f"reads no JSON text in {', '.join(lists)}")
    if row_format == "prompt_completion":
        if exported.messages is not None:
            raise UnreadableError("reads no messages in prompt and completion")
        columns = {"prompt": exported.known("prompt"), "response": exported.known("completion")}
        return {"formatting": "alpaca", "columns": columns}
    if row_format == "text":
        return {"formatting": "alpaca", "columns": {"prompt": exported.known("text")}}
    if row_format == "alpaca":
        if exported.known("tools") and "tools" not in exported.as_text:
            raise UnreadableError("reads tools as JSON text alone beside instruction and output")
        return {"formatting": "alpaca", "columns": _present(exported, _COLUMNS)}
    if exported.messages is None:
        raise UnreadableError("finds no messages in the first rows")
    return _conversations(exported, exported.messages)


def _conversations(exported: Exported, messages: Messages) -> dict[str, Any]:
    for role, found in messages.tags.items():
        if len(found) > 1:
            raise UnreadableError(f"takes one tag for a role, and {role} has {len(found)}")
    is_sharegpt = exported.row_format == "sharegpt"
    names = {"conversations" if is_sharegpt else "messages": "messages", "tools": "tools"}
    if is_sharegpt:
        names["system"] = "system"
    # Only `openai` reads tool_calls, and tools that are no text.
    has_objects = exported.known("tools") is not None and "tools" not in exported.as_text
    formatting = "openai" if messages.has_calls or has_objects else "sharegpt"
    tags = {"role_tag": messages.role, "content_tag": messages.content}
    used = {tag for seen in messages.tags.values() for tag in seen}
    for role, tag_field in _TAG_FIELDS.items():
        usual = _USUAL.get(messages.role, {}).get(role, role)
        if role in messages.tags:
            tags[tag_field] = messages.tags[role][0]
        elif usual not in used:
            tags[tag_field] = usual
    return {"formatting": formatting, "columns": _present(exported, names), "tags": tags}


def _present(exported: Exported, names: dict[str, str]) -> dict[str, str]:
    """LLaMA-Factory's name -> the subset's own, of the columns that it has."""
    owned = {theirs: exported.known(ours) for ours, theirs in names.items()}
    return {theirs: own for theirs, own in owned.items() if own is not None}
