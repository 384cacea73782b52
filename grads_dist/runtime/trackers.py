"""Experiment trackers that rank 0 reports to, if asked: TensorBoard, Weights & Biases, Trackio.

None is imported unless it is named. A tracker that fails while the run goes on is left out with a warning:
what it shows stands in the metrics files, too.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from grads_dist.errors import ConfigError

log = logging.getLogger(__name__)

TrackerName = Literal["wandb", "tensorboard", "trackio"]
PROJECT = "grads_dist"
"""Project of wandb and trackio, unless WANDB_PROJECT or TRACKIO_PROJECT is set."""


class Tracker(Protocol):
    """What is reported to."""

    def log(self, record: Mapping[str, float], step: int) -> None:
        """Take in numbers; `step` is their place on the axis and may begin anew with another pass."""
        ...

    def close(self) -> None:
        """Finish and flush."""
        ...


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Raise ConfigError unless every tracker is installed; imports none of them."""
    for name in names:
        spec = importlib.util.find_spec(name)
        # Without an origin it is a folder of that name, such as wandb leaves in the folder that it ran in.
        if spec is None or spec.origin is None:
            raise ConfigError(f"report_to: {name!r} is not installed; allowed: after `pip install {name}`")


class Trackers:
    """The trackers of a run, each until it fails."""

    def __init__(self, opened: Mapping[str, tuple[Tracker, _Failures]]) -> None:
        self._opened = dict(opened)

    @property
    def names(self) -> list[str]:
        """Those that are still reported to."""
        return list(self._opened)

    def log(self, record: Mapping[str, float], step: int) -> None:
        """Report numbers to all of them."""
        for name in self.names:
            self._try(name, lambda tracker: tracker.log(record, step))

    def close(self) -> None:
        """Finish all of them."""
        for name in self.names:
            self._try(name, lambda tracker: tracker.close())
        self._opened.clear()

    def _try(self, name: str, action: Callable[[Tracker], None]) -> None:
        tracker, failures = self._opened[name]
        try:
            action(tracker)
        except failures as error:
            _warn(name, error)
            del self._opened[name]


def open_trackers(
    names: Sequence[TrackerName], config: Mapping[str, Any], folder: Path, run_name: str
) -> Trackers:
    """Start the trackers, on rank 0 alone.

    Args:
        names: which.
        config: the run's configuration, shown beside its numbers.
        folder: of the run's logs; the files of TensorBoard and wandb go there.
        run_name: what the run is called.

    Raises:
        ConfigError: one is not installed, cannot be imported, or asks for a key.
    """
    check_trackers(names)
    opened: dict[str, tuple[Tracker, _Failures]] = {}
    for name in dict.fromkeys(names):
        kind = _KINDS[name]
        try:
            module = importlib.import_module(kind.module)
        except ImportError as error:
            raise ConfigError(f"report_to: {name!r} cannot be imported ({error})") from error
        failures = kind.failures(module)
        try:
            opened[name] = (kind.start(module, config, folder, run_name), failures)
        except failures as error:
            _warn(name, error)
    return Trackers(opened)


_Failures = tuple[type[Exception], ...]


@dataclass(frozen=True)
class _Kind:
    module: str
    start: Callable[[Any, Mapping[str, Any], Path, str], Tracker]
    failures: Callable[[Any], _Failures]
    """What it raises where the network, the disk or its server is to blame."""


class _TensorBoard:
    def __init__(self, module: Any, config: Mapping[str, Any], folder: Path, run_name: str) -> None:
        self._writer = module.SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in _flat(config)))

    def log(self, record: Mapping[str, float], step: int) -> None:
        for key, value in record.items():
            self._writer.add_scalar(key, value, step)
        # It would be seen two minutes later, and not at all of a run that is killed.
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, module: Any, config: Mapping[str, Any], folder: Path, run_name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        # Its copy of the console would wrap this process's output; the logs are files of the run already.
        settings = module.Settings(console="off")
        try:
            self._run = module.init(
                project=project, name=run_name, config=dict(config), dir=str(folder), settings=settings
            )
        except module.errors.UsageError as error:
            fault = " ".join(str(error).split())
            raise ConfigError(
                f"report_to: 'wandb' cannot start ({fault}); or set WANDB_MODE=offline"
            ) from error
        # Its own step only grows, while passes begin at 0.
        self._run.define_metric("*", step_metric="step")

    def log(self, record: Mapping[str, float], step: int) -> None:
        self._run.log({**record, "step": step})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, module: Any, config: Mapping[str, Any], folder: Path, run_name: str) -> None:
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        # It prints; standard output is that of the command.
        with contextlib.redirect_stdout(sys.stderr):
            self._run = module.init(project=project, name=run_name, config=dict(config), embed=False)
        self._finish = module.finish

    def log(self, record: Mapping[str, float], step: int) -> None:
        self._run.log(dict(record), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._finish()


def _trackio_failures(_: Any) -> _Failures:
    import sqlite3

    return (OSError, RuntimeError, sqlite3.Error)


_KINDS: dict[TrackerName, _Kind] = {
    "tensorboard": _Kind("torch.utils.tensorboard", _TensorBoard, lambda _: (OSError,)),
    "wandb": _Kind("wandb", _Wandb, lambda module: (module.Error, OSError)),
    "trackio": _Kind("trackio", _Trackio, _trackio_failures),
}


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _warn(name: str, error: Exception) -> None:
    fault = " ".join(str(error).split()) or type(error).__name__
    log.warning("report_to: %s failed and gets no more numbers (%s)", name, fault)
