"""What to read and how rows become tokens: the `data` section of the configuration."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from grads_dist.errors import ConfigError

Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "tokens"]
ROLES = ("system", "user", "assistant", "tool")
CALL_TAG = "function_call"
"""The role tag of a turn in which the assistant calls functions and says nothing else."""
COLUMNS = (
    "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "history",
    "system", "tools", "text", "input_ids", "labels", "id", "role", "content",
)  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    """The corpus, its format and how it is tokenized."""

    path: str | list[str]
    """A .jsonl, .json, .csv, .parquet or .arrow file, a folder, a glob, a dataset (org/name); or a list."""

    format: Format = "auto"
    """What a row holds: messages, sharegpt, alpaca, prompt_completion, text, tokens; auto: by its columns."""

    columns: dict[str, str] = field(default_factory=dict)
    """Names of the corpus's own columns, and of role and content in a message: {messages: conversation}."""

    roles: dict[str, str] = field(default_factory=dict)
    """The role that each of the corpus's own role tags stands for, for example {customer: user}."""

    split: str | None = None
    """Which split of a dataset (org/name, or a folder that `datasets` wrote): train, or train[:10%]."""

    name: str | None = None
    """Which configuration of a dataset (org/name)."""

    revision: str | None = None
    """Which revision of a dataset (org/name): a branch, tag or commit."""

    target: str | list[str] | None = None
    """A target set for the criteria rds and less: what `path` takes, read with the same options."""

    max_length: int = 2048
    """Longest row in tokens; what is beyond is cut from the right and counted."""

    assistant_only_loss: bool = True
    """Of a conversation, only the assistant's turns carry loss; false: every turn does."""

    completion_only_loss: bool | None = None
    """Of a prompt and its completion, only the completion carries loss (null: the same); false: both do."""

    chat_template: str | None = None
    """A Jinja file to use instead of the tokenizer's own chat template."""

    limit: int | None = None
    """Use only the first rows of the corpus."""

    num_workers: int | None = None
    """Tokenization processes; unset: as many as this node has cores and the corpus is worth."""

    cache_dir: str | None = None
    """Where tokens are kept; unset: GRADS_DIST_CACHE, else ~/.cache/grads_dist. Every rank must see it."""

    def __post_init__(self) -> None:
        _check_paths("path", self.path)
        if self.target is not None:
            _check_paths("target", self.target)
        if self.format not in get_args(Format):
            raise ConfigError(f"data.format: {self.format!r} is not one of {', '.join(get_args(Format))}")
        _check_columns(self.columns)
        _check_count("max_length", self.max_length, minimum=2)
        _check_roles(self.roles)
        if not isinstance(self.assistant_only_loss, bool):
            raise ConfigError(f"data.assistant_only_loss: {self.assistant_only_loss!r} is not true or false")
        if self.completion_only_loss is not None and not isinstance(self.completion_only_loss, bool):
            raise ConfigError(
                f"data.completion_only_loss: {self.completion_only_loss!r} is not true, false or null"
            )
        for name in ("limit", "num_workers"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), minimum=1)
        for name in ("chat_template", "cache_dir"):
            if getattr(self, name) is not None and not _is_path(getattr(self, name)):
                raise ConfigError(f"data.{name}: {getattr(self, name)!r} is not a path")
        for name in ("split", "name", "revision"):
            if getattr(self, name) is not None and not _is_text(getattr(self, name)):
                raise ConfigError(f"data.{name}: {getattr(self, name)!r} is not a name")

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


def _is_path(value: object) -> bool:
    return _is_text(value) and "\0" not in str(value)


def _check_paths(name: str, value: object) -> None:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, (list, tuple)) or not paths or not all(_is_path(path) for path in paths):
        raise ConfigError(f"data.{name}: {value!r} is not a file, a glob or a non-empty list of them")


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


def _check_roles(roles: object) -> None:
    if not isinstance(roles, dict):
        raise ConfigError(f"data.roles: {roles!r} is not a map from a role tag to a role")
    allowed = (*ROLES, CALL_TAG)
    for tag, role in roles.items():
        if role not in allowed:
            raise ConfigError(f"data.roles.{tag}: {role!r} is not one of {', '.join(allowed)}")
