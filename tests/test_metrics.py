"""Metrics files: strict JSON a line, whole after a kill, and never silently unwritten."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from conftest import clean_environment

from grads_dist.errors import DataError, GradsDistError
from grads_dist.runtime import metrics
from grads_dist.runtime.metrics import Metrics, metrics_path, read_metrics


def write(folder: Path, *records: dict, rank: int = 0, append: bool = True) -> Path:
    file = Metrics(folder, rank, append)
    for record in records:
        file.write(record)
    file.close()
    return file.path


def test_a_record_comes_back_with_time_and_rank(tmp_path: Path) -> None:
    path = write(tmp_path / "logs", {"label": "probe", "rows": 3, "loss": 0.1, "step": None}, rank=7)
    assert path == tmp_path / "logs" / "metrics-00007.jsonl" == metrics_path(tmp_path / "logs", 7)
    (record,) = read_metrics(path)
    written = datetime.fromisoformat(record.pop("time"))
    assert written.tzinfo == timezone.utc
    assert abs(datetime.now(timezone.utc) - written) < timedelta(minutes=5)
    assert record == {"rank": 7, "label": "probe", "rows": 3, "loss": 0.1, "step": None}


def test_numbers_that_json_has_not_are_null(tmp_path: Path) -> None:
    path = write(tmp_path, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e308})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    record = json.loads(path.read_bytes(), parse_constant=refuse)
    assert (record["a"], record["b"], record["c"], record["d"]) == (None, None, None, 1e308)


def test_text_is_kept(tmp_path: Path) -> None:
    text = 'Zeile\n"\u2028\x00 🤷'
    assert read_metrics(write(tmp_path, {"label": text}))[0]["label"] == text


def test_append_goes_on_and_its_absence_begins_anew(tmp_path: Path) -> None:
    write(tmp_path, {"k": 0})
    assert [record["k"] for record in read_metrics(write(tmp_path, {"k": 1}, append=True))] == [0, 1]
    assert [record["k"] for record in read_metrics(write(tmp_path, {"k": 2}, append=False))] == [2]


@pytest.mark.parametrize("torn", ['{"time": "2', "{", '{"k": 9}', "x" * 20])
@pytest.mark.parametrize("tail_bytes", [4, 1 << 16])
def test_a_torn_last_line_is_left_out_and_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: str, tail_bytes: int
) -> None:
    monkeypatch.setattr(metrics, "_TAIL_BYTES", tail_bytes)
    path = write(tmp_path, {"k": 0}, {"k": 1})
    with path.open("a") as file:
        file.write(torn)
    assert [record["k"] for record in read_metrics(path)] == [0, 1]
    write(tmp_path, {"k": 2})
    assert [record["k"] for record in read_metrics(path)] == [0, 1, 2]


def test_a_file_of_a_torn_line_alone(tmp_path: Path) -> None:
    metrics_path(tmp_path, 0).write_text('{"k"')
    assert read_metrics(metrics_path(tmp_path, 0)) == []
    assert [record["k"] for record in read_metrics(write(tmp_path, {"k": 1}))] == [1]


@pytest.mark.parametrize("line", ["nonsense", "[1]"])
def test_a_broken_line_inside_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, {"k": 0})
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match="line 2 of .*metrics-00000.jsonl"):
        read_metrics(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_metrics(tmp_path / "metrics-00000.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, which is a disk that is full")
def test_a_full_disk_is_not_masked(tmp_path: Path) -> None:
    metrics_path(tmp_path, 0).symlink_to("/dev/full")
    file = Metrics(tmp_path, 0, append=True)
    with pytest.raises(GradsDistError, match="cannot be written .No space left on device."):
        file.write({"k": 0})
    file.close()


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("")
    with pytest.raises(GradsDistError, match="metrics: .* cannot be written"):
        Metrics(tmp_path / "logs", 0, append=True)


def test_what_was_written_before_a_kill_is_there(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, pathlib\n"
        "from grads_dist.runtime.metrics import Metrics\n"
        "file = Metrics(pathlib.Path(sys.argv[1]), 0, True)\n"
        "file.write({'k': 0}); file.write({'k': 1})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=clean_environment(), timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert [record["k"] for record in read_metrics(metrics_path(tmp_path, 0))] == [0, 1]


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_some = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write_some(file, bytes(data[:5])))
    assert read_metrics(write(tmp_path, {"label": "x" * 50}))[0]["label"] == "x" * 50
