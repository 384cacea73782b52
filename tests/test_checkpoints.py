"""Checkpoints are whole or absent, and hold numbers: nothing that they say is run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from grads_dist.errors import ConfigError, GradsDistError
from grads_dist.probe.checkpoints import Checkpoints, Position, check_world_size, last_position


class Attack:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self._path), "w"))


class Engine:
    """Loads as DeepSpeed's does, by its checkpoint engine."""

    def __init__(self) -> None:
        config = SimpleNamespace(
            checkpoint_config={"use_node_local_storage": False, "checkpoint_serialization": True}
        )
        self.checkpoint_engine = TorchCheckpointEngine(config)
        self.skipped_steps = 0

    def load_checkpoint(self, folder: str, tag: str, **_: object) -> tuple[str, dict]:
        path = Path(folder) / tag / "state.pt"
        return str(path), self.checkpoint_engine.load(str(path), map_location="cpu")


def checkpoints(folder: Path) -> Checkpoints:
    session: Any = SimpleNamespace(engine=Engine(), restore_skipped=lambda total: None)
    return Checkpoints(session, folder, every=None)


def write(folder: Path, step: int, content: bytes | object) -> Position:
    position = Position(step, 0, 1)
    path = folder / f"step{step:08d}"
    path.mkdir(parents=True)
    (path / "position.json").write_text(json.dumps({"step": step, "skipped": 0, "world_size": 1}))
    if isinstance(content, bytes):
        (path / "state.pt").write_bytes(content)
    else:
        torch.save(content, path / "state.pt")
    return position


def test_numbers_are_loaded(tmp_path):
    position = write(tmp_path, 3, {"weights": torch.ones(3), "step": 3, "names": ["a"]})
    checkpoints(tmp_path).load(position)


def test_code_is_not_run(tmp_path):
    position = write(tmp_path, 3, {"weights": Attack(tmp_path / "ran")})
    with pytest.raises(GradsDistError, match="step00000003: cannot be loaded"):
        checkpoints(tmp_path).load(position)
    assert not (tmp_path / "ran").exists()
    # The payload works where it is let.
    torch.load(tmp_path / "step00000003" / "state.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_one_line(tmp_path, content):
    position = write(tmp_path, 3, content)
    with pytest.raises(GradsDistError, match="cannot be loaded .*; remove it to start the epoch anew"):
        checkpoints(tmp_path).load(position)


def test_the_last_whole_one_counts(tmp_path):
    assert last_position(tmp_path) is None
    assert last_position(tmp_path / "gone") is None
    for step in (5, 20):
        write(tmp_path, step, {})
    (tmp_path / ".tmp-step00000030").mkdir()
    (tmp_path / "stepping").mkdir()
    assert last_position(tmp_path) == Position(20, 0, 1)
    (tmp_path / "step00000020" / "position.json").write_text("{}")
    with pytest.raises(GradsDistError, match="position.json: cannot be read"):
        last_position(tmp_path)


def test_as_many_ranks_as_wrote_it():
    check_world_size(Position(5, 0, 2), 2)
    with pytest.raises(ConfigError, match="ranks: 3 are running, but the checkpoint after step 5 is of 2"):
        check_world_size(Position(5, 0, 2), 3)


def test_when_one_is_due(tmp_path, monkeypatch):
    every = Checkpoints(SimpleNamespace(engine=None), tmp_path, every=4)  # type: ignore[arg-type]
    assert [step for step in range(1, 13) if every.due(step)] == [4, 8, 12]
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    by_time = Checkpoints(SimpleNamespace(engine=None), tmp_path, every=None)  # type: ignore[arg-type]
    assert not by_time.due(1)
    now[0] += 301
    assert by_time.due(2)
    by_time._took = 60.0
    assert not by_time.due(3)
    now[0] += 300
    assert by_time.due(4)
    assert os.listdir(tmp_path) == []
