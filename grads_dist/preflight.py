"""What is checked before any work is spent, and before an earlier run is removed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from grads_dist.config import Config, TableConfig
from grads_dist.data import locate
from grads_dist.errors import ConfigError
from grads_dist.runtime.trackers import check_trackers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from grads_dist.runtime.ranks import Ranks


def absolute(config: Config) -> Config:
    """The configuration with absolute paths, so that the one saved in a run works from any folder."""
    data = replace(
        config.data,
        path=_located(config.data.path),
        target=None if config.data.target is None else _located(config.data.target),
        chat_template=_absolute(config.data.chat_template) if config.data.chat_template else None,
    )
    model = config.model
    if model.name_or_path:
        model = replace(model, name_or_path=_model(model.name_or_path))
    if model.adapter:
        model = replace(model, adapter=_model(model.adapter))
    probe = replace(config.probe, checkpoints=[_model(name) for name in config.probe.checkpoints])
    deepspeed = _absolute(config.deepspeed) if config.deepspeed else None
    output_dir = _absolute(config.output_dir)
    return replace(config, data=data, model=model, probe=probe, deepspeed=deepspeed, output_dir=output_dir)


def absolute_table(config: TableConfig) -> TableConfig:
    """The same for a selection from a table."""
    data = config.data
    if data is not None:
        data = replace(data, path=_located(data.path))
    return replace(config, data=data, output_dir=_absolute(config.output_dir))


def _located(paths: str | list[str]) -> str | list[str]:
    return locate.absolute(paths) if isinstance(paths, str) else [locate.absolute(path) for path in paths]


def _model(name: str) -> str:
    """A folder with its full path; the name of a model of the hub as it is."""
    return _absolute(name) if Path(name).expanduser().is_dir() else name


def _absolute(path: str) -> str:
    # Not resolved: a link that the user named stays the name.
    return str(Path(path).expanduser().absolute())


def check_before_work(config: Config, ranks: Ranks, selecting: bool) -> Config:
    """Raise ConfigError for what would fail later; returns the configuration with rows cut at the context.

    Covers the output directory, the trackers, the DeepSpeed file, the model's type and its targets, and with
    `selecting` what can be told of the selection without a table.
    """
    from grads_dist.model.anatomy import dissect
    from grads_dist.model.context import within_context
    from grads_dist.model.load import load_text_config
    from grads_dist.probe.features import gradient_sketcher
    from grads_dist.probe.zero import (
        check_supported,
        fill_auto,
        load_deepspeed_config,
        probe_dtype,
        zero_stage,
    )
    from grads_dist.selection.check import check_selection
    from grads_dist.stats.targets import resolve_targets

    _check_output(config)
    check_trackers(config.report_to)
    text_config = load_text_config(config.model)
    deepspeed = load_deepspeed_config(config.deepspeed)
    dtype = probe_dtype(config.model, deepspeed, ranks.device)
    check_supported(config.probe, dtype, zero_stage(deepspeed), ranks.device)
    fill_auto(deepspeed, config.probe, dtype, text_config.hidden_size, 1, ranks)
    model = _meta_model(config, 0)
    anatomy = dissect(model)
    targets = resolve_targets(config.probe.targets, anatomy)
    gradient_sketcher(config.probe, anatomy)
    if selecting:
        check_selection(config, list(targets.members), text_config.hidden_size)
    _check_checkpoints(config, model, text_config.vocab_size)
    return replace(config, data=within_context(config.data, text_config))


def _check_output(config: Config) -> None:
    """Refuse to write a run among the files of the corpus; below them it is told from them by its marker."""
    output = Path(config.output_dir).resolve()
    for folder in map(Path, config.data.patterns):
        if locate.reads_all_of(folder, config.data) and folder.resolve() == output:
            raise ConfigError(
                f"output_dir: {config.output_dir!r} is the folder of data.path, all files of which are read; "
                "allowed: another folder, also one inside it"
            )


def _meta_model(config: Config, number: int) -> PreTrainedModel:
    """The model that is probed, or a checkpoint of it, without its weights."""
    from grads_dist.model.load import build_on_meta
    from grads_dist.probe.run import at_checkpoint

    if not config.probe.checkpoints:
        return build_on_meta(config.model)
    try:
        return build_on_meta(at_checkpoint(config, number).model)
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.name_or_path", "probe.checkpoints", 1)) from None


def _check_checkpoints(config: Config, first: PreTrainedModel, vocab_size: int) -> None:
    """Refuse checkpoints whose weights differ in shape, or that are not for the model's tokenizer."""
    names = config.probe.checkpoints

    def shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
        return {key: value.shape for key, value in model.named_parameters()}

    for number, name in enumerate(names):
        model = first if number == 0 else _meta_model(config, number)
        fits = model.config.get_text_config().vocab_size == vocab_size
        if not fits or type(model) is not type(first) or shapes(model) != shapes(first):
            other = names[0] if fits else config.model.name_or_path
            raise ConfigError(
                f"probe.checkpoints: {name!r} is not of the architecture of {other!r}; allowed: checkpoints "
                f"of one model"
            )
