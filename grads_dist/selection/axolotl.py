"""The stanza of a subset for axolotl's `datasets`, as its documentation has the fields."""

from __future__ import annotations

from typing import Any

from grads_dist.data.config import CALL_TAG, ROLES
from grads_dist.selection.exported import Exported, Messages, UnreadableError, known_tags

_ALPACA = ("instruction", "input", "output")
_PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
_PROMPT_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
_TOKENS = ("input_ids", "attention_mask", "labels")


def axolotl_stanza(exported: Exported) -> dict[str, Any]:
    """The entry of `datasets`, with paths relative to the subset's folder.

    Raises UnreadableError with the reason.
    """
    stanza: dict[str, Any] = {
        "path": exported.path,
        "ds_type": "json" if exported.form == "jsonl" else exported.form,
        "split": "train",
    }
    if exported.path != exported.files[0]:
        stanza["data_files"] = exported.files
    return stanza | _type(exported)


def _type(exported: Exported) -> dict[str, Any]:
    row_format = exported.row_format
    if row_format is None:
        raise UnreadableError("takes files of one format, and these differ or have one of their own")
    if row_format == "tokens":
        return _tokens(exported)
    if row_format == "text":
        return {"type": "completion", "field": exported.known("text")}
    if row_format == "alpaca":
        return {"type": _alpaca(exported)}
    if row_format == "prompt_completion":
        if exported.messages is not None:
            raise UnreadableError("reads no messages in prompt and completion")
        fields = {"field_instruction": exported.known("prompt"), "field_output": exported.known("completion")}
        plain = {"format": "{instruction}", "no_input_format": "{instruction}", "system_format": ""}
        return {"type": fields | plain}
    if exported.messages is None:
        raise UnreadableError("finds no messages in the first rows")
    return _conversations(exported, exported.messages)


def _tokens(exported: Exported) -> dict[str, Any]:
    if exported.as_text or any(exported.known(name) != name for name in _TOKENS):
        raise UnreadableError(f"reads token ids as lists in {', '.join(_TOKENS)}, all three")
    # Without a type the rows are taken for tokenized.
    return {}


def _alpaca(exported: Exported) -> str | dict[str, Any]:
    for name in ("history", "tools"):
        if exported.known(name):
            raise UnreadableError(f"reads no {name} beside instruction and output")
    if exported.is_plain(*_ALPACA) and not exported.known("system"):
        return "alpaca"
    fields = {f"field_{name}": exported.known(name) for name in (*_ALPACA, "system") if exported.known(name)}
    prompts = {"format": _PROMPT_WITH_INPUT, "no_input_format": _PROMPT, "system_format": "{system}\n\n"}
    return fields | prompts


def _conversations(exported: Exported, messages: Messages) -> dict[str, Any]:
    if CALL_TAG in messages.tags:
        raise UnreadableError(f"has no role {CALL_TAG}")
    if not exported.is_plain("system", "tools"):
        raise UnreadableError("reads the columns system and tools by these names alone")
    named = "conversations" if exported.row_format == "sharegpt" else "messages"
    known = known_tags(exported.data)
    roles = {role: [tag for tag, meant in known.items() if meant == role] for role in ROLES}
    return {
        "type": "chat_template",
        "field_messages": exported.known(named),
        "message_property_mappings": {"role": messages.role, "content": messages.content},
        "roles": roles,
        "roles_to_train": ["assistant"] if exported.data.assistant_only_loss else list(ROLES),
    }
