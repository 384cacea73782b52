"""One run that is killed again and again, until it may finish: what came of each start, and of the run."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from kill_phases import PHASES, Phases
from reliability import NUM_ROWS, POLL, UNUSABLE, Start, arguments, kill
from run_checks import Outcome, check_run

SURVIVORS_END_WITHIN = 60.0
PATIENCE = 600.0
"""Seconds that a start may take that nobody kills."""


@dataclass(frozen=True)
class Case:
    """A kind of run."""

    name: str
    mode: str
    stage: int
    world_size: int | None
    """Ranks of every start; None: any number."""
    options: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Kill:
    """A start that is killed."""

    num_ranks: int
    torchrun: bool
    aim: str
    """The phase at whose beginning the clock starts."""
    delay: float
    """Seconds from there to the kill."""
    victim: str
    """"rank": one of them; "agent": torchrun's; "all"."""


@dataclass(frozen=True)
class Line:
    """What came of one start."""

    run: str
    mode: str
    stage: int
    start: int
    launcher: str
    num_ranks: int
    aim: str = ""
    phase: str = ""
    """The phase in which the kill fell; empty where the start ended before it."""
    victim: str = ""
    rows_before: int | None = None
    """Rows in shards at the kill."""
    survivors: int | None = None
    seconds_to_end: float | None = None
    """From the kill to the end of the last survivor."""
    causes: int | None = None
    """Lines in which survivors say why the run ended."""
    lost: int | None = None
    doubled: int | None = None
    exact: bool | None = None
    faults: str = ""


COLUMNS = tuple(Line.__dataclass_fields__)


class FailedError(Exception):
    """The program did what it must not, in the start that `line` is about."""

    def __init__(self, message: str, line: Line) -> None:
        super().__init__(message)
        self.line = line


class Cycle:
    """One run: killed, started again, and so on.

    Args:
        folder: the workspace.
        name: of the run directory.
    """

    def __init__(self, folder: Path, case: Case, name: str) -> None:
        self.case, self.name, self.run = case, name, folder / name
        self._folder = folder
        self._args = arguments(folder, self.run, case.stage, **case.options)
        self._starts = 0

    def finish(self, num_ranks: int) -> Line:
        """Start it and leave it alone. Raises FailedError unless it ends well."""
        with self._start(num_ranks, torchrun=False) as started:
            if started.wait(PATIENCE) is None or any(started.codes()):
                raise self._failed(started, f"was left alone and ended with {started.codes()}")
            return self._line(started)

    def kill(self, planned: Kill, rng: random.Random) -> Line | None:
        """Start it and kill it as planned; None where it had ended well before.

        Raises FailedError if survivors stay, or if it had ended badly.
        """
        if planned.aim == "tokenizing":
            shutil.rmtree(self.run.with_name(f"{self.name}-cache"), ignore_errors=True)
        phases = Phases(self.run, NUM_ROWS - len(UNUSABLE))
        with self._start(planned.num_ranks, planned.torchrun) as started:
            if not self._await_moment(started, phases, planned):
                return None
            return self._kill_now(started, phases, planned, rng)

    def _kill_now(self, started: Start, phases: Phases, planned: Kill, rng: random.Random) -> Line | None:
        victim, victims = _choose(started, planned.victim, rng)
        line = replace(self._line(started), aim=planned.aim, phase=phases.now(), victim=victim)
        line = replace(line, rows_before=phases.num_written())
        survivors = len(started.alive()) - len(victims)
        for pid in victims:
            kill(pid)
        seconds = started.wait(SURVIVORS_END_WITHIN)
        if seconds is None:
            raise self._failed(
                started, f"has survivors {SURVIVORS_END_WITHIN:.0f} s after {planned} fell in {line.phase}"
            )
        if not any(started.codes()):
            return None
        if not survivors:
            return replace(line, survivors=0)
        return replace(line, survivors=survivors, seconds_to_end=seconds, causes=len(started.causes()))

    def _await_moment(self, started: Start, phases: Phases, planned: Kill) -> bool:
        """Wait for the moment of the kill; False where all is over before it."""
        begin, moment = time.monotonic(), None
        while started.alive():
            now = time.monotonic()
            if moment is None and PHASES.index(phases.now()) >= PHASES.index(planned.aim):
                moment = now + planned.delay
            if moment is not None and now >= moment:
                return True
            if now - begin > PATIENCE:
                raise self._failed(started, f"did not come to {planned.aim} within {PATIENCE:.0f} s")
            time.sleep(POLL)
        if any(started.codes()):
            raise self._failed(started, f"ended with {started.codes()} before it was killed")
        return False

    def _start(self, num_ranks: int, torchrun: bool) -> Start:
        self._starts += 1
        log = self._folder / "starts" / f"{self.name}-{self._starts:02d}"
        return Start(self._args, num_ranks, torchrun, log)

    def _line(self, started: Start) -> Line:
        launcher = "torchrun" if started.torchrun else "none"
        case = self.case
        return Line(self.name, case.mode, case.stage, self._starts, launcher, started.num_ranks)

    def _failed(self, started: Start, what: str) -> FailedError:
        ranks = f"{started.num_ranks} ranks"
        message = f"{self.name}: start {self._starts} ({ranks}) {what}\n{started.output()}"
        return FailedError(message, self._line(started))


def _choose(started: Start, victim: str, rng: random.Random) -> tuple[str, list[int]]:
    """What is killed, and the process numbers of that."""
    agent = [started.processes[0].pid] if started.torchrun else []
    ranks = started.ranks()
    if victim == "rank" and ranks:
        return "rank", [rng.choice(ranks)]
    # torchrun may not have started its ranks yet.
    return ("all", [*agent, *ranks]) if victim == "all" else ("agent", agent)


def run_cycle(cycle: Cycle, reference: Path, kills: Iterator[Kill], rng: random.Random) -> list[Line]:
    """Kill a run as planned and let it finish; what came of each start, and of the run in the last line."""
    lines, num_ranks = [], cycle.case.world_size or rng.choice((1, 2, 3))
    try:
        for planned in kills:
            line = cycle.kill(planned, rng)
            if line is None:
                break
            lines.append(line)
        last = cycle.finish(num_ranks)
        return [*lines, _with_outcome(last, check_run(cycle.run, reference, NUM_ROWS))]
    except FailedError as error:
        print(error, flush=True)
        return [*lines, replace(error.line, faults=str(error).partition("\n")[0])]


def _with_outcome(line: Line, outcome: Outcome) -> Line:
    faults = "; ".join(outcome.faults)
    return replace(line, lost=outcome.lost, doubled=outcome.doubled, exact=outcome.exact, faults=faults)
