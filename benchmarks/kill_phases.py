"""What a start of a run is at, told from outside by the files of the run."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from reliability import describe

PHASES = ("importing", "tokenizing", "loading", "probing", "merging", "selecting")
"""In order. Importing lasts until the run is locked; tokenizing, until it is known what an earlier start has
left; loading, until the first file of a pass is there; probing, until all rows are in shards; merging, until
the manifest is there; selecting, until the end."""


class Phases:
    """The phases of one start. Made before it, since what is there already is of earlier ones.

    Args:
        run: the run directory.
        usable: rows that are not rejected.
    """

    def __init__(self, run: Path, usable: int) -> None:
        self._run, self._usable = run, usable
        self._lock = self._owner().get("token")
        self._before = set(self._written())
        self._counts: dict[tuple[str, int], int] = {}
        self._reached = 0

    def now(self) -> str:
        """The phase at this moment; it never goes back."""
        self._reached = max(self._reached, PHASES.index(self._look()))
        return PHASES[self._reached]

    def num_written(self) -> int:
        """Rows in shards of the score table."""
        for path in self._run.glob("scores/shard-*.parquet"):
            try:
                key = (path.name, path.stat().st_mtime_ns)
                if key not in self._counts:
                    self._counts[key] = pq.read_metadata(path).num_rows
            except (OSError, pa.ArrowInvalid):
                # It was removed in between.
                continue
        present = {path.name for path in self._run.glob("scores/shard-*.parquet")}
        newest = {name: count for (name, _), count in sorted(self._counts.items()) if name in present}
        return sum(newest.values())

    def _look(self) -> str:
        owner = self._owner()
        if owner.get("token") in (None, self._lock):
            return "importing"
        if describe(self._run / "environment.json").get("pid") != owner["pid"]:
            return "tokenizing"
        if (self._run / "manifest.json").exists():
            return "selecting"
        if self.num_written() == self._usable:
            return "merging"
        return "probing" if set(self._written()) - self._before else "loading"

    def _owner(self) -> dict[str, object]:
        return describe(self._run / ".lock")

    def _written(self) -> list[tuple[str, int]]:
        """What passes have written, each file told from a later one of its name."""
        found = []
        for pattern in ("scores/shard-*", "features/*/shard-*", "checkpoints/step*"):
            for path in self._run.glob(pattern):
                try:
                    found.append((str(path), path.stat().st_mtime_ns))
                except OSError:
                    continue
        return found
