"""Times real micro-batches of the planned passes on this machine and says what the whole probe would take."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grads_dist.config import Config
from grads_dist.data.tokenize import worker_count
from grads_dist.errors import ConfigError, GradsDistError
from grads_dist.estimate.fit import Fit, chosen_batches, fit_costs
from grads_dist.estimate.sample import Sample
from grads_dist.estimate.workload import BatchSizes, Pass, seconds_over_ranks, sizes_of
from grads_dist.model.probed import Batch
from grads_dist.probe.batches import collate
from grads_dist.probe.features import content_projection
from grads_dist.probe.run import at_checkpoint
from grads_dist.probe.session import Session
from grads_dist.probe.sweeps import FROZEN_STEP, FROZEN_WEIGHT
from grads_dist.runtime.launcher import Placement, detect
from grads_dist.runtime.ranks import Ranks
from grads_dist.stats.sketch import unit_length
from grads_dist.table.shards import FeatureShards, ScoreShards

log = logging.getLogger(__name__)

NUM_BATCHES = 14
"""Micro-batches of a pass that are timed."""

ROUNDS = 2
"""How often each is timed, in another order every time."""

SECONDS_A_PASS = 120.0
"""After which no more micro-batches of a pass are timed."""

FEWEST = 3

IMPORT_ROUNDS = 2

Clock = Callable[[], float]
"""Seconds since some moment."""

IMPORTS = "import grads_dist.pipeline, grads_dist.probe.run, grads_dist.data.store"


@dataclass(frozen=True)
class Calibration:
    """What was measured, in seconds, and what follows for the run.

    Args:
        imports: starting Python and importing what a probe imports.
        checking: looking at configuration, model and corpus.
        tokenizing: all of the corpus; 0 where the cache holds it.
        loading: the model and its engine, once for each checkpoint.
        passes: by the name of the pass, over the ranks.
        fits: costs of a micro-batch of each.
        device: where it was measured.
    """

    imports: float
    checking: float
    tokenizing: float
    loading: float
    passes: dict[str, float]
    fits: dict[str, Fit]
    device: str

    @property
    def start(self) -> float:
        """Before the first micro-batch."""
        return self.imports + self.checking + self.tokenizing + self.loading

    @property
    def total(self) -> float:
        """Wall time of `grads-dist probe`."""
        return self.start + sum(self.passes.values())


def calibrate(
    config: Config,
    sample: Sample,
    passes: list[Pass],
    ranks: int,
    checking: float,
    clock: Clock = time.perf_counter,
) -> Calibration:
    """Load the model, time micro-batches of every pass, and add up; on one rank.

    Args:
        config: of the run.
        sample: gives the rows their tokens.
        passes: what will be done.
        ranks: ranks of the run.
        checking: seconds that its checks took.
        clock: what seconds are measured by.

    Raises ConfigError when several ranks are running, or the model does not fit here.
    """
    alone = Ranks.start(_alone())
    imports = _time_imports(clock)
    at = at_checkpoint(config, 0) if config.probe.checkpoints else config
    start = clock()
    try:
        # DeepSpeed prints, and what is printed here is the estimate.
        with redirect_stdout(sys.stderr):
            session = Session(at, alone)
            loading = clock() - start
            fits = _time_passes(session, config, sample, passes, clock)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"calibrate: the model does not fit on one {alone.device.type} device as configured; allowed: "
            f"without --calibrate, or a smaller probe.batch_tokens"
        ) from error
    return Calibration(
        imports=imports,
        checking=checking,
        tokenizing=0.0 if sample.cached else _tokenizing(config, sample),
        loading=loading * max(1, len(config.probe.checkpoints)),
        passes={
            work.name: seconds_over_ranks(work, fits[work.name].predict(sizes_of(work)), ranks)
            for work in passes
        },
        fits=fits,
        device=_device_name(alone.device),
    )


def _alone() -> Placement:
    placement = detect()
    if placement.world_size > 1:
        raise ConfigError(
            f"calibrate: {placement.world_size} ranks are running it; allowed: one, and --ranks "
            f"{placement.world_size}"
        )
    return placement


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def _time_imports(clock: Clock) -> float:
    """In processes of their own, the best of them: here all is imported already.

    What is imported later, by a model or an engine, is part of what checks and loading take.
    """
    seconds = []
    for _ in range(IMPORT_ROUNDS):
        start = clock()
        done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False)
        seconds.append(clock() - start)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise GradsDistError(f"calibrate: a process that imports the probe failed: {reason[0]}")
    return min(seconds)


def _tokenizing(config: Config, sample: Sample) -> float:
    """By the sample's rate, in as many processes as `tokenize` starts."""
    workers = worker_count(config.data.num_workers, sample.num_rows)
    return sample.seconds * sample.num_rows / sample.num_read / workers


def _time_passes(
    session: Session, config: Config, sample: Sample, passes: list[Pass], clock: Clock
) -> dict[str, Fit]:
    fits: dict[str, Fit] = {}
    kinds: dict[tuple[str, bool, bool], Fit] = {}
    for work in passes:
        kind = (work.kind, work.with_features, work.with_sketches)
        if kind not in kinds:
            if work.kind == "measure" and config.probe.mode == "train":
                session.freeze()
            kinds[kind] = _time_pass(_Timer(session, config, sample, work, clock), work)
        fits[work.name] = kinds[kind]
    return fits


def _time_pass(timer: _Timer, work: Pass) -> Fit:
    sizes = sizes_of(work)
    chosen = chosen_batches(sizes, NUM_BATCHES)
    # The largest first, for the allocator and whatever is compiled or chosen at the first use.
    timer.run(int(chosen[np.argmax(sizes.padded[chosen])]), ends_step=True)
    rng = np.random.default_rng(0)
    places: list[int] = []
    seconds: list[float] = []
    ends: list[float] = []
    begin = time.perf_counter()
    for round_ in range(ROUNDS):
        for i, k in enumerate(rng.permutation(chosen)):
            if len(places) >= FEWEST and time.perf_counter() - begin > SECONDS_A_PASS:
                break
            # Half of them each: what a step costs is not to be taken for what its last micro-batch costs.
            ends_step = work.trains and (i + round_) % 2 == 0
            seconds.append(timer.run(int(k), ends_step))
            places.append(int(k))
            ends.append(float(ends_step))
    timed = BatchSizes(**{name: values[places] for name, values in vars(sizes).items()})
    fit = fit_costs(replace(timed, ends_step=np.array(ends)), np.array(seconds))
    percent = 100 * fit.error
    log.info("%s: %d micro-batches timed, %.0f %% off the fit", work.name, len(places), percent)
    return fit


class _Timer:
    """Runs single micro-batches of a pass as the probe does, up to where their rows would be written."""

    def __init__(self, session: Session, config: Config, sample: Sample, work: Pass, clock: Clock) -> None:
        self._clock = clock
        self._session, self._config, self._sample, self._work = session, config, sample, work
        self._device = session.ranks.device
        projection = content_projection(session.model.anatomy.embedding_dim, config.probe, self._device)
        # Nothing is flushed, so that no folder is made and no store is asked for the rows' numbers.
        store: Any = sample.tokens
        self._scores = ScoreShards(Path(), store, session.targets)
        self._features = FeatureShards(Path(), store, projection)
        self._sketches = FeatureShards(Path(), store, None)

    def run(self, k: int, ends_step: bool) -> float:
        """Seconds that micro-batch `k` of the pass takes."""
        plan, offset = self._work.plan, self._work.batches.start
        planned = plan.batch(offset + k)
        self._wait()
        start = self._clock()
        rows = self._work.rows.sample_row[planned]
        weight = 1 / self._config.probe.global_batch if self._work.trains else FROZEN_WEIGHT
        avoid = self._session.model.anatomy.head_counts
        batch = collate(self._sample.tokens, rows, np.full(len(rows), weight), self._device, avoid)
        self._pass(batch, ends_step)
        self._wait()
        return self._clock() - start

    def _pass(self, batch: Batch, ends_step: bool) -> None:
        probe, work = self._config.probe, self._work
        if work.kind == "features":
            self._features.add(batch, self._session.features(batch, probe.feature_tokens))
            return
        if work.trains:
            found = self._session.train_micro_batch(batch, ends_step, record=work.kind == "probe")
            self._session.update()
        else:
            tokens = probe.feature_tokens if work.with_features else None
            found = self._session.measure(batch, tokens, sketching=work.with_sketches)
        if found is None:
            return
        self._scores.add(batch, found.head, found.stats, FROZEN_STEP)
        if found.features is not None and work.with_features:
            self._features.add(batch, found.features)
        if found.sketch is not None:
            self._sketches.add(batch, unit_length(found.sketch))

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
