"""How much memory an index may take."""

from __future__ import annotations

import importlib
from pathlib import Path

_SHARE = 0.5
_UNKNOWN = 4 << 30
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def index_limit(device: str, num_local_ranks: int) -> int:
    """Bytes that the index of one rank may take: half of its part of what is free on the node or the GPU."""
    if device == "cuda":
        torch = importlib.import_module("torch")
        free = int(torch.cuda.mem_get_info()[0])
        return int(free * _SHARE) // num_local_ranks if torch.cuda.device_count() == 1 else int(free * _SHARE)
    return int(_free_memory() * _SHARE) // num_local_ranks


def _free_memory() -> int:
    """Memory that the node, or the control group that this process is in, can still give."""
    return min(_free_of_node(), _free_of_group())


def _free_of_node() -> int:
    if not _MEMINFO.exists():
        return _UNKNOWN
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text(encoding="utf-8").splitlines())
    return int(lines["MemAvailable"].split()[0]) << 10


def _free_of_group() -> int:
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if not (limit.exists() and used.exists()):
        return 1 << 62
    text = limit.read_text(encoding="utf-8").strip()
    if text == "max":
        return 1 << 62
    # Pages of files count as used, and are given up when memory is asked for.
    lines = (_CGROUP / "memory.stat").read_text(encoding="utf-8").splitlines()
    files = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
    return max(0, int(text) - int(used.read_text(encoding="utf-8")) + files)
