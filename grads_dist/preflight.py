"""What is checked before any work is spent, and before an earlier run is removed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from grads_dist.config import Config

if TYPE_CHECKING:
    from grads_dist.runtime.ranks import Ranks


def absolute(config: Config) -> Config:
    """The configuration with absolute paths, so that the one saved in a run works from any folder."""
    data = config.data
    paths = [data.path] if isinstance(data.path, str) else data.path
    located = [_absolute(path) for path in paths]
    data = replace(
        data,
        path=located[0] if isinstance(data.path, str) else located,
        chat_template=_absolute(data.chat_template) if data.chat_template else None,
    )
    model = config.model
    if model.name_or_path and Path(model.name_or_path).expanduser().is_dir():
        model = replace(model, name_or_path=_absolute(model.name_or_path))
    deepspeed = _absolute(config.deepspeed) if config.deepspeed else None
    output_dir = _absolute(config.output_dir)
    return replace(config, data=data, model=model, deepspeed=deepspeed, output_dir=output_dir)


def _absolute(path: str) -> str:
    # Not resolved: a link that the user named stays the name.
    return str(Path(path).expanduser().absolute())


def check_before_work(config: Config, ranks: Ranks, selecting: bool) -> Config:
    """Raise ConfigError for what would fail later; returns the configuration with rows cut at the context.

    Covers the DeepSpeed file, the model's type and its targets, and with `selecting` what can be told of the
    selection without a table.
    """
    from grads_dist.model.anatomy import dissect
    from grads_dist.model.context import within_context
    from grads_dist.model.load import build_on_meta, load_text_config
    from grads_dist.probe.zero import (
        check_supported,
        fill_auto,
        load_deepspeed_config,
        probe_dtype,
        zero_stage,
    )
    from grads_dist.selection.run import check_selection
    from grads_dist.stats.targets import resolve_targets

    text_config = load_text_config(config.model)
    deepspeed = load_deepspeed_config(config.deepspeed)
    dtype = probe_dtype(config.model, deepspeed, ranks.device)
    check_supported(config.probe, dtype, zero_stage(deepspeed), ranks.device)
    fill_auto(deepspeed, config.probe, dtype, text_config.hidden_size, 1, ranks)
    targets = resolve_targets(config.probe.targets, dissect(build_on_meta(config.model)))
    if selecting:
        check_selection(config, list(targets.members))
    return replace(config, data=within_context(config.data, text_config))
