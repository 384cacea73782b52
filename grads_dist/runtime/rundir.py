"""The run directory: the path of everything a run writes, and writes that are whole or absent."""

import contextlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grads_dist.errors import ConfigError, DataError

MARKER = ".grads_dist"
"""File that says that a folder is a run directory, so that what it holds may be replaced on request."""

LOCK = ".lock"
"""File of the run that is writing a run directory (`lock.RunLock`), which alone may remove it."""

# All that a run writes; nothing else is ever removed, and nothing in a folder without the marker.
_RESULTS = ("manifest.json", "scores.parquet", "scores", "features", "similarity", "selection", "model")
_STATE = ("started.json", "batch_tokens.json", "checkpoints")
_WRITTEN = (*_STATE, *_RESULTS, "config.yaml", "environment.json", "rejected.jsonl", "logs")


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

    def read_manifest(self) -> dict[str, Any]:
        """What the manifest says. Raises DataError when it cannot be read."""
        try:
            content = json.loads(self.manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{self.manifest}: cannot be read ({error}); probe again") from None
        if not isinstance(content, dict):
            raise DataError(f"{self.manifest}: is no manifest of a run; probe again")
        return content

    @property
    def started(self) -> Path:
        """What decides the run's numbers, written when it is first started."""
        return self.root / "started.json"

    @property
    def limits(self) -> Path:
        """How large batches may be, once a rank has run out of memory."""
        return self.root / "batch_tokens.json"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of the preliminary epoch, while it runs."""
        return self.root / "checkpoints"

    @property
    def scores_dir(self) -> Path:
        """Shards of the score table."""
        return self.root / "scores"

    @property
    def scores(self) -> Path:
        """The merged score table."""
        return self.root / "scores.parquet"

    @property
    def model(self) -> Path:
        """The probed model, if it is saved."""
        return self.root / "model"

    def features_dir(self, name: str) -> Path:
        """Shards of the features `name`."""
        return self.root / "features" / name

    def features(self, name: str) -> Path:
        """The merged features `name`; row k belongs to the k-th corpus row of the score table."""
        return self.root / "features" / f"{name}.npy"

    @staticmethod
    def of_target(name: str) -> str:
        """Name of the features `name` of the target set, row k for its k-th usable row."""
        return f"{name}.target"

    def similarity_dir(self, name: str) -> Path:
        """The neighbours of the rows by the features `name`, kept for the next selection."""
        return self.root / "similarity" / name

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

    @property
    def marker(self) -> Path:
        """Marks the folder as a run directory."""
        return self.root / MARKER

    @property
    def lock(self) -> Path:
        """Says which run is writing here."""
        return self.root / LOCK

    def check(self, overwrite: bool, resumable: bool = False) -> None:
        """Raise the errors of `create` before any work is done; leaves the folder as it is.

        Raises ConfigError when the folder holds results that may not go, unless they are of a run that may go
        on if `resumable` is set; or files of these names that no run wrote; or cannot be written.
        """
        try:
            found = [name for name in _WRITTEN if os.path.lexists(self.root / name)]
            marked = self.marker.is_file()
            _check_writable(self.root)
        except OSError as error:
            raise self._unwritable(error) from error
        if found and not marked:
            raise ConfigError(
                f"output_dir: {str(self.root)!r} holds {found[0]} but no {MARKER}, so no run made it; "
                "allowed: another folder"
            )
        results = [name for name in found if name in _RESULTS]
        if results and not overwrite and not (resumable and self.started.is_file()):
            raise ConfigError(
                f"output_dir: {str(self.root)!r} holds a run already ({results[0]}); "
                "allowed: another folder, or --overwrite to replace it"
            )
        if not overwrite:
            self.check_links()

    def check_links(self) -> None:
        """Raise ConfigError for a link among what a run writes: it would have the run write elsewhere.

        The folder itself may be one. Looks at the folders of a run and what lies in them, two levels.
        """
        for name in (*_WRITTEN, MARKER):
            path = self.root / name
            inside = list(path.iterdir()) if path.is_dir() and not path.is_symlink() else []
            for found in (path, *inside):
                if found.is_symlink():
                    raise ConfigError(
                        f"output_dir: {str(found)!r} is a link, which a run would write through; allowed: "
                        "files and folders of its own"
                    )

    def mark(self) -> None:
        """Make the folder, if it is not there, and mark it. Raises ConfigError when it cannot be written."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            # Through a link it would be another file.
            os.close(os.open(self.marker, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o666))
        except OSError as error:
            raise self._unwritable(error) from error

    def abandon(self) -> None:
        """Undo `mark` where nothing has been written since."""
        if [path.name for path in self.root.iterdir()] == [MARKER]:
            self.marker.unlink()
            self.root.rmdir()

    def create(self, overwrite: bool, resumable: bool = False) -> None:
        """Make and mark the folder for a run; what an earlier run wrote goes if `overwrite` is set.

        Errors are those of `check`.
        """
        self.check(overwrite, resumable)
        if overwrite:
            self.clear()
        self.check_links()
        self.mark()

    def clear(self, keep: Path | None = None) -> None:
        """Remove all that a run has written, but `keep`. Raises ConfigError when that cannot be done."""
        try:
            for name in _WRITTEN:
                if self.root / name != keep:
                    _remove(self.root / name)
            self.sweep_up()
        except OSError as error:
            raise self._unwritable(error) from error

    def sweep_up(self) -> None:
        """Remove what writes that were cut off have left."""
        features = self.root / "features"
        for folder in (self.root, self.scores_dir, features, *features.glob("*/"), self.checkpoints):
            for path in (*folder.glob(".tmp-*"), *folder.glob(".merge-*")):
                _remove(path)

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"output_dir: {str(self.root)!r} cannot be written ({error.strerror}); allowed: a writable folder"
        )


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; it is synced and renamed to `path` at exit, removed on error.

    The temporary name ends like `path`, because numpy and others append a suffix that is missing.
    """
    path = Path(path)
    # Not the process's number alone: those on other hosts may have the same, and a link could wait there.
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}-{path.name}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `path` at the end, its files synced; removed on an error.

    `path` must not be there.
    """
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}-{path.name}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        os.rename(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_writable(folder: Path) -> None:
    """Raise OSError unless files can be made in `folder`, or in the nearest folder above it that exists."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


def _remove(path: Path) -> None:
    """Remove a file or a folder; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the file or folder written to disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
