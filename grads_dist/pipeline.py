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
from typing import Any

from grads_dist.config import Config, save_config
from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.errors import DataError
from grads_dist.runtime import logs
from grads_dist.runtime.launcher import detect
from grads_dist.runtime.rundir import RunDir, atomic_write

log = logging.getLogger(__name__)

SCHEMA = 1
"""Version of the run directory's layout."""

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
    fingerprint, tokens = ranks.on_main(lambda: _prepare(config, rundir, overwrite))
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
        rejected, truncated = store.num_rejected, store.num_truncated
        return f"probed {num_rows} rows ({rejected} rejected, {truncated} truncated): {rundir.scores}"

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


def _prepare(config: Config, rundir: RunDir, overwrite: bool) -> tuple[str, Path]:
    """What rank 0 does before any rank probes: checks, the run directory, tokens, rejected.jsonl.

    Returns the corpus' fingerprint and the folder of the tokens.
    """
    from grads_dist.data.tokenize import tokenize
    from grads_dist.data.tokenizer import TokenizerSource
    from grads_dist.model.load import load_text_config

    text_config = load_text_config(config.model)
    data = _within_context(config.data, text_config)
    corpus = Corpus.open(data)
    rundir.create(overwrite)
    save_config(config, rundir.config)
    model = config.model
    source = TokenizerSource(str(model.name_or_path), model.revision, model.trust_remote_code)
    store = tokenize(data, corpus, source, vocab_size=text_config.vocab_size)
    with atomic_write(rundir.rejected) as path, path.open("w", encoding="utf-8") as lines:
        for index, reason in store.iter_rejected():
            lines.write(json.dumps({"index": index, "reason": reason}, ensure_ascii=False) + "\n")
    return corpus.fingerprint, store.path


def _within_context(data: DataConfig, text_config: Any) -> DataConfig:
    """Cut rows at the model's context, where it has learned positions or was trained with no more."""
    context = getattr(text_config, "max_position_embeddings", None)
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
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
