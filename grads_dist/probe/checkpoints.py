"""Checkpoints of the preliminary epoch: DeepSpeed's files, whole or absent, and the place in the plan."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from grads_dist.errors import ConfigError, GradsDistError
from grads_dist.probe.session import Session
from grads_dist.runtime.rundir import atomic_write, sync

log = logging.getLogger(__name__)

SECONDS = 300.0
"""Between two checkpoints where `probe.checkpoint_steps` says nothing."""

_NAME = re.compile(r"step(\d{8})")
_POSITION = "position.json"


@dataclass(frozen=True)
class Position:
    """Where in the preliminary epochs a checkpoint was made."""

    step: int
    """Optimizer steps before it, over all epochs, those among them that were skipped too."""
    skipped: int
    """Steps before it that were skipped."""
    world_size: int


def last_position(folder: Path) -> Position | None:
    """That of the latest checkpoint in a run's `checkpoints` folder; None where there is none.

    Raises GradsDistError for a checkpoint that cannot be read.
    """
    steps = [int(match.group(1)) for path in folder.glob("step*") if (match := _NAME.fullmatch(path.name))]
    if not steps:
        return None
    path = folder / _name(max(steps)) / _POSITION
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Position(int(content["step"]), int(content["skipped"]), int(content["world_size"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GradsDistError(
            f"{path}: cannot be read ({error}); remove the checkpoint's folder to start the epoch anew"
        ) from None


def check_world_size(position: Position, world_size: int) -> None:
    """Raise ConfigError unless as many ranks are running as wrote the checkpoint.

    Each wrote its part of the optimizer's state, which DeepSpeed does not cut anew.
    """
    if position.world_size != world_size:
        raise ConfigError(
            f"ranks: {world_size} are running, but the checkpoint after step {position.step} is of "
            f"{position.world_size}; allowed: {position.world_size}, or --overwrite to start anew"
        )


class Checkpoints:
    """Writes the checkpoints of one run, one at a time, and keeps the last.

    Args:
        session: whose engine's state they are.
        folder: where they go.
        every: steps between two; None: as many as take five minutes.
    """

    def __init__(self, session: Session, folder: Path, every: int | None) -> None:
        self._session, self._folder, self._every = session, folder, every
        self._written, self._took = time.monotonic(), 0.0
        if session.engine is not None:
            session.engine.checkpoint_engine = _safe_engine(session.engine.checkpoint_engine)

    def due(self, step: int) -> bool:
        """Whether one should be made after so many steps; by the clock of this rank, so all must agree."""
        if self._every is not None:
            return step % self._every == 0
        # Where writing takes long, most of the time should still go into steps.
        return time.monotonic() - self._written > max(SECONDS, 10 * self._took)

    def save(self, step: int) -> None:
        """Write one and remove the one before. Collective.

        It appears under its name when all ranks have written their parts and the disk has them.
        """
        ranks, name = self._session.ranks, _name(step)
        if ranks.on_main(lambda: (self._folder / name).exists()):
            return
        began = time.monotonic()
        temporary = self._folder / f".tmp-{name}"
        ranks.on_main(lambda: self._clear(temporary))
        _save(self._session.engine, self._folder, temporary.name)
        ranks.barrier()
        position = Position(step, self._session.num_skipped, ranks.world_size)
        ranks.on_main(lambda: self._publish(temporary, name, position))
        self._written = time.monotonic()
        self._took = self._written - began

    def load(self, position: Position) -> None:
        """Bring the session to where the checkpoint at `position` was made. Collective.

        Raises GradsDistError when the files are not what this version writes, or hold anything but numbers.
        """
        name = _name(position.step)
        try:
            path, _ = self._session.engine.load_checkpoint(
                str(self._folder), tag=name, load_module_strict=False
            )
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:300]
            raise GradsDistError(
                f"{self._folder / name}: cannot be loaded ({reason}); remove it to start the epoch anew"
            ) from error
        if path is None:
            raise GradsDistError(f"{self._folder / name}: holds no checkpoint; remove it")
        self._session.restore_skipped(position.skipped)
        log.info("going on after step %d", position.step)

    def _clear(self, temporary: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)

    def _publish(self, temporary: Path, name: str, position: Position) -> None:
        with atomic_write(temporary / _POSITION) as path:
            path.write_text(json.dumps(asdict(position)) + "\n", encoding="utf-8")
        sync(temporary)
        final = self._folder / name
        os.rename(temporary, final)
        sync(self._folder)
        for path in self._folder.iterdir():
            if path.name != name and (_NAME.fullmatch(path.name) or path.name.startswith(".tmp-")):
                shutil.rmtree(path, ignore_errors=True)
        log.info("checkpoint after step %d: %s", position.step, final)


def remove_checkpoints(folder: Path) -> None:
    """Remove a run's checkpoints, which nothing needs once its table is complete."""
    shutil.rmtree(folder, ignore_errors=True)


def _name(step: int) -> str:
    return f"step{step:08d}"


def _save(engine: Any, folder: Path, tag: str) -> None:
    # Weights that are not trained are where they came from.
    frozen = any(not p.requires_grad for p in engine.module.parameters())
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=frozen)


def _safe_engine(engine: Any) -> Any:
    """DeepSpeed's way to files; what it saves is on disk, and it loads tensors and plain values, no code."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]

    class SafeCheckpointEngine(TorchCheckpointEngine):
        def save(self, state_dict: Any, path: str) -> None:
            super().save(state_dict, path)
            # By the rank that wrote it: others cannot flush what its node holds back.
            sync(Path(path))

        def load(self, path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals(known):
                return torch.load(path, map_location=map_location, weights_only=True)

    if type(engine) is not TorchCheckpointEngine:
        raise ConfigError(
            f"deepspeed: checkpoints by {type(engine).__name__} are not supported; allowed: the default"
        )
    safe = SafeCheckpointEngine()
    safe.zipfile_serialization = engine.zipfile_serialization
    return safe
