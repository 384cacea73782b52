"""A disk that is full, or cannot be written, ends a run in one line, and nothing complete is lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from score_tables import faults_between, numels, read_scores
from workspace import make_model, make_rows, run_arguments, run_program, write_jsonl, write_stage

NUM_ROWS = 300
BOUND = 32 * float(np.finfo(np.float32).eps)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own, whose size `resize` changes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)) != 0:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def mount(*args: str) -> int:
    return subprocess.run(["mount", *args], capture_output=True).returncode


def remount(disk: Path, options: str) -> None:
    assert mount("-o", f"remount,{options}", str(disk)) == 0


def arguments(folder: Path, output: Path, mode: str) -> list[str]:
    options = {
        "probe__mode": mode,
        "deepspeed": write_stage(folder, 2),
        "probe__checkpoint_steps": 5,
        "output_dir": output,
    }
    return ["probe", *run_arguments(folder, "unused", **options)]


@pytest.mark.parametrize("mode", ["frozen", "train"])
def test_a_full_disk(tmp_path, disk, mode):
    make_model(tmp_path / "model")
    write_jsonl(tmp_path / "corpus.jsonl", make_rows(NUM_ROWS))
    whole = run_program(*arguments(tmp_path, tmp_path / "whole", mode))
    assert whole.returncode == 0, whole.stderr
    run = disk / "run"
    full = run_program(*arguments(tmp_path, run, mode))
    assert_one_line(full, "No space left on device")
    left = list((run / "scores").glob("*"))
    before = {path: path.read_bytes() for path in left}
    remount(disk, "size=64m,ro")
    assert_one_line(run_program(*arguments(tmp_path, run, mode)), "Read-only file system", code=2)
    assert {path: path.read_bytes() for path in left} == before
    remount(disk, "size=64m,rw")
    done = run_program(*arguments(tmp_path, run, mode))
    assert done.returncode == 0, done.stderr
    found, truth = read_scores(run), read_scores(tmp_path / "whole")
    assert found["index"].to_pylist() == truth["index"].to_pylist()
    faults = faults_between(found, truth, numels(tmp_path / "whole"), BOUND)
    assert not faults, "\n".join(faults)


def assert_one_line(done: subprocess.CompletedProcess[str], what: str, code: int = 1) -> None:
    lines = [line for line in done.stderr.splitlines() if "error:" in line or "Traceback" in line]
    assert done.returncode == code, done.stderr
    assert len(lines) == 1 and lines[0].startswith("grads-dist: error: ") and what in lines[0], done.stderr
