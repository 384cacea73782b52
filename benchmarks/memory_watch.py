"""Memory and processor time of this process and of the processes it starts; memory is watched from a thread.

Anonymous memory is what a process holds for itself. Pages of mapped files are shared between the processes
that map them, and the kernel takes them back when memory runs short: they are told apart.
"""

from __future__ import annotations

import resource
import threading
from pathlib import Path

_EVERY = 0.02


class MemoryWatch:
    """Peak of the anonymous memory of this process above that at the start, and of its children's, in MiB."""

    cpu_seconds = 0.0
    """Processor time of what ran inside, with that of children that have ended."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._start = status_mib("self", "RssAnon")
        self._peak = self._start
        self.children_mib = 0.0
        """The largest peak of resident memory of one child, its imports included; 0 without any."""

    def __enter__(self) -> MemoryWatch:
        self._cpu_start = cpu_seconds()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu_seconds = cpu_seconds() - self._cpu_start
        self._done.set()
        self._thread.join()
        self._look()

    @property
    def peak_mib(self) -> float:
        """The most anonymous memory that was seen, above that at the start."""
        return self._peak - self._start

    @property
    def grown_mib(self) -> float:
        """Anonymous memory now, above that at the start."""
        return status_mib("self", "RssAnon") - self._start

    def _watch(self) -> None:
        while not self._done.wait(_EVERY):
            self._look()

    def _look(self) -> None:
        self._peak = max(self._peak, status_mib("self", "RssAnon"))
        for child in _children():
            # A child that has just ended has no status.
            self.children_mib = max(self.children_mib, status_mib(child, "VmHWM"))


def cpu_seconds() -> float:
    """Processor time so far of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def status_mib(process: str, field: str) -> float:
    """A field of /proc/<process>/status in MiB; 0 if there is none."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    found = [line for line in lines if line.startswith(f"{field}:")]
    return int(found[0].split()[1]) / 1024 if found else 0.0


def _children() -> list[str]:
    pids: list[str] = []
    for task in Path("/proc/self/task").iterdir():
        try:
            pids += (task / "children").read_text(encoding="ascii").split()
        except OSError:
            continue
    return pids
