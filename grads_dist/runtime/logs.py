"""Logging: one file a rank in the run directory, the console for rank 0 and for the others' warnings."""

import contextlib
import datetime
import json
import logging
import os
import sys
from pathlib import Path
from types import TracebackType

from grads_dist.errors import shown
from grads_dist.runtime.rundir import atomic_write

PACKAGE = "grads_dist"
OUTCOME = "GRADS_DIST_OUTCOME"
ERROR = "error.json"
"""File in the folder of the logs: why a run ended before it was done."""


def start_console(rank: int) -> None:
    """Send the package's messages to stderr: all of rank 0, of the others warnings as `[rank k] ...`."""
    package = logging.getLogger(PACKAGE)
    package.setLevel(logging.INFO)
    for handler in [h for h in package.handlers if not isinstance(h, logging.FileHandler)]:
        package.removeHandler(handler)
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    console.setFormatter(_ConsoleFormatter(rank))
    package.addHandler(console)
    package.propagate = True


def log_to_file(folder: Path, rank: int, append: bool = False) -> Path:
    """Also write every message, other libraries' too, to `folder`/rank-<rank>.log; returns that path.

    A run that goes on appends to the file of its start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{rank:05d}.log"
    stop_file()
    handler = _RankFile(path, mode="a" if append else "w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    # On the root logger, so that a warning of torch or DeepSpeed is found beside ours.
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    return path


def log_path() -> Path | None:
    """The log file of this rank, if there is one yet."""
    return next((Path(h.baseFilename) for h in _files()), None)


def record_failure(error: BaseException) -> None:
    """Write the traceback of `error` to this rank's log file, and there only."""
    for handler in _files():
        record = logging.LogRecord(PACKAGE, logging.ERROR, __file__, 0, "failed", None, _exc_info(error))
        handler.handle(record)
        handler.flush()


def record_cause(rank: int, code: int, message: str) -> None:
    """Write why the run ends beside this rank's log file, if there is one; for the rank that reports it.

    The exit code alone goes to the file that GRADS_DIST_OUTCOME names: launchers may end with another.

    Args:
        rank: the rank at fault.
        code: exit code.
    """
    outcome = os.environ.get(OUTCOME)
    if outcome:
        with contextlib.suppress(OSError), atomic_write(Path(outcome)) as temporary:
            temporary.write_text(f"{code}\n", encoding="ascii")
    path = log_path()
    if path is None:
        return
    time = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    content = {"time": time, "rank": rank, "code": code, "message": message}
    # A disk that is full, or gone, may be what ends the run.
    with contextlib.suppress(OSError), atomic_write(path.parent / ERROR) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def stop_file() -> None:
    """Close this rank's log file."""
    for handler in _files():
        logging.getLogger().removeHandler(handler)
        handler.close()


class _RankFile(logging.FileHandler):
    """The handler of this rank's own file, told apart from a host program's handlers."""


class _ConsoleFormatter(logging.Formatter):
    def __init__(self, rank: int) -> None:
        super().__init__("%(message)s")
        self._prefix = "" if rank == 0 else f"[rank {rank}] "

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        # Names of files and columns come from outside, and could act on the terminal.
        return f"{self._prefix}{level}{shown(super().format(record))}"


def _exc_info(error: BaseException) -> tuple[type[BaseException], BaseException, TracebackType | None]:
    return type(error), error, error.__traceback__


def _files() -> list[_RankFile]:
    return [h for h in logging.getLogger().handlers if isinstance(h, _RankFile)]
