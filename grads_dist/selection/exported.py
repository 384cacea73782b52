"""What a trainer has to be told about the rows of a subset."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grads_dist.data.config import ROLES, DataConfig
from grads_dist.data.conversation import TAGS
from grads_dist.data.detect import resolve_formats
from grads_dist.data.formats import OPTIONAL, REQUIRED, RowFormat
from grads_dist.data.records import parse_object
from grads_dist.data.subset import Form
from grads_dist.data.tables import TableFile
from grads_dist.data.values import parsed
from grads_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from grads_dist.data.corpus import Corpus

_SAMPLE_ROWS = 1000
_CONVERSATIONS: dict[RowFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
}
_LISTS = {"messages", "conversations", "history", "tools", "input_ids", "labels", "attention_mask"}


class UnreadableError(Exception):
    """A trainer cannot read the rows as they are; the text says why and goes on after the trainer's name."""


@dataclass(frozen=True)
class Messages:
    """How the messages of conversations are written."""

    role: str
    """Key of the role tag."""

    content: str
    """Key of the text."""

    tags: dict[str, list[str]]
    """Role, or function_call, -> the tags in the first rows that stand for it."""

    has_calls: bool
    """Whether messages have `tool_calls`."""


@dataclass(frozen=True)
class Exported:
    """A subset as it lies in its folder."""

    path: str
    """The file, or the folder of files, within the selection's folder."""

    files: list[str]
    """The files, in the order of their rows, within the selection's folder."""

    form: Form
    num_rows: int
    columns: list[str]
    """Of the first rows, or of the schema."""

    data: DataConfig
    """How the corpus was read."""

    row_format: RowFormat | None
    """None where the files of the corpus differ, or are of a format of their own."""

    messages: Messages | None = None
    """Of rows that are conversations."""

    as_text: list[str] = field(default_factory=list)
    """Which of the format's columns hold JSON text of a list or object."""

    @property
    def pattern(self) -> str:
        """A glob of the files, or the file."""
        return subset_pattern(Path(self.path), self.form)

    def known(self, name: str) -> str | None:
        """The subset's own name of a column that its format knows; None if it has none."""
        column = self.data.column(name)
        return column if column in self.columns else None

    def is_plain(self, *names: str) -> bool:
        """Whether each of these columns goes by its own name, or is not there."""
        return all(self.known(name) in (None, name) for name in names)


def known_tags(data: DataConfig) -> dict[str, str]:
    """The role that each tag stands for; a turn that is nothing but calls has none."""
    known = {role: role for role in ROLES} | TAGS | data.roles
    return {tag: role for tag, role in known.items() if role in ROLES}


def subset_pattern(path: Path, form: Form) -> str:
    """The name of a subset's file, or a glob of the files in its folder, within the selection's folder."""
    return path.name if path.suffix else f"{path.name}/*.{form}"


def describe_export(path: Path, corpus: Corpus, data: DataConfig, num_rows: int) -> Exported:
    """Look at the subset at `path`, a file or a folder of files: at its columns and its first 1000 rows."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    rows = list(_first_rows(files[0], corpus.form))
    exported = Exported(
        path=path.name,
        files=[str(file.relative_to(path.parent)) for file in files],
        form=corpus.form,
        num_rows=num_rows,
        columns=_columns(files[0], corpus.form, rows),
        data=data,
        row_format=_row_format(corpus, data),
    )
    return _with_contents(exported, rows)


def _row_format(corpus: Corpus, data: DataConfig) -> RowFormat | None:
    try:
        formats = {*resolve_formats(data, corpus)}
    except (ConfigError, DataError):
        # Rows that a training loop of the user's own read need not be of a format that is known here.
        return None
    return formats.pop() if len(formats) == 1 else None


def _first_rows(file: Path, form: Form) -> Iterator[dict[str, Any]]:
    if form == "parquet":
        table = TableFile(file)
        for row in table.rows(0, min(_SAMPLE_ROWS, table.num_rows), None):
            if isinstance(row, dict):
                yield row
    elif form == "csv":
        with file.open(encoding="utf-8-sig", newline="") as text:
            yield from itertools.islice(csv.DictReader(text), _SAMPLE_ROWS)
    else:
        with file.open("rb") as lines:
            for row in (parse_object(line, "") for line in itertools.islice(lines, _SAMPLE_ROWS)):
                if isinstance(row, dict):
                    yield row


def _columns(file: Path, form: Form, rows: list[dict[str, Any]]) -> list[str]:
    if form == "parquet":
        return list(TableFile(file).schema.names)
    return list(dict.fromkeys(name for row in rows for name in row))


def _with_contents(exported: Exported, rows: list[dict[str, Any]]) -> Exported:
    if exported.row_format is None:
        return exported
    names = [*REQUIRED[exported.row_format], *OPTIONAL[exported.row_format]]
    own = {name: exported.data.column(name) for name in names}
    as_text = [
        name for name in names if name in _LISTS and any(isinstance(row.get(own[name]), str) for row in rows)
    ]
    found = [
        turn
        for row in rows
        for name in _CONVERSATIONS.get(exported.row_format, ())
        for turn in _turns(row.get(own[name]))
    ]
    messages = _messages(found, exported.data) if found else None
    return replace(exported, messages=messages, as_text=as_text)


def _turns(value: object) -> list[dict[str, Any]]:
    turns = parsed(value)
    return [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []


def _messages(turns: list[dict[str, Any]], data: DataConfig) -> Messages:
    role = _key(turns, "role", "from", data)
    tags: dict[str, list[str]] = {}
    for turn in turns:
        tag = turn.get(role)
        if isinstance(tag, str):
            seen = tags.setdefault(data.roles.get(tag) or TAGS.get(tag, tag), [])
            if tag not in seen:
                seen.append(tag)
    has_calls = any(turn.get("tool_calls") for turn in turns)
    return Messages(role, _key(turns, "content", "value", data), tags, has_calls)


def _key(turns: list[dict[str, Any]], name: str, other: str, data: DataConfig) -> str:
    if name in data.columns:
        return data.columns[name]
    return other if not any(name in turn for turn in turns) else name
