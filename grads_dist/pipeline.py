"""The stages in order, on all ranks: tokenize, probe, merge, select."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import subprocess
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grads_dist.config import Config, save_config
from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.errors import ConfigError, DataError
from grads_dist.runtime import logs
from grads_dist.runtime.launcher import detect
from grads_dist.runtime.rundir import RunDir, atomic_write

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

SCHEMA = 1
"""Version of the run directory's layout."""

BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")

REJECTED_SHARE = 0.01
"""Share of rejected rows above which a warning says so."""

PACKAGES = (
    "grads-dist",
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "numpy",
    "pyarrow",
    "faiss-cpu",
    "faiss-gpu",
)


def run(config: Config, overwrite: bool = False) -> str:
    """Probe, merge and select; returns what to tell the user. Collective over all ranks."""
    from grads_dist.runtime.ranks import Ranks

    probed = probe(config, overwrite)
    selected = Ranks.start(detect()).on_main(lambda: select(config))
    return f"{probed}\n{selected}"


def probe(config: Config, overwrite: bool = False) -> str:
    """Read the statistics of every row into the score table; returns what to tell the user. Collective."""
    from grads_dist.data.store import TokenStore
    from grads_dist.probe.run import run_probe
    from grads_dist.runtime.ranks import Ranks
    from grads_dist.table.merge import merge_features, merge_scores

    ranks = Ranks.start(detect())
    rundir = RunDir(Path(config.output_dir))
    fingerprint, tokens = ranks.on_main(lambda: _prepare(config, rundir, overwrite, ranks.device))
    logs.log_to_file(rundir.logs_dir, ranks.rank)
    store = TokenStore.open(tokens)
    manifest = run_probe(config, ranks, rundir, store)
    ranks.barrier()

    def merge() -> str:
        num_rows = merge_scores(rundir, store.index)
        for name in manifest["features"]:
            merge_features(rundir, name, store.index)
        _write_json(
            rundir.environment, _environment(ranks.world_size, str(ranks.device), ranks.placement.launcher)
        )
        _write_json(rundir.manifest, {**_identity(config, fingerprint), **manifest})
        nonfinite = manifest["nonfinite_rows"]
        if nonfinite:
            log.warning(
                "%d rows have a loss or gradient that is not finite; they cannot be selected", nonfinite
            )
        return (
            f"probed {num_rows} rows ({store.num_rejected} rejected, {store.num_truncated} truncated, "
            f"{nonfinite} not finite): {rundir.scores}"
        )

    return ranks.on_main(merge)


def select(config: Config) -> str:
    """Select from a finished probe; returns what to tell the user. Runs on one rank, without a model."""
    from grads_dist.selection.run import run_selection

    rundir = RunDir(Path(config.output_dir))
    corpus = Corpus.open(config.data)
    _check_corpus(rundir, corpus)
    summary = run_selection(config, rundir, corpus)
    folder = rundir.selection_dir(config.selection.name)
    counts = summary["counts"]
    return f"selected {counts['selected']} of {counts['corpus']} rows: {folder / summary['subset']}"


def _check_corpus(rundir: RunDir, corpus: Corpus) -> None:
    """Refuse a corpus that changed since it was probed: row numbers would point at other rows."""
    if not rundir.manifest.exists():
        return
    probed = json.loads(rundir.manifest.read_text(encoding="utf-8"))["corpus"]
    if probed != corpus.fingerprint:
        raise DataError(
            f"data.path: not the corpus that {str(rundir.root)!r} probed; restore it, or probe again"
        )


def _prepare(config: Config, rundir: RunDir, overwrite: bool, device: torch.device) -> tuple[str, Path]:
    """What rank 0 does before any rank probes: checks, the run directory, tokens, rejected.jsonl.

    Returns the corpus' fingerprint and the folder of the tokens.
    """
    from grads_dist.data.tokenize import tokenize
    from grads_dist.data.tokenizer import TokenizerSource
    from grads_dist.model.load import load_text_config

    text_config = load_text_config(config.model)
    _check_before_work(config, device)
    data = _within_context(config.data, text_config)
    corpus = Corpus.open(data)
    rundir.create(overwrite)
    save_config(config, rundir.config)
    model = config.model
    source = TokenizerSource(str(model.name_or_path), model.revision, model.trust_remote_code)
    store = tokenize(data, corpus, source, vocab_size=text_config.vocab_size)
    if store.num_rejected > REJECTED_SHARE * corpus.num_rows:
        log.warning("%d of %d rows are rejected: see rejected.jsonl", store.num_rejected, corpus.num_rows)
    with atomic_write(rundir.rejected) as path, path.open("w", encoding="utf-8") as lines:
        for index, reason in store.iter_rejected():
            lines.write(json.dumps({"index": index, "reason": reason}, ensure_ascii=False) + "\n")
    return corpus.fingerprint, store.path


def _check_before_work(config: Config, device: torch.device) -> None:
    """Find what would fail later in the DeepSpeed file, the model's type or the targets.

    An earlier run in the directory is removed only after this.
    """
    from grads_dist.model.anatomy import dissect
    from grads_dist.model.load import build_on_meta
    from grads_dist.probe.zero import (
        check_supported,
        load_deepspeed_config,
        probe_dtype,
        zero_stage,
    )
    from grads_dist.stats.targets import resolve_targets

    deepspeed_config = load_deepspeed_config(config.deepspeed)
    dtype = probe_dtype(config.model, deepspeed_config, device)
    check_supported(config.probe, dtype, zero_stage(deepspeed_config), device)
    resolve_targets(config.probe.targets, dissect(build_on_meta(config.model)))


def _within_context(data: DataConfig, text_config: Any) -> DataConfig:
    """Cut rows at the model's context, where it has learned positions or was trained with no more."""
    context = getattr(text_config, "max_position_embeddings", None)
    rope = getattr(text_config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") in BATCH_DEPENDENT_ROPE and original and data.max_length > original:
        raise ConfigError(
            f"data.max_length: {data.max_length} is beyond {original}, where {rope['rope_type']} positions "
            f"depend on the longest row of a batch; allowed: at most {original}"
        )
    if context is None or data.max_length <= context:
        return data
    log.info("data.max_length %d is beyond the model's context; rows are cut at %d", data.max_length, context)
    return replace(data, max_length=int(context))


def _identity(config: Config, fingerprint: str) -> dict[str, Any]:
    text = json.dumps(asdict(config), sort_keys=True)
    return {
        "schema": SCHEMA,
        "corpus": fingerprint,
        "config": hashlib.sha256(text.encode()).hexdigest(),
    }


def _environment(world_size: int, device: str, launcher: str) -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": device,
        "world_size": world_size,
        "launcher": launcher,
        "versions": versions,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of the checkout that this package runs from; None for an installed one."""
    folder, name = str(Path(__file__).parent), Path(__file__).name

    def git(*args: str) -> str | None:
        done = subprocess.run(["git", "-C", folder, *args], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        # An environment inside some other checkout is not tracked there.
        return git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", name) else None
    except FileNotFoundError:
        return None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
