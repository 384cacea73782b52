"""torchrun starts ranks again, which go on where those before them were killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from launching import end, free_port, launch_environment
from score_tables import faults_between, numels, read_scores
from workspace import probe_alone, run_arguments

NUM_ROWS = 600
"""Of a run that can be stopped in its middle: some seconds."""
BOUND = 32 * float(np.finfo(np.float32).eps)
"""As in test_launchers.py."""
TIMEOUT = 300
OVERWRITE = ["--overwrite"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a corpus, and `single`, the run of one rank alone."""
    folder = tmp_path_factory.mktemp("restarts")
    return probe_alone(folder, NUM_ROWS, arguments(folder, "single"))


def arguments(folder: Path, output: str, *flags: str) -> list[str]:
    # One row a micro-batch, so that there is a middle.
    options = {"probe__mode": "frozen", "probe__batch_tokens": 1}
    return ["probe", *flags, *run_arguments(folder, output, **options)]


@contextmanager
def agents(folder: Path, name: str, options: list[list[str]], args: list[str]) -> Iterator[list]:
    """An agent of torchrun for each of `options`, whose ranks write to `name`-NUMBER.log."""
    with ExitStack() as stack:
        started = []
        for number, more in enumerate(options):
            log = stack.enter_context((folder / f"{name}-{number}.log").open("w"))
            command = [sys.executable, "-m", "torch.distributed.run", *more, "-m", "grads_dist", *args]
            process = subprocess.Popen(
                command, env=launch_environment(), stdout=log, stderr=log, text=True, start_new_session=True
            )
            stack.callback(end, process, signal.SIGTERM)
            started.append(process)
        yield started


def rank_of(agent: subprocess.Popen, rank: int) -> int | None:
    """The process of a rank among the children of an agent."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            variables = (stat.parent / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == agent.pid and f"RANK={rank}".encode() in variables:
            return int(stat.parent.name)
    return None


def wait_until(holds: Callable[[], bool], processes: list[subprocess.Popen]) -> None:
    until = time.monotonic() + TIMEOUT
    while not holds():
        assert time.monotonic() < until
        assert all(process.poll() is None for process in processes), "ended too early"
        time.sleep(0.02)


def kill_in_the_middle(run: Path, rank: int, started: list[subprocess.Popen]) -> dict[Path, int]:
    """Kill a rank once a shard is there; the shards of that moment with their times."""
    scores = run / "scores"
    wait_until(lambda: any(scores.glob("shard-*")), started)
    (victim,) = filter(None, (rank_of(agent, rank) for agent in started))
    os.kill(victim, signal.SIGKILL)
    shards = {path: path.stat().st_mtime_ns for path in scores.glob("shard-*")}
    assert not (run / "manifest.json").exists()
    return shards


def check(folder: Path, name: str, before: dict[Path, int]) -> None:
    """The run went on from the shards of before, and its table is that of one rank."""
    assert {path: path.stat().st_mtime_ns for path in before} == before
    found, truth = read_scores(folder / name), read_scores(folder / "single")
    assert found["index"].to_pylist() == truth["index"].to_pylist() and found.num_rows == NUM_ROWS
    faults = faults_between(found, truth, numels(folder / "single"), BOUND)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(("num_ranks", "rank", "flags"), [(2, 1, []), (1, 0, OVERWRITE)])
def test_a_rank_that_is_killed_is_started_again(folder, num_ranks, rank, flags):
    """With --overwrite the second start goes on, too: it means what was there before the first."""
    name = f"killed-{rank}-of-{num_ranks}"
    options = ["--standalone", "--nproc-per-node", str(num_ranks), "--max-restarts", "1"]
    with agents(folder, name, [options], arguments(folder, name, *flags)) as started:
        before = kill_in_the_middle(folder / name, rank, started)
        code = started[0].wait(TIMEOUT)
    log = (folder / f"{name}-0.log").read_text()
    assert code == 0, log
    assert "probed 600 rows" in log, log
    if rank == 0:
        assert re.search(r"the run of pid \d+ on host .+ is dead; taking over", log), log
    check(folder, name, before)


def test_an_agent_whose_ranks_were_well_counts_no_restart(folder):
    """So the two nodes disagree on how often the ranks were started."""
    endpoint = f"127.0.0.1:{free_port()}"
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2", "--rdzv-backend", "c10d"]
    options += ["--rdzv-id", "test", "--rdzv-endpoint", endpoint]
    with agents(folder, "agents", [options, options], arguments(folder, "agents")) as started:
        before = kill_in_the_middle(folder / "agents", 1, started)
        codes = [process.wait(TIMEOUT) for process in started]
    logs = [(folder / f"agents-{number}.log").read_text() for number in (0, 1)]
    assert codes == [0, 0], "\n".join(logs)
    check(folder, "agents", before)
