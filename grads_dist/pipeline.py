"""The stages in order, on all ranks: check, tokenize, probe, merge, select."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grads_dist import provenance
from grads_dist.config import Config, save_config
from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.errors import GradsDistError
from grads_dist.preflight import absolute, check_before_work
from grads_dist.runtime import logs
from grads_dist.runtime.launcher import detect
from grads_dist.runtime.rundir import RunDir, atomic_write
from grads_dist.selecting import select_with

if TYPE_CHECKING:
    from grads_dist.data.store import TokenStore
    from grads_dist.runtime.ranks import Ranks

log = logging.getLogger(__name__)

REJECTED_SHARE = 0.01
"""Share of rejected rows above which a warning says so."""


def run(config: Config, overwrite: bool = False) -> str:
    """Probe, merge and select; returns what to tell the user. Collective over all ranks."""
    from grads_dist.runtime.ranks import Ranks

    probed = _probe(config, overwrite, selecting=True)
    ranks = Ranks.start(detect())
    try:
        return f"{probed}\n{select_with(config, ranks)}"
    except GradsDistError as error:
        hint = (
            f"the score table is complete: grads-dist select --output_dir {config.output_dir} goes on from it"
        )
        told = type(error)(f"{error}; {hint}")
        if ranks.shared_error is error:
            ranks.shared_error = told
        raise told from error


def probe(config: Config, overwrite: bool = False) -> str:
    """Read the statistics of every row into the score table; returns what to tell the user. Collective."""
    return _probe(config, overwrite, selecting=False)


def _probe(config: Config, overwrite: bool, selecting: bool) -> str:
    from grads_dist.data.store import TokenStore
    from grads_dist.probe.run import run_probe
    from grads_dist.runtime.ranks import Ranks

    ranks = Ranks.start(detect())
    rundir = RunDir(Path(absolute(config).output_dir))
    prepared = ranks.on_main(lambda: _prepare(absolute(config), rundir, overwrite, ranks, selecting))
    config = prepared.config
    logs.log_to_file(rundir.logs_dir, ranks.rank)
    store = TokenStore.open(prepared.corpus.tokens)
    target = TokenStore.open(prepared.target.tokens) if prepared.target is not None else None
    manifest = run_probe(config, ranks, rundir, store, target)
    manifest = {**provenance.identity(config, prepared.corpus.fingerprint), **manifest}
    if target is not None and prepared.target is not None:
        manifest["target"] = provenance.target_set(prepared.target.fingerprint, target)
    return ranks.on_main(lambda: _merge(rundir, store, target, manifest, ranks))


@dataclass(frozen=True)
class Tokenized:
    """A corpus that is ready to be probed."""

    fingerprint: str
    tokens: Path
    """Folder of the token store."""


@dataclass(frozen=True)
class Prepared:
    """What rank 0 found and made before any rank probes."""

    config: Config
    """The configuration as it holds."""

    corpus: Tokenized
    target: Tokenized | None
    """The target set, if there is one."""


def _prepare(config: Config, rundir: RunDir, overwrite: bool, ranks: Ranks, selecting: bool) -> Prepared:
    """What rank 0 does before any rank probes: checks, tokens, the run directory, rejected.jsonl.

    An earlier run in the directory is removed only when all checks have passed and the corpus is tokenized.
    """
    from grads_dist.data.layout import REJECTED
    from grads_dist.data.target import about_target, target_config
    from grads_dist.selection.check import check_strata

    rundir.check(overwrite)
    config = check_before_work(config, ranks, selecting)
    corpus = Corpus.open(config.data)
    if selecting:
        check_strata(config, corpus)
    target_corpus = None
    if config.data.target is not None and not config.probe.feature_names:
        log.warning("data.target is not read: probe.features is none")
    if config.data.target is not None and config.probe.feature_names:
        with about_target():
            target_corpus = Corpus.open(target_config(config.data))
    store = _tokenize(config, config.data, corpus)
    target = None
    if target_corpus is not None:
        with about_target():
            target_store = _tokenize(config, target_config(config.data), target_corpus)
        target = Tokenized(target_corpus.fingerprint, target_store.path)
        if target_store.num_rejected:
            log.warning("%d rows of data.target are rejected", target_store.num_rejected)
    rundir.create(overwrite)
    save_config(config, rundir.config)
    with atomic_write(rundir.rejected) as path:
        shutil.copyfile(store.path / REJECTED, path)
    if store.num_rejected > REJECTED_SHARE * corpus.num_rows:
        log.warning("%d of %d rows are rejected: see rejected.jsonl", store.num_rejected, corpus.num_rows)
    return Prepared(config, Tokenized(corpus.fingerprint, store.path), target)


def _tokenize(config: Config, data: DataConfig, corpus: Corpus) -> TokenStore:
    from grads_dist.data.tokenize import tokenize
    from grads_dist.data.tokenizer import TokenizerSource
    from grads_dist.model.load import load_text_config

    model = config.model
    source = TokenizerSource(str(model.name_or_path), model.revision, model.trust_remote_code)
    return tokenize(data, corpus, source, vocab_size=load_text_config(model).vocab_size)


def _merge(
    rundir: RunDir, store: TokenStore, target: TokenStore | None, manifest: dict[str, Any], ranks: Ranks
) -> str:
    """Join the shards of all ranks and say how the run came about; returns what to tell the user."""
    from grads_dist.table.merge import merge_features, merge_scores

    num_checkpoints = len(manifest.get("checkpoints", [])) or 1
    merge_scores(rundir, store.index, num_checkpoints=num_checkpoints)
    for name in manifest["features"]:
        merge_features(rundir, name, store.index)
        if target is not None:
            merge_features(rundir, RunDir.of_target(name), target.index)
    launcher = ranks.placement.launcher
    _write_json(rundir.environment, provenance.environment(ranks.world_size, str(ranks.device), launcher))
    _write_json(rundir.manifest, manifest)
    nonfinite = manifest["nonfinite_rows"]
    if nonfinite:
        log.warning("%d rows have a non-finite loss or gradient; they cannot be selected", nonfinite)
    at = f" at {num_checkpoints} checkpoints" if num_checkpoints > 1 else ""
    return (
        f"probed {store.num_rows} rows{at} ({store.num_rejected} rejected, {store.num_truncated} truncated, "
        f"{nonfinite} not finite): {rundir.scores}"
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
