"""Which format the rows of each file have, told by the names of their columns."""

from __future__ import annotations

import logging

from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.data.formats import REQUIRED, RowFormat
from grads_dist.data.rows import shorten
from grads_dist.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_IN_MESSAGES = ("role", "content")
"""What `data.columns` names inside a message, which is no column."""
_PREFERENCES = (("chosen", "rejected"), ("prompt", "completion", "label"), ("kto_tag",))
"""Columns of preference data, as TRL's and LLaMA-Factory's formats have them."""
_MASKS = ("completion_mask", "assistant_masks", "loss_mask")
"""Columns that say of token ids which carry loss, beside labels."""


def resolve_formats(config: DataConfig, corpus: Corpus) -> list[RowFormat]:
    """The format of each file's rows: the configured one, or for `auto` the one that its columns fit.

    Raises DataError when no format fits a file or a column that is asked for does not exist, ConfigError when
    several fit, or options are about another format.
    """
    columns = [corpus.part_columns(part) for part in range(len(corpus.files))]
    found = [name for names in columns for name in names or []]
    _check_mapped(config, list(dict.fromkeys(found or corpus.columns())))
    formats: list[RowFormat | None] = []
    for part, names in enumerate(columns):
        where = f" of {str(corpus.files[part])!r}" if len(columns) > 1 else ""
        has_schema = corpus.has_schema(part)
        formats.append(None if names is None else _resolve(config, names, has_schema, where))
    known = [row_format for row_format in formats if row_format is not None]
    # A file of which no row can be read gives as many broken rows, whatever their format.
    resolved = [row_format or known[0] for row_format in formats]
    if config.completion_only_loss and "prompt_completion" not in resolved:
        raise ConfigError(
            f"data.completion_only_loss: True is about rows of a prompt and a completion, and these are "
            f"{resolved[0]}; allowed: null"
        )
    return resolved


def resolve_format(config: DataConfig, columns: list[str], is_schema: bool = False) -> RowFormat:
    """The format of rows with these columns: those of the first rows, or of all if `is_schema` is set.

    Raises what `resolve_formats` raises.
    """
    _check_mapped(config, columns)
    return _resolve(config, columns, is_schema, "")


def _resolve(config: DataConfig, columns: list[str], is_schema: bool, where: str) -> RowFormat:
    found = ", ".join(shorten(repr(column)) for column in columns) or "none"
    if config.format != "auto":
        missing = [repr(name) for name in map(config.column, REQUIRED[config.format]) if name not in columns]
        if missing and is_schema:
            raise DataError(
                f"data.format: {config.format} needs {' and '.join(missing)}; found{where}: {found}"
            )
        return config.format
    fitting = [name for name, needed in REQUIRED.items() if {*map(config.column, needed)} <= {*columns}]
    named = [name for name in fitting if any(column in config.columns for column in REQUIRED[name])]
    if not named:
        _check_preference(columns, where)
    chosen = _preferred(named or fitting)
    if len(chosen) > 1:
        raise ConfigError(
            f"data.format: the columns{where} fit {' and '.join(chosen)}; set it to one of them"
        )
    if not chosen:
        allowed = " | ".join(" + ".join(needed) for needed in REQUIRED.values())
        raise DataError(
            f"data.format: no format fits the columns of the first rows{where}; found: {found}; "
            f"allowed: {allowed} (data.columns renames)"
        )
    if chosen == ["tokens"] and config.column("labels") not in columns:
        _check_masks(columns, where)
    if len(fitting) > 1:
        logger.info("the columns%s fit %s; the rows are read as %s", where, " and ".join(fitting), chosen[0])
    return chosen[0]


def _preferred(fitting: list[RowFormat]) -> list[RowFormat]:
    """Token ids come first, being the last step; a text beside something richer is its rendering."""
    if "tokens" in fitting:
        return ["tokens"]
    return [name for name in fitting if name != "text"] or fitting


def _check_preference(columns: list[str], where: str) -> None:
    for names in _PREFERENCES:
        if {*names} <= {*columns}:
            raise DataError(
                f"data.format: the columns {', '.join(names)}{where} are preferences, which have no single "
                "answer to learn; allowed: the good answers alone, as by data.columns {completion: chosen} "
                "or {messages: chosen}, or a data.format that is set"
            )


def _check_masks(columns: list[str], where: str) -> None:
    for name in _MASKS:
        if name in columns:
            raise DataError(
                f"data.format: {name!r} beside token ids{where} is not read, so that every token would carry "
                "loss; allowed: labels with -100, or data.format: tokens for loss on every token"
            )


def _check_mapped(config: DataConfig, columns: list[str]) -> None:
    found = ", ".join(shorten(repr(column)) for column in columns) or "none"
    for name, column in config.columns.items():
        if name not in _IN_MESSAGES and column not in columns:
            raise DataError(f"data.columns.{name}: no column {column!r} in the first rows; found: {found}")
