"""The passes that a probe will make, and the micro-batches of each, by the probe's own plan.

Where only a sample of the corpus is known, its rows are planned with lengths drawn from the sample.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from grads_dist.estimate.sample import Sample
from grads_dist.probe.config import ProbeConfig
from grads_dist.probe.plan import Plan, frozen_plan, share_units, train_plan

MOST_PLANNED = 200_000
"""Rows that are planned; what a larger corpus costs is scaled up from so many."""


@dataclass(frozen=True)
class Rows:
    """Rows to plan: lengths int64 [N], and which row of the sample each stands for.

    `scale`: rows of the corpus for each of them.
    """

    num_tokens: np.ndarray
    num_label_tokens: np.ndarray
    sample_row: np.ndarray
    scale: float


def rows_of(sample: Sample, seed: int) -> Rows:
    """The corpus' usable rows: themselves where all are known, else draws from the sample."""
    known = len(sample.num_tokens)
    planned = min(sample.num_usable, MOST_PLANNED)
    if sample.exact and planned == known:
        chosen = np.arange(known)
    else:
        chosen = np.random.default_rng(seed).integers(0, known, planned)
    return Rows(
        sample.num_tokens[chosen],
        sample.num_label_tokens[chosen],
        chosen,
        sample.num_usable / planned,
    )


Kind = Literal["features", "train", "probe", "measure"]
"""Forward only; training without statistics; training with them; statistics at fixed weights."""


@dataclass(frozen=True)
class Pass:
    """One pass of a probe over some groups of a plan, `repeats` times."""

    name: str
    kind: Kind
    plan: Plan
    rows: Rows
    groups: range
    repeats: int = 1
    with_features: bool = False
    """Whether content features come out of it as well."""
    with_sketches: bool = False

    @property
    def trains(self) -> bool:
        """Whether it makes optimizer steps."""
        return self.kind in ("train", "probe")

    @property
    def batches(self) -> range:
        """Its micro-batches in the plan."""
        return range(
            int(self.plan.group_offsets[self.groups.start]), int(self.plan.group_offsets[self.groups.stop])
        )

    @property
    def times(self) -> float:
        """How often what is planned is done, for a corpus larger than the plan too."""
        return self.repeats * self.rows.scale


@dataclass(frozen=True)
class BatchSizes:
    """Every micro-batch of a pass, each float64 [M]: rows, longest row, real tokens, label tokens."""

    rows: np.ndarray
    longest: np.ndarray
    tokens: np.ndarray
    labels: np.ndarray
    ends_step: np.ndarray

    @property
    def padded(self) -> np.ndarray:
        """Tokens with padding."""
        return self.rows * self.longest

    @property
    def squares(self) -> np.ndarray:
        """Rows times the square of the longest, which attention costs."""
        return self.rows * self.longest**2


def sizes_of(work: Pass) -> BatchSizes:
    """Sizes of the micro-batches of a pass, in order."""
    plan, batches = work.plan, work.batches
    offsets = plan.batch_offsets[batches.start : batches.stop + 1]
    order = plan.order[offsets[0] : offsets[-1]]
    starts = (offsets - offsets[0])[:-1]
    tokens, labels = work.rows.num_tokens[order], work.rows.num_label_tokens[order]
    ends = np.zeros(len(batches))
    ends[plan.group_offsets[work.groups.start + 1 : work.groups.stop + 1] - batches.start - 1] = 1
    return BatchSizes(
        rows=np.diff(offsets).astype(np.float64),
        longest=np.maximum.reduceat(tokens, starts).astype(np.float64),
        tokens=np.add.reduceat(tokens, starts).astype(np.float64),
        labels=np.add.reduceat(labels, starts).astype(np.float64),
        ends_step=ends,
    )


def planned_passes(probe: ProbeConfig, rows: Rows) -> list[Pass]:
    """The passes of a probe of the corpus, in the order of `probe.run`; the target set is not among them."""
    content, gradient = ("content" in probe.feature_names, "gradient" in probe.feature_names)
    sweep = _sweep(probe, rows, np.arange(len(rows.num_tokens)))
    everything = range(sweep.num_groups)
    if probe.mode == "frozen":
        one = Pass("probe", "measure", sweep, rows, everything, with_features=content, with_sketches=gradient)
        return [replace(one, repeats=max(1, len(probe.checkpoints)))]
    passes = [Pass("features", "features", sweep, rows, everything, with_features=True)] if content else []
    for epoch in range(probe.epochs):
        plan = train_plan(rows.num_tokens, probe.global_batch, probe.batch_tokens, probe.seed, epoch)
        if epoch < probe.epochs - 1:
            passes.append(Pass(f"epoch {epoch + 1}", "train", plan, rows, range(plan.num_groups)))
    if probe.warmup is None:
        return [*passes, Pass("probe", "probe", plan, rows, range(plan.num_groups))]
    warm = max(1, round(probe.warmup * plan.num_groups))
    rest = probe.warmup_probe == "rest"
    passes.append(Pass("warmup", "probe" if rest else "train", plan, rows, range(warm)))
    left = np.arange(len(rows.num_tokens))
    if rest:
        left = np.setdiff1d(left, plan.order[: plan.batch_offsets[plan.group_offsets[warm]]])
    if len(left):
        last = _sweep(probe, rows, left)
        passes.append(Pass("probe", "measure", last, rows, range(last.num_groups), with_sketches=gradient))
    return passes


def _sweep(probe: ProbeConfig, rows: Rows, chosen: np.ndarray) -> Plan:
    return frozen_plan(rows.num_tokens, chosen, probe.shard_rows, probe.batch_tokens)


def seconds_over_ranks(work: Pass, seconds: np.ndarray, ranks: int) -> float:
    """Time of a pass whose micro-batches take `seconds` [M], shared between ranks as the probe does.

    In training ranks take the micro-batches of a step in turn and wait for each other at every one; units of
    a frozen plan are dealt out by their tokens.
    """
    if ranks == 1:
        return float(seconds.sum()) * work.times
    if not work.trains:
        shares = share_units(work.plan, work.rows.num_tokens, ranks)
        of_batch = np.append(0, np.cumsum(seconds))
        cuts = of_batch[work.plan.group_offsets]
        of_unit = np.diff(cuts)
        return max(float(of_unit[share].sum()) for share in shares) * work.times
    first = work.batches.start
    group = np.repeat(np.arange(len(work.groups)), np.diff(work.plan.group_offsets)[work.groups])
    turn = np.arange(len(seconds)) - (work.plan.group_offsets[work.groups.start + group] - first)
    rounds = np.flatnonzero(turn % ranks == 0)
    return float(np.maximum.reduceat(seconds, rounds).sum()) * work.times


def idle_share(work: Pass, ranks: int) -> float:
    """Share of the ranks' time that they wait, if a micro-batch takes as long as it has padded tokens."""
    padded = sizes_of(work).padded
    return 1 - float(padded.sum()) * work.times / (ranks * seconds_over_ranks(work, padded, ranks))
