"""The run directory: the path of everything a run writes, and writes that are whole or absent."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from grads_dist.errors import ConfigError

# What a run may leave behind; nothing else is ever removed from a user's folder.
_FILES = (
    "config.yaml",
    "environment.json",
    "manifest.json",
    "scores.parquet",
    "rejected.jsonl",
    "report.html",
)
_FOLDERS = ("scores", "features", "selection", "logs", "checkpoints", "model")


@dataclass(frozen=True)
class RunDir:
    """Every path of a run under `root`."""

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, devices, launcher."""
        return self.root / "environment.json"

    @property
    def manifest(self) -> Path:
        """Schema version, corpus fingerprint, constants of the targets, plan."""
        return self.root / "manifest.json"

    @property
    def scores_dir(self) -> Path:
        """Shards of the score table."""
        return self.root / "scores"

    @property
    def scores(self) -> Path:
        """The merged score table."""
        return self.root / "scores.parquet"

    def features_dir(self, name: str) -> Path:
        """Shards of the features `name`."""
        return self.root / "features" / name

    def features(self, name: str) -> Path:
        """The merged features `name`; row k belongs to row k of the score table."""
        return self.root / "features" / f"{name}.npy"

    @property
    def rejected(self) -> Path:
        """Rows that could not be used, with the reason."""
        return self.root / "rejected.jsonl"

    @property
    def logs_dir(self) -> Path:
        """One log a rank."""
        return self.root / "logs"

    def selection_dir(self, name: str) -> Path:
        """Everything of the selection `name`."""
        return self.root / "selection" / name

    def create(self, overwrite: bool) -> None:
        """Make the folder ready for a new run; an earlier run in it goes if `overwrite` is set.

        Raises ConfigError when results are there and may not go, or when the folder cannot be written.
        """
        parts = (self.manifest, self.scores, self.scores_dir, self.root / "features")
        results = [path.name for path in parts if path.exists()]
        if results and not overwrite:
            raise ConfigError(
                f"output_dir: {str(self.root)!r} holds a run already ({results[0]}); "
                "allowed: another folder, or --overwrite to replace it"
            )
        if results and not self.config.exists():
            raise ConfigError(
                f"output_dir: {str(self.root)!r} holds {results[0]} but no config.yaml, so it may be no run; "
                "allowed: another folder"
            )
        try:
            if results:
                self._remove_run()
            self.root.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.root / ".writable") as path:
                path.touch()
            (self.root / ".writable").unlink()
        except OSError as error:
            raise ConfigError(
                f"output_dir: {str(self.root)!r} cannot be written ({error.strerror}); "
                "allowed: a writable folder"
            ) from error

    def _remove_run(self) -> None:
        for name in _FILES:
            (self.root / name).unlink(missing_ok=True)
        for name in _FOLDERS:
            if (self.root / name).exists():
                shutil.rmtree(self.root / name)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; it is synced and renamed to `path` at exit, removed on error.

    The temporary name ends like `path`, because numpy and others append a suffix that is missing.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
