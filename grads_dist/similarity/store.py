"""A graph in a folder: found again when features, rows and options are the same.

.lock                              held while the folder is read or written
ids.npy  cosine.npy  group.npy     the arrays of `Neighbours`
graph.json                         what they were made from and how, written last
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np

from grads_dist.runtime.rundir import atomic_write
from grads_dist.similarity.graph import Neighbours, Search
from grads_dist.similarity.points import UnitRows

logger = logging.getLogger(__name__)

_VERSION = 1
_ARRAYS = ("ids", "cosine", "group")
_HASHED_BYTES = 1 << 26


def fingerprint(points: UnitRows, options: dict[str, object]) -> str:
    """Identity of a graph: of the features' type, shape and bytes, the rows that take part, the options."""
    digest = hashlib.sha256()
    features = points.features
    head = {"version": _VERSION, "dtype": str(features.dtype), "shape": features.shape, "options": options}
    digest.update(json.dumps(head, sort_keys=True).encode())
    for array in (features, points.rows):
        digest.update(b"\0")
        for block in _blocks(array):
            digest.update(block.data)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of the folder: two graphs written at once would mix their arrays.

    Where it cannot be locked (read-only, or a file system without locks) there is a warning.
    """
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _lock(held.enter_context(open(folder / ".lock", "ab", opener=_open_own)), folder)
        except OSError as error:
            logger.warning("similarity: %s is used without a lock: %s", folder, error.strerror)
        yield


def _open_own(path: str, flags: int) -> int:
    """Open a file, but not through a link, which could lead anywhere."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _lock(file: IO[bytes], folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info("similarity: waiting for another process that works in %s", folder)
        fcntl.flock(file, fcntl.LOCK_EX)


def load(folder: Path, key: str) -> Neighbours | None:
    """The graph of this identity, memory-mapped; None where the folder holds another one or not all of it."""
    about = _read_about(folder)
    if about is None or about.get("key") != key:
        return None
    arrays = []
    for name in _ARRAYS:
        try:
            array = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError):
            return None
        if [str(array.dtype), list(array.shape)] != about["arrays"][name]:
            return None
        arrays.append(array)
    ids, cosine, group = arrays
    return Neighbours(ids, cosine, group, Search(**about["search"]))


def forget(folder: Path) -> None:
    """Make a folder ready for a graph: what it holds no longer counts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "graph.json").unlink(missing_ok=True)


def write_array(folder: Path, name: str, shape: tuple[int, ...], blocks: Iterator[np.ndarray]) -> None:
    """Write the rows of an array of `Neighbours`, block by block, whole or not at all."""
    dtype = {"ids": np.int32, "cosine": np.float32, "group": np.int64}[name]
    with atomic_write(folder / f"{name}.npy") as path:
        # A map of no bytes cannot be made.
        if 0 in shape:
            np.save(path, np.empty(shape, dtype))
            return
        out = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        start = 0
        for block in blocks:
            out[start : start + len(block)] = block
            start += len(block)
        out.flush()


def finish(folder: Path, key: str, search: Search) -> None:
    """Say what the arrays in the folder are, which makes them count."""
    arrays = {}
    for name in _ARRAYS:
        array = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        arrays[name] = [str(array.dtype), list(array.shape)]
    about = {"key": key, "arrays": arrays, "search": asdict(search)}
    with atomic_write(folder / "graph.json") as path:
        path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _read_about(folder: Path) -> dict | None:
    try:
        about = json.loads((folder / "graph.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) else None


def _blocks(array: np.ndarray | None) -> Iterator[np.ndarray]:
    if array is None or array.size == 0:
        return
    step = max(1, _HASHED_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), step):
        yield np.ascontiguousarray(array[start : start + step]).view(np.uint8).reshape(-1)
