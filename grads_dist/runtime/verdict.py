"""Which rank is at fault, from what each says of itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from grads_dist.runtime.activity import State


@dataclass(frozen=True)
class Beat:
    """A sign of life of a rank, and what its main thread is doing."""

    rank: int
    host: str
    number: int
    """Counts the signs of life."""

    state: State
    doing: str
    progress: int
    """Counts what the main thread has done."""

    stalled: float
    """Seconds since its last progress, while the process was running."""

    limit: float
    """Seconds that it may take."""

    waiting: bool
    """Whether it waits for other ranks."""

    where: str

    def dump(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def load(text: str | bytes) -> Beat:
        """The inverse of `dump`."""
        return Beat(**json.loads(text))

    @property
    def late(self) -> bool:
        """Whether it should have got on by now."""
        return self.stalled > self.limit


@dataclass(frozen=True)
class Failure:
    """Why the run ends."""

    rank: int
    host: str
    doing: str
    message: str
    code: int
    named: bool = True
    """Whether the line says which rank it was: not for a stop on request."""

    def line(self) -> str:
        """What the user is told."""
        if not self.named:
            return self.message
        doing = f", {self.doing}" if self.doing else ""
        return f"rank {self.rank} (host {self.host}){doing}: {self.message}"


def judge(beats: Sequence[Beat]) -> Failure | None:
    """The failure of the rank that keeps all others waiting, or None if the run may still get on.

    While a rank is aside, writing a checkpoint say, nobody is judged: on GPUs it cannot be seen that a main
    thread waits for another rank, as NCCL's collectives return at once and what waits is a later look at a
    tensor. For the same reason a rank that is late is not judged while another has been at a batch, which may
    take that long, for most of the time.
    """
    if any(beat.state == "paused" for beat in beats):
        return None
    working = [beat for beat in beats if beat.state == "working"]
    busy = [beat for beat in working if not beat.waiting]
    late = [beat for beat in busy if beat.late and not _may_wait(beat, busy)]
    if late:
        # The one that others wait for has done least.
        worst = min(late, key=lambda beat: (beat.progress, -beat.stalled, beat.rank))
        return _hung(worst, f"no progress for {worst.stalled:.0f} s, at {worst.where}")
    if len(working) < len(beats) or busy or not all(beat.late for beat in working):
        return None
    first = min(working, key=lambda beat: (beat.progress, -beat.stalled, beat.rank))
    return _hung(
        first, f"every rank waits for the others, this one for {first.stalled:.0f} s, at {first.where}"
    )


def _may_wait(late: Beat, busy: Sequence[Beat]) -> bool:
    return any(not other.late and other.stalled > late.stalled / 2 for other in busy)


def _hung(beat: Beat, message: str) -> Failure:
    return Failure(beat.rank, beat.host, beat.doing, f"hung: {message}", code=1)
