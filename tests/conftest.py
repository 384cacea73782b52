"""What several test modules share: running the program as a user does, alone or as several ranks."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = 300

# Two cores: more threads a process only make the ranks wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def clean_environment(**variables: str) -> dict[str, str]:
    """The environment without what an earlier process group left in it, and with the checkout to import."""
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return env | variables


@pytest.fixture(autouse=True)
def process_group_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed keeps the process group that it first saw: what a test starts in this process must stay."""
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m grads_dist ARGS...` in the test's folder."""

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "grads_dist", *args]
        return subprocess.run(
            command, cwd=tmp_path, env=clean_environment(), text=True, capture_output=True, timeout=TIMEOUT
        )

    return run


@pytest.fixture
def torchrun() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script as `num_ranks` ranks under torchrun."""

    def run(num_ranks: int, script: Path, *args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(num_ranks), str(script), *args]
        return subprocess.run(
            command, env=clean_environment(), text=True, capture_output=True, timeout=TIMEOUT
        )

    return run


@pytest.fixture
def bare_ranks() -> Callable[[int, Sequence[str]], list[tuple[int, str, str]]]:
    """Runs a command as ranks that no launcher watches; gives (exit code, stdout, stderr) of each.

    Without a launcher nobody ends a rank that waits for ever, so a hang shows as a timeout.
    """

    def run(num_ranks: int, command: Sequence[str]) -> list[tuple[int, str, str]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes = [
            subprocess.Popen(
                command,
                env=clean_environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for rank in range(num_ranks)
        ]
        try:
            outputs = [process.communicate(timeout=TIMEOUT) for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [(p.returncode, out, err) for p, (out, err) in zip(processes, outputs, strict=True)]

    return run
