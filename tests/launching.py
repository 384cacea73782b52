"""Running the shipped launch scripts as a user does, and getting the programs that they need."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment

LAUNCH = ROOT / "launch"
TIMEOUT = 300
REQUIRED = "GRADS_DIST_REQUIRE_LAUNCHERS"
"""If this variable is 1, as in CI, a launcher that cannot be had fails its tests instead of skipping them."""


@dataclass(frozen=True)
class Finished:
    """What a launch wrote, both streams together, and its exit code."""

    code: int
    output: str


def launch_environment(**variables: str) -> dict[str, str]:
    """The environment of a launch: this interpreter's programs first, launcher variables unset."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"])
    return clean_environment(PATH=path, DS_ACCELERATOR="cpu") | variables


def run_all(commands: Sequence[Sequence[str]], folder: Path, env: dict[str, str]) -> list[Finished]:
    """Run commands side by side in `folder`; all that is left of them is ended when time is up."""
    with _started(commands, folder, env) as processes:
        outputs = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
    return [Finished(p.returncode, out) for p, out in zip(processes, outputs, strict=True)]


def run_script(name: str, args: Sequence[str], folder: Path, env: dict[str, str]) -> Finished:
    """Run one of the launch scripts in `folder`."""
    return run_all([[str(LAUNCH / name), *args]], folder, env)[0]


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end(process: subprocess.Popen[str], number: signal.Signals, patience: float = 15) -> None:
    """Signal a process, and kill its whole group if it is there still after `patience` seconds."""
    if process.poll() is not None:
        return
    process.send_signal(number)
    try:
        process.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def require_programs(programs: Sequence[str], packages: Sequence[str]) -> None:
    """Have `programs`, from Debian `packages` if need be and this process may install; else skip or fail."""
    missing = _missing(programs)
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        _install(packages)
        missing = _missing(programs)
    if missing:
        reason = f"no {', '.join(missing)}: install {' '.join(packages)}, or run as root where apt-get is"
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(reason)
        pytest.skip(reason)


def _missing(programs: Sequence[str]) -> list[str]:
    path = launch_environment()["PATH"]
    return [program for program in programs if shutil.which(program, path=path) is None]


def _install(packages: Sequence[str]) -> None:
    """Install from what apt knows; its lists are fetched only if it does not know the packages."""
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    get = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"]
    install = [*get, "install", "--no-install-recommends", *packages]
    if subprocess.run(install, env=env, capture_output=True).returncode != 0:
        subprocess.run([*get, "update"], env=env, capture_output=True)
        subprocess.run(install, env=env, capture_output=True)


@contextmanager
def _started(
    commands: Sequence[Sequence[str]], folder: Path, env: dict[str, str]
) -> Iterator[list[subprocess.Popen[str]]]:
    processes = [
        subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for command in commands
    ]
    try:
        yield processes
    finally:
        for process in processes:
            end(process, signal.SIGTERM)
