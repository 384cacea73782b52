"""Python that brings the rows of a subset into a form that TRL's SFTTrainer takes."""

from __future__ import annotations

from grads_dist.data.config import CALL_TAG
from grads_dist.selection.exported import Exported, Messages, UnreadableError, known_tags

_OWN = {
    "messages": ("messages", "tools"),
    "prompt_completion": ("prompt", "completion", "tools"),
    "text": ("text",),
    "tokens": ("input_ids", "labels"),
}
"""Columns that TRL knows by these names alone."""


def trl_mapping(exported: Exported) -> str:
    """Lines that define `convert(row)` and map `dataset`; nothing where TRL reads the rows as they are.

    Raises UnreadableError with the reason for rows that take more than that.
    """
    row_format = exported.row_format
    if row_format is None:
        raise UnreadableError("takes rows of one format, and these differ or have one of their own")
    if exported.as_text:
        raise UnreadableError(f"reads no JSON text in {', '.join(exported.as_text)}")
    messages = exported.messages
    if messages is not None and CALL_TAG in messages.tags:
        raise UnreadableError(f"has no role {CALL_TAG}")
    if row_format == "alpaca":
        return _map(_alpaca(exported), ["prompt", "completion"])
    if row_format == "sharegpt":
        if messages is None:
            raise UnreadableError("finds no messages in the first rows")
        return _map(_sharegpt(exported, messages), ["messages"])
    if messages is not None and not _is_openai(messages):
        raise UnreadableError("reads messages with role and content, and the names of roles, alone")
    names = [name for name in _OWN[row_format] if exported.known(name) not in (None, name)]
    renamed = {exported.known(name): name for name in names}
    return f"dataset = dataset.rename_columns({ascii(renamed)})\n" if renamed else ""


def _is_openai(messages: Messages) -> bool:
    is_named = (messages.role, messages.content) == ("role", "content")
    return is_named and all(tags == [role] for role, tags in messages.tags.items())


def _alpaca(exported: Exported) -> list[str]:
    for name in ("history", "tools"):
        if exported.known(name):
            raise UnreadableError(f"reads no {name} beside instruction and output")
    parts = [f"row[{ascii(own)}]" for name in ("instruction", "input") if (own := exported.known(name))]
    return [
        f'asked = "\\n".join(part for part in ({", ".join(parts)},) if part)',
        'turns = [{"role": "user", "content": asked}]',
        *_with_system(exported),
        f'answer = {{"role": "assistant", "content": row[{ascii(exported.known("output"))}]}}',
        'return {"prompt": turns, "completion": [answer]}',
    ]


def _sharegpt(exported: Exported, messages: Messages) -> list[str]:
    turn = f'{{"role": roles[turn[{ascii(messages.role)}]], "content": turn[{ascii(messages.content)}]}}'
    return [
        f"roles = {ascii(known_tags(exported.data))}",
        f"turns = [{turn} for turn in row[{ascii(exported.known('conversations'))}]]",
        *_with_system(exported),
        'return {"messages": turns}',
    ]


def _with_system(exported: Exported) -> list[str]:
    own = exported.known("system")
    if own is None:
        return []
    said = f"row[{ascii(own)}]"
    return [
        f'if {said} and turns[0]["role"] != "system":',
        f'    turns.insert(0, {{"role": "system", "content": {said}}})',
    ]


def _map(body: list[str], made: list[str]) -> str:
    lines = "".join(f"    {line}\n" for line in body)
    dropped = f"[name for name in dataset.column_names if name not in {ascii([*made, 'tools'])}]"
    return f"def convert(row):\n{lines}\n\ndataset = dataset.map(convert, remove_columns={dropped})\n"
