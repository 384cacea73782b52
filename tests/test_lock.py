"""The lock of a run directory. As a script, this file is a process that takes one."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from conftest import clean_environment

from grads_dist.errors import ConfigError, GradsDistError
from grads_dist.runtime import lock
from grads_dist.runtime.lock import Owner, RunLock
from grads_dist.runtime.rundir import LOCK, RunDir


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "PATIENCE", 0.8)
    monkeypatch.setattr(lock, "LOOK", 0.1)


def _start(folder, *args):
    """A process that tells in one line whether it has the lock, and keeps it until its input ends."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(folder), *args],
        env=clean_environment(SLURM_JOB_ID="77"),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    return process


def _end(process):
    process.stdin.close()
    process.wait(timeout=30)
    process.stdout.close()


def _forge(folder, **changes):
    """The lock of another owner, as it was written."""
    owner = replace(Owner.this_process(), **changes)
    made = folder / "made"
    made.write_bytes(owner.dump())
    made.replace(folder / LOCK)
    return owner


def _read(folder):
    return json.loads((folder / LOCK).read_text())


def test_a_live_owner_is_named_and_what_is_released_is_free(tmp_path):
    process = _start(tmp_path)
    assert process.stdout.readline() == "locked\n"
    told = (
        rf"output_dir: '{tmp_path}' is being written by pid {process.pid} on host \S+ \(slurm job 77\) "
        r"since 20\d\d-\S+; allowed: wait for it, or another folder$"
    )
    with pytest.raises(ConfigError, match=told):
        RunLock.acquire(tmp_path)
    with pytest.raises(ConfigError, match="is being written"):
        RunLock.acquire(tmp_path)
    _end(process)
    assert list(tmp_path.iterdir()) == []
    RunLock.acquire(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_dead_owner_on_this_host_is_replaced_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 1000.0)
    process = _start(tmp_path)
    assert process.stdout.readline() == "locked\n"
    os.kill(process.pid, signal.SIGKILL)
    # Not waited for: the process is a zombie.
    while _state(process.pid) != "Z":
        time.sleep(0.01)
    held = RunLock.acquire(tmp_path)
    assert _read(tmp_path)["pid"] == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    held.release()
    _end(process)


def test_a_process_that_got_the_number_of_the_owner_is_not_the_owner(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 1000.0)
    _forge(tmp_path, started=1)
    RunLock.acquire(tmp_path).release()
    process = subprocess.Popen(["true"])
    process.wait()
    _forge(tmp_path, pid=process.pid)
    RunLock.acquire(tmp_path).release()


@pytest.mark.parametrize("elsewhere", [{"boot": "another"}, {"namespace": "pid:[1]"}])
def test_an_owner_on_another_host_is_watched(tmp_path, caplog, elsewhere):
    caplog.set_level("INFO", "grads_dist")
    _forge(tmp_path, host="n9", **elsewhere)
    held = RunLock.acquire(tmp_path)
    assert "waiting to see whether n9 still writes" in caplog.text
    assert _read(tmp_path)["token"] != "" and _read(tmp_path)["host"] != "n9"
    held.release()


def test_an_owner_on_another_host_that_shows_life_keeps_the_lock(tmp_path):
    owner = _forge(tmp_path, host="n9", boot="another")
    timer = threading.Timer(0.3, lambda: (tmp_path / LOCK).write_bytes(replace(owner, beat=1).dump()))
    timer.start()
    with pytest.raises(ConfigError, match=rf"is being written by pid {owner.pid} on host n9 since"):
        RunLock.acquire(tmp_path)
    timer.join()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[]", b'{"pid": 1}'])
def test_a_damaged_lock_is_watched_and_replaced(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    held = RunLock.acquire(tmp_path)
    assert _read(tmp_path)["pid"] == os.getpid()
    held.release()
    assert list(tmp_path.iterdir()) == []


def test_the_owner_shows_life_and_notices_that_it_lost_the_lock(tmp_path):
    held = RunLock.acquire(tmp_path)
    before = _read(tmp_path)
    _until(lambda: _read(tmp_path)["beat"] > 11)
    assert _read(tmp_path) | {"beat": 0} == before and not held.lost
    stolen = _forge(tmp_path, token="other")
    _until(lambda: held.lost)
    with pytest.raises(GradsDistError, match="was taken over by another run"):
        held.check()
    time.sleep(0.3)
    held.release()
    # Neither renewed nor removed by the one that lost it.
    assert _read(tmp_path) == json.loads(stolen.dump())


def test_a_lock_that_was_removed_is_lost(tmp_path):
    held = RunLock.acquire(tmp_path)
    (tmp_path / LOCK).unlink()
    _until(lambda: held.lost)
    held.release()


@pytest.mark.parametrize("stale", [{"started": 1}, {"boot": "another"}])
def test_of_several_starters_one_takes_over(tmp_path, stale):
    _forge(tmp_path, **stale)
    processes = [_start(tmp_path) for _ in range(4)]
    told = [process.stdout.readline() for process in processes]
    assert sorted(line.split()[0] for line in told) == ["locked", *["output_dir:"] * 3], told
    winner = processes[[line.split()[0] for line in told].index("locked")]
    assert _read(tmp_path)["pid"] == winner.pid
    assert all(
        re.search(rf"is being written by pid {winner.pid} ", line) for line in told if line != "locked\n"
    )
    for process in processes:
        _end(process)
    assert list(tmp_path.iterdir()) == []


def test_a_starter_that_died_while_taking_over_blocks_nobody(tmp_path):
    stale = _forge(tmp_path, started=1)
    (tmp_path / f"{LOCK}.after-{stale.token}").touch()
    RunLock.acquire(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(
        ConfigError, match=r"output_dir: '.*gone' cannot be locked \(No such file or directory\)"
    ):
        RunLock.acquire(tmp_path / "gone")


def test_a_lock_is_no_result_and_stays_when_a_run_is_replaced(tmp_path):
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    held = RunLock.acquire(run.root)
    run.create(overwrite=False)
    run.manifest.write_text("{}")
    run.create(overwrite=True)
    assert run.lock.is_file() and not run.manifest.exists()
    held.release()


def _state(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def _until(holds):
    for _ in range(1000):
        if holds():
            return
        time.sleep(0.01)
    pytest.fail("it did not come to that")


def _main(folder):
    from pathlib import Path

    lock.BEAT, lock.PATIENCE, lock.LOOK = 0.1, 0.8, 0.1
    try:
        held = RunLock.acquire(Path(folder))
    except ConfigError as error:
        print(error, flush=True)
        return
    print("locked", flush=True)
    sys.stdin.read()
    held.release()


if __name__ == "__main__":
    _main(sys.argv[1])
