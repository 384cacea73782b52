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
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from kill_cycle import Case, Cycle, Kill, Line, run_cycle
from kill_phases import PHASES
from reliability import make_workspace, results_folder
from report import provenance, write_csv

COLUMNS = tuple(Line.__dataclass_fields__)
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


TRAIN = {"probe__mode": "train", "probe__checkpoint_steps": 5}
CASES = (
    Case("frozen", "frozen", 0, None, {"probe__mode": "frozen"}),
    Case("train-zero2", "train", 2, 2, TRAIN),
    Case("frozen-zero3", "frozen", 3, None, {"probe__mode": "frozen"}),
    Case("train-zero1", "train", 1, 2, TRAIN),
    Case("train-zero3", "train", 3, 2, TRAIN),
)


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
        if torchrun and num_ranks > 1:
            # One rank alone does not need its agent, and would go on.
            victims.append("agent")
        elif aim == "importing" and not torchrun:
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
    what = "ended well" if line.phase == "" else f"{line.victim} killed while {line.phase}"
    if line.seconds_to_end is not None:
        what += f"; {line.survivors} others ended in {line.seconds_to_end:.0f} s"
    if line.faults:
        what = line.faults
    return f"{line.run} start {line.start} ({line.num_ranks} ranks, launcher {line.launcher}): {what}"


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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep the runs and what they wrote here; else removed")
    parser.add_argument("--smoke", action="store_true", help="two kills of one run, to see that it works")
    parser.add_argument(
        "--out", type=Path, help="folder of the CSV; default: benchmarks/results, none in smoke"
    )
    options = parser.parse_args()
    told = provenance(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        num_kills, cases = (2, CASES[:1]) if options.smoke else (options.kills, CASES)
        lines = run_all(folder, num_kills, options.seed, cases)
        rows = [{**asdict(line), "seed": options.seed, **told} for line in lines]
        out = results_folder(options.out, options.smoke, Path(temporary))
        write_csv(out / "kill_test.csv", [*COLUMNS, "seed", *told], rows)
    text, good = summarize(lines)
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
