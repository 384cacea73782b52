"""Two hosts that lose each other in the middle of a run both end and say why; started again, it is whole.

    python benchmarks/network_fault.py

The hosts are network namespaces with a router between them, and run one rank each. The link goes down, or the
router drops every packet, in the middle of a frozen probe, where ranks exchange only signs of life, and of
training, where a collective is under way. Needs root; prints why it is skipped where it cannot run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from kill_phases import Phases
from network import FAULTS, Network, make_network, why_not
from reliability import POLL, UNUSABLE, Start, arguments, free_port, make_workspace, results_folder
from report import provenance, write_csv
from run_checks import Outcome, check_run

NUM_ROWS = 1500
PATIENCE = 600.0
END_WITHIN = 60.0
CUT_AFTER = NUM_ROWS // 4
"""Rows in shards of the score table at which the link is cut."""
MODES: dict[str, tuple[int, dict[str, object]]] = {
    "frozen": (0, {"probe__mode": "frozen"}),
    "train": (2, {"probe__mode": "train", "probe__checkpoint_steps": 10}),
}


@dataclass(frozen=True)
class Line:
    """What became of one end of a cut link, and of the run in the end."""

    mode: str
    stage: int
    fault: str
    rank: int
    rows_before: int
    """Rows of both ends in shards when the link was cut."""
    seconds_to_end: float
    exit_code: int
    cause: str
    lost: int
    doubled: int
    exact: bool
    faults: str

    @property
    def good(self) -> bool:
        """Whether this end ended as it must, and the run is whole."""
        ended = self.seconds_to_end <= END_WITHIN and self.exit_code not in (0, -9)
        return ended and bool(self.cause) and not (self.lost or self.doubled or self.faults)


COLUMNS = tuple(Line.__dataclass_fields__)


class FailedError(Exception):
    """The program did what it must not."""


def start(network: Network, args: Sequence[str], log: Path) -> Start:
    """Start the program, one rank on each host."""
    prefixes = [network.prefix(host) for host in (0, 1)]
    address = {"MASTER_ADDR": network.addresses[0], "MASTER_PORT": str(free_port())}
    return Start(args, 2, False, log, prefixes, address)


def run_through(network: Network, args: Sequence[str], log: Path) -> None:
    """Run the program to its end. Raises FailedError unless it ends well."""
    with start(network, args, log) as started:
        if started.wait(PATIENCE) is None or any(started.codes()):
            raise FailedError(f"{log.name}: ended with {started.codes()}\n{started.output()}")


def cut_once(network: Network, started: Start, phases: Phases, fault: str) -> tuple[int, list[float]]:
    """Cut the link in the middle; returns the rows written by then and the seconds until each end ended."""
    begin = time.monotonic()
    while (rows := phases.num_written()) < CUT_AFTER:
        if not started.alive() or time.monotonic() - begin > PATIENCE:
            raise FailedError(f"did not come to the probe: {started.codes()}\n{started.output()}")
        time.sleep(POLL)
    network.cut(fault)
    cut, seconds = time.monotonic(), [float("inf")] * 2
    while started.alive() and time.monotonic() - cut < 2 * END_WITHIN:
        for rank, process in enumerate(started.processes):
            if process.poll() is not None:
                seconds[rank] = min(seconds[rank], time.monotonic() - cut)
        time.sleep(POLL)
    return rows, [min(value, time.monotonic() - cut) for value in seconds]


def fault_run(network: Network, folder: Path, mode: str, fault: str) -> list[Line]:
    """A run that is cut, and started again when the link is back."""
    (stage, options), name = MODES[mode], f"{mode}-{fault.replace(' ', '-')}"
    run, log = folder / name, folder / "starts" / name
    args = arguments(folder, run, stage, **options)
    phases = Phases(run, NUM_ROWS - len(UNUSABLE))
    with start(network, args, log) as started:
        rows, seconds = cut_once(network, started, phases, fault)
    network.restore()
    codes, causes = started.codes(), [_cause(log, rank) for rank in (0, 1)]
    run_through(network, args, log.with_name(f"{name}-again"))
    outcome: Outcome = check_run(run, folder / f"reference-{mode}", NUM_ROWS)
    return [
        Line(
            *(mode, stage, fault, rank, rows, seconds[rank], int(codes[rank] or 0), causes[rank]),
            *(outcome.lost, outcome.doubled, outcome.exact, "; ".join(outcome.faults)),
        )
        for rank in (0, 1)
    ]


def _cause(log: Path, rank: int) -> str:
    """The only line in which a rank says why the run ended; nothing if there is none, or more."""
    text = log.with_name(f"{log.name}-{rank}.log").read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.startswith("grads-dist: error:")]
    return lines[0].removeprefix("grads-dist: error: ") if len(lines) == 1 else ""


def run_all(folder: Path, modes: Sequence[str], faults: Sequence[str]) -> list[Line]:
    """All of the faults in each of the modes."""
    make_workspace(folder, NUM_ROWS)
    lines = []
    with make_network() as network:
        if not network.joined():
            raise FailedError("the hosts do not reach each other, though nothing is cut")
        for mode in modes:
            (stage, options), name = MODES[mode], f"reference-{mode}"
            args = arguments(folder, folder / name, stage, **options)
            run_through(network, args, folder / "starts" / name)
            for fault in faults:
                found = fault_run(network, folder, mode, fault)
                lines += found
                print(*map(_tell, found), sep="\n", flush=True)
    return lines


def _tell(line: Line) -> str:
    return (
        f"{line.mode}, {line.fault} after {line.rows_before} rows: rank {line.rank} ended with "
        f"{line.exit_code} in {line.seconds_to_end:.0f} s: {line.cause}"
    )


def main() -> int:
    """Cut, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="keep the runs and what they wrote here; else removed")
    parser.add_argument(
        "--out", type=Path, help="folder of the CSV; default: benchmarks/results, none in smoke"
    )
    parser.add_argument("--smoke", action="store_true", help="one cut, to see that it works")
    options = parser.parse_args()
    some = 1 if options.smoke else None
    reason = why_not()
    if reason is not None:
        print(f"network fault test: skipped: {reason}")
        return 0
    told = provenance(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lines = run_all(folder, [*MODES][:some], FAULTS[:some])
        except FailedError as error:
            print(f"{error}\nnetwork fault test: FAIL")
            return 1
        out = results_folder(options.out, options.smoke, Path(temporary))
        rows = [{**asdict(line), **told} for line in lines]
        write_csv(out / "network_fault.csv", [*COLUMNS, *told], rows)
    good = all(line.good for line in lines)
    faults = [f"{line.mode}, {line.fault}: {line.faults}" for line in lines if line.faults]
    longest = max(line.seconds_to_end for line in lines)
    print(*dict.fromkeys(faults), sep="\n")
    print(
        f"network fault test: {'pass' if good else 'FAIL'}: {len(lines) // 2} cuts, both ends gone within "
        f"{longest:.0f} s; {sum(x.lost for x in lines)} rows lost, {sum(x.doubled for x in lines)} doubled"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
