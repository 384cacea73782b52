"""Starts of the program as several ranks, watched from outside, over a small model and a corpus."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from conftest import clean_environment  # noqa: E402  -- the package and the tests need not be installed
from workspace import make_model, make_rows, run_arguments, write_jsonl, write_stage  # noqa: E402

NUM_ROWS = 300
UNUSABLE = (7, 150, 299)
"""Rows without an answer, which are rejected."""

POLL = 0.005
"""Seconds between two looks at the processes."""


def make_workspace(folder: Path, num_rows: int = NUM_ROWS, **model: int) -> None:
    """Write a small random model, slow enough to be caught at its work, and a corpus of which a few rows are
    unusable."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, **model}
    make_model(folder / "model", **shape)
    rows = make_rows(num_rows)
    for row in UNUSABLE:
        if row < num_rows:
            rows[row] = {"id": f"row{row}", "messages": rows[row]["messages"][:1]}
    write_jsonl(folder / "corpus.jsonl", rows)


def arguments(folder: Path, output: Path, stage: int, **options: object) -> list[str]:
    """Arguments of `run` over a workspace; a run has a cache of its own beside it."""
    shared = {
        "deepspeed": write_stage(folder, stage),
        "data__cache_dir": output.with_name(f"{output.name}-cache"),
        "probe__shard_rows": 8,
        # Under ZeRO-3 a pass takes long.
        "probe__batch_tokens": 192 if stage == 3 else 96,
        "selection__fraction": 0.3,
    }
    return ["run", *run_arguments(folder, output.name, **{**shared, **options}), "--output_dir", str(output)]


def environment(**variables: str) -> dict[str, str]:
    """The environment of a rank."""
    return clean_environment(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", **variables)


def results_folder(wanted: Path | None, smoke: bool, temporary: Path) -> Path:
    """Where a CSV goes: what smoke measures means nothing, and is not kept unless it is asked for."""
    return wanted or (temporary if smoke else ROOT / "benchmarks" / "results")


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Start:
    """One start of the program as `num_ranks` ranks: under torchrun, or bare.

    Then nobody ends a rank that waits for a dead one. As a context, it leaves no process behind.
    """

    args: Sequence[str]
    num_ranks: int
    torchrun: bool
    log: Path
    """Beginning of the names of the files that stdout and stderr go to, one a process."""
    prefixes: Sequence[Sequence[str]] = ()
    """What stands before the command of each rank."""
    variables: Mapping[str, str] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _seen: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        program = ["-m", "grads_dist", *self.args]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if self.torchrun:
            launcher = [
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(self.num_ranks),
            ]
            self._start([sys.executable, *launcher, *program], environment(**self.variables))
            return
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **self.variables}
        for rank in range(self.num_ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.num_ranks), **shared}
            command = [*(self.prefixes[rank] if self.prefixes else ()), sys.executable, *program]
            self._start(command, environment(**own) if self.num_ranks > 1 else environment(**self.variables))

    def __enter__(self) -> Start:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _start(self, command: list[str], env: dict[str, str]) -> None:
        with self._path(len(self.processes)).open("wb") as file:
            started = subprocess.Popen(
                command, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.processes.append(started)

    def _path(self, number: int) -> Path:
        return self.log.with_name(f"{self.log.name}-{number}.log")

    def ranks(self) -> list[int]:
        """Process numbers of the ranks that are there."""
        if not self.torchrun:
            return [p.pid for p in self.processes if p.poll() is None]
        children = _children(self.processes[0].pid)
        self._seen |= {pid: birth for pid, birth in children.items() if pid not in self._seen}
        return [pid for pid, birth in self._seen.items() if _birth(pid) == birth]

    def alive(self) -> list[int]:
        """Process numbers of ranks and launcher that are there."""
        return sorted({*self.ranks(), *(p.pid for p in self.processes if p.poll() is None)})

    def wait(self, seconds: float) -> float | None:
        """Wait until no process is left; returns the seconds that took, None if it takes longer."""
        begin = time.monotonic()
        while self.alive():
            if time.monotonic() - begin > seconds:
                return None
            time.sleep(POLL)
        return time.monotonic() - begin

    def codes(self) -> list[int | None]:
        """Exit codes of the processes that were started here."""
        return [process.poll() for process in self.processes]

    def output(self) -> str:
        """What all processes wrote."""
        return "".join(
            f"--- process {k}\n{self._path(k).read_text(encoding='utf-8', errors='replace')}"
            for k in range(len(self.processes))
        )

    def causes(self) -> list[str]:
        """The lines that say why the run ended."""
        return [line for line in self.output().splitlines() if line.startswith("grads-dist: error:")]

    def kill(self) -> None:
        """Kill what is left."""
        for pid in self.alive():
            kill(pid)
        for process in self.processes:
            process.wait()


def kill(pid: int) -> None:
    """SIGKILL, if the process is there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _children(parent: int) -> dict[int, str]:
    """Process numbers of the children of a process, with when each started."""
    found = {}
    for task in Path(f"/proc/{parent}/task").glob("*"):
        try:
            numbers = (task / "children").read_text().split()
        except OSError:
            continue
        for number in map(int, numbers):
            birth = _birth(number)
            if birth is not None:
                found[number] = birth
    return found


def _birth(pid: int) -> str | None:
    """When a process started, in ticks; None where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def describe(path: Path) -> dict[str, object]:
    """A JSON file of a run; nothing where it is not there, or not whole yet."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
