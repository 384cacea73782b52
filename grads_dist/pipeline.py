"""The stages in order, on all ranks: check, tokenize, probe, merge, select."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grads_dist import provenance
from grads_dist.config import Config
from grads_dist.errors import GradsDistError
from grads_dist.identity import Share
from grads_dist.preflight import absolute
from grads_dist.preparing import Request, prepare, write_rejected
from grads_dist.runtime import logs
from grads_dist.runtime.launcher import detect
from grads_dist.runtime.rundir import RunDir, write_json
from grads_dist.runtime.shared import check_shared
from grads_dist.selecting import select_with

if TYPE_CHECKING:
    import numpy as np

    from grads_dist.data.store import TokenStore
    from grads_dist.runtime.journal import Journal
    from grads_dist.runtime.ranks import Ranks

log = logging.getLogger(__name__)


def run(config: Config, overwrite: bool = False) -> str:
    """Probe, merge and select; returns what to tell the user. Collective over all ranks.

    A run that was stopped goes on; of one that is complete the selection is made anew.
    """
    from grads_dist.runtime.ranks import Ranks

    with ExitStack() as held:
        probed = _probe(config, overwrite, held, selecting=True)
        ranks = Ranks.start(detect())
        try:
            return f"{probed}\n{select_with(config, ranks)}"
        except GradsDistError as error:
            hint = (
                f"the score table is complete: grads-dist select --output_dir {config.output_dir} goes on "
                "from it"
            )
            told = type(error)(f"{error}; {hint}")
            if ranks.shared_error is error:
                ranks.shared_error = told
            raise told from error


def probe(config: Config, overwrite: bool = False, share: Share | None = None) -> str:
    """Read the statistics of every row into the score table; returns what to tell the user. Collective.

    share: the part of the corpus to probe, for several runs that are merged later; None for all of it.
    """
    with ExitStack() as held:
        return _probe(config, overwrite, held, selecting=False, share=share)


def _probe(
    config: Config, overwrite: bool, held: ExitStack, selecting: bool, share: Share | None = None
) -> str:
    from grads_dist.data.layout import META
    from grads_dist.data.store import TokenStore
    from grads_dist.probe.run import Task, run_probe
    from grads_dist.runtime.ranks import Ranks

    ranks = Ranks.start(detect())
    rundir = RunDir(Path(absolute(config).output_dir))
    request = Request(absolute(config), rundir, overwrite, selecting, share)
    prepared = ranks.on_main(lambda: prepare(request, ranks, held))
    corpora = [] if prepared.finished else [c for c in (prepared.corpus, prepared.target) if c is not None]
    check_shared(ranks, rundir.root, [corpus.tokens / META for corpus in corpora])
    logs.log_to_file(rundir.logs_dir, ranks.rank, append=prepared.resumed)
    if prepared.finished:
        return f"probed {prepared.num_rows} rows by an earlier start: {rundir.scores}"
    store = TokenStore.open(prepared.corpus.tokens)
    target = TokenStore.open(prepared.target.tokens) if prepared.target is not None else None
    journal = _open_journal(prepared.config, rundir, ranks, prepared.resumed)
    held.callback(journal.close)
    task = Task(prepared.config, rundir, store, target, prepared.done, journal)
    manifest = run_probe(task, ranks)
    manifest = {**provenance.origin(prepared.config, prepared.corpus.fingerprint), **manifest}
    if target is not None and prepared.target is not None:
        manifest["target"] = provenance.target_set(prepared.target.fingerprint, target)
    return ranks.on_main(lambda: _merge(rundir, store, target, manifest))


def _open_journal(config: Config, rundir: RunDir, ranks: Ranks, resumed: bool) -> Journal:
    from grads_dist.runtime.journal import Journal
    from grads_dist.runtime.metrics import Metrics
    from grads_dist.runtime.trackers import open_trackers

    metrics = Metrics(rundir.logs_dir, ranks.rank, append=resumed)
    if not ranks.is_main or not getattr(config, "report_to", None):
        return Journal(metrics)
    return Journal(
        metrics, open_trackers(config.report_to, asdict(config), rundir.logs_dir, rundir.root.name)
    )


def _merge(rundir: RunDir, store: TokenStore, target: TokenStore | None, manifest: dict[str, Any]) -> str:
    """Join the shards of all ranks and say how the run came about; returns what to tell the user."""
    from grads_dist.probe.checkpoints import remove_checkpoints
    from grads_dist.table.merge import merge_features, merge_scores

    num_checkpoints = len(manifest.get("checkpoints", [])) or 1
    merged = merge_scores(rundir, store.index, num_checkpoints=num_checkpoints)
    rejected = merged.notes.rejected
    for name in manifest["features"]:
        merge_features(rundir, name, merged.index, rejected)
        if target is not None:
            merge_features(rundir, RunDir.of_target(name), target.index)
    write_rejected(rundir.rejected, store, rejected)
    counts = {"nonfinite_rows": merged.num_nonfinite, "lm_head": _describe_head(merged.notes.head_counts)}
    # An epoch that an earlier start ended left its count in the shards.
    skipped = max(manifest["plan"]["skipped_steps"], merged.notes.skipped_steps)
    plan = {**manifest["plan"], "skipped_steps": skipped}
    write_json(rundir.manifest, {**manifest, **counts, "plan": plan})
    remove_checkpoints(rundir.checkpoints)
    if merged.num_nonfinite:
        log.warning(
            "%d rows have a non-finite loss or gradient; they cannot be selected", merged.num_nonfinite
        )
    at = f" at {num_checkpoints} checkpoints" if num_checkpoints > 1 else ""
    return (
        f"probed {len(merged.index)} rows{at} ({store.num_rejected + len(rejected)} rejected, "
        f"{store.num_truncated} truncated, {merged.num_nonfinite} not finite): {rundir.scores}"
    )


def _describe_head(counts: np.ndarray) -> dict[str, int]:
    """How the statistics of the LM head came about where no weight gradient was summed on the way."""
    certified, rows, whole = counts.tolist()
    if certified:
        log.info(
            "LM head: %.0f rows of its gradient formed a sample on average, for %d samples; all rows for %d",
            rows / certified,
            certified,
            whole,
        )
    return {"certified_samples": certified, "rows_formed": rows, "samples_formed_whole": whole}
