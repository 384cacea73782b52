"""What to read and how rows become tokens: the `data` section of the configuration."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from grads_dist.errors import ConfigError

Format = Literal["auto", "messages", "prompt_completion", "text", "tokens"]
COLUMNS = ("messages", "prompt", "completion", "text", "input_ids", "labels", "id")


@dataclass(frozen=True)
class DataConfig:
    """The corpus, its format and how it is tokenized."""

    path: str | list[str]
    """A .jsonl or .parquet file, a glob, or a list of them (one kind only)."""

    format: Format = "auto"
    """What a row holds: messages, prompt_completion, text or tokens; auto decides by the columns."""

    columns: dict[str, str] = field(default_factory=dict)
    """Names of the corpus's own columns, for example {messages: conversation, id: uid}."""

    max_length: int = 2048
    """Longest row in tokens; what is beyond is cut from the right and counted."""

    assistant_only_loss: bool = True
    """Only assistant turns (or the completion) carry loss; false: every token but the first does."""

    chat_template: str | None = None
    """A Jinja file to use instead of the tokenizer's own chat template."""

    limit: int | None = None
    """Use only the first rows of the corpus."""

    num_workers: int | None = None
    """Tokenization processes; unset: as many as this node has cores and the corpus is worth."""

    cache_dir: str | None = None
    """Where tokens are kept; unset: GRADS_DIST_CACHE, else ~/.cache/grads_dist. Every rank must see it."""

    def __post_init__(self) -> None:
        paths = [self.path] if isinstance(self.path, str) else self.path
        if not isinstance(paths, (list, tuple)) or not paths or not all(_is_text(p) for p in paths):
            raise ConfigError(f"data.path: {self.path!r} is not a file, a glob or a non-empty list of them")
        if self.format not in get_args(Format):
            raise ConfigError(f"data.format: {self.format!r} is not one of {', '.join(get_args(Format))}")
        _check_columns(self.columns)
        _check_count("max_length", self.max_length, minimum=2)
        if not isinstance(self.assistant_only_loss, bool):
            raise ConfigError(f"data.assistant_only_loss: {self.assistant_only_loss!r} is not true or false")
        for name in ("limit", "num_workers"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), minimum=1)
        for name in ("chat_template", "cache_dir"):
            if getattr(self, name) is not None and not _is_text(getattr(self, name)):
                raise ConfigError(f"data.{name}: {getattr(self, name)!r} is not a path")

    @property
    def patterns(self) -> list[str]:
        """`path` as a list."""
        return [self.path] if isinstance(self.path, str) else list(self.path)

    def column(self, name: str) -> str:
        """The corpus's name of the canonical column `name`."""
        return self.columns.get(name, name)

    def cache_folder(self) -> Path:
        """The cache folder: `cache_dir`, else the environment's GRADS_DIST_CACHE, else the default."""
        chosen = self.cache_dir or os.environ.get("GRADS_DIST_CACHE") or "~/.cache/grads_dist"
        return Path(chosen).expanduser()


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _check_count(name: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ConfigError(f"data.{name}: {value!r} is not a whole number of at least {minimum}")


def _check_columns(columns: object) -> None:
    if not isinstance(columns, dict):
        raise ConfigError(f"data.columns: {columns!r} is not a map from a name to a column")
    for name, column in columns.items():
        if name not in COLUMNS:
            raise ConfigError(f"data.columns: {name!r} is not one of {', '.join(COLUMNS)}")
        if not _is_text(column):
            raise ConfigError(f"data.columns.{name}: {column!r} is not a column name")
