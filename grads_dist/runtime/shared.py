"""Whether all ranks see what rank 0 has written: a folder such as /tmp may be another one on each node."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grads_dist.errors import ConfigError
from grads_dist.runtime.lock import owner_token

if TYPE_CHECKING:
    from grads_dist.runtime.ranks import Ranks

SEEN_WITHIN = 30.0
"""Seconds in which a rank must see it: network file systems remember for a while what was not there."""
LOOK = 0.5
"""Seconds between two looks."""

Look = Callable[[Path], str | None]
"""What tells the folder or file at a path from others of the name; None where it is not there."""


def check_shared(ranks: Ranks, rundir: Path, cached: Sequence[Path]) -> None:
    """Raise ConfigError on all ranks unless each sees the run directory, which is locked, and what is cached.

    Collective.

    Args:
        cached: files below data.cache_dir; those of a cache of a node's own will do if they are equal.
    """
    if ranks.world_size == 1:
        return
    paths: list[tuple[str, Path, Look]] = [("output_dir", rundir, owner_token)]
    paths += [("data.cache_dir", file, _hash) for file in cached]
    host, truth = ranks.on_main(
        lambda: (socket.gethostname(), [look(path) for _, path, look in paths]),
    )
    deadline = time.monotonic() + SEEN_WITHIN

    def check() -> None:
        for (option, path, look), expected in zip(paths, truth, strict=True):
            if expected is not None and not _sees(path, look, expected, deadline):
                raise ConfigError(
                    f"{option}: rank {ranks.rank} (host {socket.gethostname()}) does not see what rank 0 "
                    f"(host {host}) has written to {str(path)!r}; allowed: a folder on a file system that "
                    "all nodes share"
                )

    ranks.on_all(check)


def _sees(path: Path, look: Look, expected: str, deadline: float) -> bool:
    while look(path) != expected:
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK)
        # Opening a folder makes NFS ask the server whether it has changed.
        for folder in (path.parent.parent, path.parent, path):
            with contextlib.suppress(OSError):
                os.listdir(folder)
    return True


def _hash(file: Path) -> str | None:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None
