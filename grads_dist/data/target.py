"""The target set: a small corpus of what the model shall become good at, for the criteria that compare."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from grads_dist.data.config import DataConfig
from grads_dist.data.locate import names_dataset
from grads_dist.errors import ConfigError, GradsDistError


def target_config(config: DataConfig) -> DataConfig:
    """The settings by which the target set is opened and tokenized: those of the corpus, at `target`.

    `limit` is about the corpus alone, and so are the options of a dataset where the target set is none.
    `format: auto` is decided anew. Raises ConfigError without a target.
    """
    if config.target is None:
        raise ConfigError("data.target: unset; allowed: what data.path takes, for the criteria rds and less")
    target = replace(config, path=config.target, target=None, limit=None)
    if target.completion_only_loss:
        # The same for rows with a completion, and no fault where the target set has none.
        target = replace(target, completion_only_loss=None)
    if not any(map(names_dataset, target.patterns)):
        target = replace(target, split=None, name=None, revision=None)
    return target


@contextlib.contextmanager
def about_target() -> Iterator[None]:
    """Let errors of what is done under a `target_config` name data.target, where the user wrote the path."""
    try:
        yield
    except GradsDistError as error:
        fault = str(error)
        named = (
            fault.replace("data.path", "data.target", 1) if "data.path" in fault else f"data.target: {fault}"
        )
        raise type(error)(named) from error
