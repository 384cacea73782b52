"""What the ranks of test_resume.py do: probe once for each entry of a JSON list, in one process group.

    torchrun --nproc-per-node 2 tests/distributed/resume_worker.py jobs.json

An entry holds the program's arguments and, each optional: `stop_after`, after so many micro-batches of a rank
it is as if a signal had asked it to stop; `room`, a batch with more padded tokens than this runs out of
memory; `fail_in_add`, memory runs out once when the numbers of a batch are collected; `spoil`, the rows of
the store whose gradients are infinite. What came of it goes to `outcome`, of all ranks.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from grads_dist.commands import prepare
from grads_dist.errors import GradsDistError
from grads_dist.probe.session import Session
from grads_dist.runtime import logs
from grads_dist.runtime.launcher import detect
from grads_dist.runtime.ranks import Ranks
from grads_dist.table.shards import ScoreShards


@contextlib.contextmanager
def stopping_after(micro_batches: int | None) -> Iterator[None]:
    """Let this rank be asked to stop after so many micro-batches."""
    seen = 0

    def beat(self: Ranks, doing: str, kind: str = "", cost: float = 0.0) -> None:
        nonlocal seen
        seen += kind != "rehearsal"

    def requested(self: Ranks) -> str | None:
        return "SIGTERM" if micro_batches is not None and seen >= micro_batches else None

    with mock.patch.object(Ranks, "beat", beat), mock.patch.object(Ranks, "stop_requested", requested):
        yield


@contextlib.contextmanager
def counting() -> Iterator[list[int]]:
    """Rows that this rank adds to the score table; the list's sum."""
    counts: list[int] = []
    receive = ScoreShards.receive

    def call(self, batch, *args, **kwargs):
        counts.append(len(batch.rows))
        return receive(self, batch, *args, **kwargs)

    with mock.patch.object(ScoreShards, "receive", call):
        yield counts


@contextlib.contextmanager
def short_of_memory(room: int | None) -> Iterator[None]:
    """Let passes over more padded tokens than `room` fail as torch does."""

    def limited(method):
        def call(self, batch, *args, **kwargs):
            if room is not None and batch.input_ids.numel() > room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate too much.")
            return method(self, batch, *args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name in ("measure", "features", "train_micro_batch"):
            stack.enter_context(mock.patch.object(Session, name, limited(getattr(Session, name))))
        yield


@contextlib.contextmanager
def failing_once_on_the_way(fails: bool) -> Iterator[None]:
    """Let the statistics of the first batch with several rows find no memory on their way to the host."""
    send = ScoreShards.send

    def call(self, head, stats):
        nonlocal fails
        if fails and len(head.losses) > 1:
            fails = False
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate too much.")
        return send(self, head, stats)

    with mock.patch.object(ScoreShards, "send", call):
        yield


@contextlib.contextmanager
def spoiling(rows: list[int]) -> Iterator[None]:
    """Let the losses of some rows of the store have a weight that no gradient survives."""
    train = Session.train_micro_batch

    def call(self, batch, last_of_step, record):
        bad = torch.isin(batch.rows, torch.tensor(rows, dtype=torch.int64))
        if bad.any():
            batch.weights[bad.nonzero().squeeze(1)] = float("inf")
        return train(self, batch, last_of_step, record)

    with mock.patch.object(Session, "train_micro_batch", call):
        yield


def attempt(job: dict) -> dict:
    """Run one job; returns its exit code, the error's message or the program's text, and the rows seen."""
    with (
        stopping_after(job.get("stop_after")),
        short_of_memory(job.get("room")),
        spoiling(job.get("spoil", [])),
        failing_once_on_the_way(job.get("fail_in_add", False)),
        counting() as counts,
    ):
        try:
            outcome = {"code": 0, "text": prepare(job["arguments"])()}
        except GradsDistError as error:
            outcome = {"code": error.exit_code, "text": str(error)}
    return {**outcome, "rows": sum(counts)}


def main() -> None:
    ranks = Ranks.start(detect())
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        outcome = attempt(job)
        # An error of one rank alone ends the program; here the others had the same.
        outcomes = ranks.gather(outcome)
        if ranks.is_main and "outcome" in job:
            Path(job["outcome"]).write_text(json.dumps(outcomes), encoding="utf-8")
    logs.stop_file()
    ranks.close()


if __name__ == "__main__":
    main()
