"""Ties a score table to the file that the dataset was loaded from, so that `grads-dist select` can cut it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from grads_dist.config import Config, save_config
from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.errors import ConfigError
from grads_dist.preflight import absolute
from grads_dist.probe.config import ProbeConfig
from grads_dist.runtime.rundir import RunDir
from grads_dist.selection.config import SelectionConfig, Weights


def link_corpus(
    rundir: RunDir, path: str | Path, targets: Sequence[str] | Mapping[str, str], num_rows: int
) -> str:
    """Write a configuration that selects rows of `path`, without features; returns the file's fingerprint.

    Raises ConfigError when the file has another number of rows than the dataset, DataError when it cannot be
    read.
    """
    data = DataConfig(path=str(path))
    corpus = Corpus.open(data)
    if corpus.num_rows != num_rows:
        raise ConfigError(
            f"ScoreTableCallback: corpus {str(path)!r} has {corpus.num_rows} rows and train_dataset "
            f"{num_rows}; allowed: the file whose rows the dataset holds, in order"
        )
    config = Config(
        data=data,
        probe=ProbeConfig(
            targets=dict(targets) if isinstance(targets, Mapping) else list(targets), features="none"
        ),
        selection=SelectionConfig(weights=Weights(g=1.0, d=0.0, r=0.0)),
        output_dir=str(rundir.root),
    )
    save_config(absolute(config), rundir.config)
    return corpus.fingerprint
