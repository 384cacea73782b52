"""SIGKILL at any moment loses no row: runs are killed, started again and compared with undisturbed ones.

    python benchmarks/kill_test.py --kills 50 --seed 1

Each run is started by one command again and again, on one to three ranks, bare or under torchrun. Meanwhile
one rank, torchrun's agent, or everything is killed, until the run has had its kills and may finish. What is
checked: each corpus row is in the table or among the rejected ones, once; the numbers are those of the
undisturbed run, and the selection is the same; nothing is left over; survivors of a kill end within a minute.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from kill_phases import PHASES, Phases
from reliability import NUM_ROWS, POLL, ROOT, UNUSABLE, Start, arguments, kill, make_workspace
from report import provenance, write_csv
from run_checks import Outcome, check_run

SURVIVORS_END_WITHIN = 60.0
PATIENCE = 600.0
"""Seconds that a start may take that nobody kills."""

DELAYS = {
    "importing": 6.0,
    "tokenizing": 0.1,
    "loading": 2.0,
    "probing": 3.0,
    "merging": 0.1,
    "selecting": 0.5,
}
"""Up to so many seconds after a phase has begun, the kill falls."""
AIMS = (*PHASES, "probing", "probing", "merging", "selecting")


@dataclass(frozen=True)
class Case:
    """A kind of run."""

    name: str
    mode: str
    stage: int
    world_size: int | None
    """Ranks of every start; None: any number."""
    options: dict[str, object] = field(default_factory=dict)


TRAIN = {"probe__mode": "train", "probe__checkpoint_steps": 5}
CASES = (
    Case("frozen", "frozen", 0, None, {"probe__mode": "frozen"}),
    Case("train-zero2", "train", 2, 2, TRAIN),
    Case("frozen-zero3", "frozen", 3, None, {"probe__mode": "frozen"}),
    Case("train-zero1", "train", 1, 2, TRAIN),
    Case("train-zero3", "train", 3, 2, TRAIN),
)


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


def plan_kills(case: Case, count: int, rng: random.Random) -> Iterator[Kill]:
    """Random kills of one run, in the order of the phases, except that any start may be killed early."""
    aims = sorted((rng.choice(AIMS) for _ in range(count)), key=PHASES.index)
    early = [aim for aim in aims if aim == "importing"]
    aims = aims[len(early) :]
    for aim in early:
        aims.insert(rng.randint(0, len(aims)), aim)
    for aim in aims:
        num_ranks = case.world_size or rng.choice((1, 2, 3))
        torchrun = rng.random() < 0.5
        victims = ["all", "rank", "rank"] if num_ranks > 1 or torchrun else ["all"]
        if torchrun:
            victims.append("agent")
        elif aim == "importing":
            # Before the ranks have met nobody but a launcher can tell that one is missing.
            victims = ["all"]
        yield Kill(num_ranks, torchrun, aim, rng.uniform(0, DELAYS[aim]), rng.choice(victims))


def run_references(folder: Path, cases: tuple[Case, ...]) -> dict[str, Path]:
    """The undisturbed run of each case."""
    found = {}
    for case in cases:
        cycle = Cycle(folder, case, f"reference-{case.name}")
        cycle.finish(case.world_size or 1)
        found[case.name] = cycle.run
    return found


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


def summarize(lines: list[Line]) -> tuple[str, bool]:
    """A table of the kills, a closing line, and whether all is well."""
    kills = [line for line in lines if line.phase]
    counts = Counter((line.phase, line.victim) for line in kills)
    kinds = ("rank", "agent", "all")
    table = [f"{'killed while':<14}" + "".join(f"{kind:>8}" for kind in kinds)]
    for phase in PHASES:
        table.append(f"{phase:<14}" + "".join(f"{counts[phase, kind]:>8}" for kind in kinds))
    ends = [line for line in lines if line.lost is not None]
    lost, doubled = (sum(getattr(line, name) for line in ends) for name in ("lost", "doubled"))
    faults = [f"{line.run}: {line.faults}" for line in lines if line.faults]
    seconds = [line.seconds_to_end for line in kills if line.seconds_to_end is not None]
    good = bool(ends) and not (lost or doubled or faults)
    longest = f"survivors ended within {max(seconds):.0f} s" if seconds else "no survivors"
    closing = (
        f"kill test: {'pass' if good else 'FAIL'}: {len(kills)} kills in {len(ends)} runs and {len(lines)} "
        f"starts; {lost} rows lost, {doubled} doubled; {sum(bool(line.exact) for line in ends)} tables equal "
        f"in every bit; {longest}"
    )
    return "\n".join([*table, *faults, closing]), good


def _tell(line: Line) -> str:
    """A line of a start, for who waits."""
    what = (
        f"{line.victim} killed while {line.phase}"
        if line.phase
        else f"ended well{line.faults and ', FAULTS'}"
    )
    ended = (
        ""
        if line.seconds_to_end is None
        else f"; {line.survivors} others ended in {line.seconds_to_end:.0f} s"
    )
    return f"{line.run} start {line.start} ({line.num_ranks} ranks, {line.launcher}): {what}{ended}"


def run_all(folder: Path, num_kills: int, seed: int, cases: tuple[Case, ...] = CASES) -> list[Line]:
    """Runs of all cases in turn, until there were so many kills."""
    make_workspace(folder)
    references = run_references(folder, cases)
    lines: list[Line] = []
    number = 0
    while (left := num_kills - sum(bool(line.phase) for line in lines)) > 0:
        case, rng = cases[number % len(cases)], random.Random(f"{seed} {number}")
        cycle = Cycle(folder, case, f"{number:02d}-{case.name}")
        kills = plan_kills(case, min(left, rng.randint(5, 8)), rng)
        found = run_cycle(cycle, references[case.name], kills, rng)
        lines += found
        print(*map(_tell, found), sep="\n", flush=True)
        number += 1
    return lines


def main() -> int:
    """Kill, print the table and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep the runs and what they wrote here; else removed")
    parser.add_argument("--smoke", action="store_true", help="two kills of one run, to see that it works")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the CSV")
    options = parser.parse_args()
    told = provenance(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if options.smoke:
                lines = run_all(folder, 2, options.seed, CASES[:1])
            else:
                lines = run_all(folder, options.kills, options.seed)
        except FailedError as error:
            print(f"{error}\nkill test: FAIL, seed {options.seed}")
            return 1
    name = "kill_test_smoke" if options.smoke else "kill_test"
    rows = [{**asdict(line), "seed": options.seed, **told} for line in lines]
    write_csv(options.out / f"{name}.csv", [*COLUMNS, "seed", *told], rows)
    text, good = summarize(lines)
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
