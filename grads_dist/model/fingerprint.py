"""Whether two starts of a run see the same model, without reading all of it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

PATTERNS = ("config.json", "*.safetensors", "*.bin", "*.py", "adapter_config.json")
"""What decides the weights and what is computed with them."""

_BLOCK = 1 << 12
_BLOCKS = 1024


def folder_fingerprint(folder: Path) -> str:
    """sha256 over the names, the sizes and up to 4 MiB of evenly spaced content of a model's files.

    Training changes most of a model's weights, so that samples tell it from the one before. A change of
    little in a large file, such as training of the norms alone, may go unnoticed. Raises OSError when a file
    cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted({path for pattern in PATTERNS for path in folder.glob(pattern)}):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for start in _starts(size):
                file.seek(start)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _starts(size: int) -> list[int]:
    """Where the blocks begin: all of a small file's, else the first, the last and some between."""
    if size <= _BLOCK * _BLOCKS:
        return list(range(0, size, _BLOCK))
    return [k * (size - _BLOCK) // (_BLOCKS - 1) for k in range(_BLOCKS)]


def fingerprint(name: str, revision: str | None, commit: str | None) -> str:
    """What tells a model, an adapter or a checkpoint from others: of a folder its content, else its name.

    Args:
        name: folder, or name on the hub.
        revision: which revision of it.
        commit: what the revision was when it was fetched.
    """
    if os.path.isdir(name):
        return folder_fingerprint(Path(name))
    return f"{name}@{commit or revision or 'main'}"
