"""What the main thread of a rank is doing, and how long it may take to get on."""

import contextlib
import gc
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Literal

MIN_LIMIT = 40.0
"""Seconds without progress that are never a hang."""
FIRST_LIMIT = 1800.0
"""Seconds that the first of a kind may take in a pass: kernels are compiled, an optimizer's state is made."""
SLACK = 5
"""Times the longest pause so far that the next one may take."""
KEPT = 64
"""Pauses of a kind that are remembered, so that the first, with its compilation, is forgotten some day."""

State = Literal["elsewhere", "working", "paused", "meeting"]

# Modules whose frames mean that a thread waits for other ranks.
_COLLECTIVES = ("torch.distributed.distributed_c10d", "deepspeed.comm")
_WAITS = ("wait", "synchronize")


class Activity:
    """Progress of the main thread, which alone writes it; the monitor reads it."""

    def __init__(self) -> None:
        self.state: State = "elsewhere"
        self.doing = ""
        self.beats = 0
        self._kind: str | None = None
        self._since = time.monotonic()
        self._pauses: dict[str, deque[float]] = {}

    @contextlib.contextmanager
    def working(self, label: str) -> Iterator[None]:
        """A pass over the corpus: between beats, time is limited."""
        self._pauses = {}
        self._kind, self._since, self.doing = None, time.monotonic(), label
        self.beats += 1
        self.state = "working"
        try:
            yield
            # After an error it stays, for the line that reports it.
            self.doing = ""
        finally:
            self.state = "elsewhere"

    @contextlib.contextmanager
    def aside(self, state: Literal["paused", "meeting"]) -> Iterator[None]:
        """Something that may take long; what comes after it has its time from the start again."""
        before = self.state
        if state == "meeting" or before == "working":
            self.state = state
        try:
            yield
        finally:
            self._since = time.monotonic()
            self.beats += 1
            self.state = before

    def beat(self, doing: str, kind: str) -> None:
        """The main thread has got on and is `doing` something new, comparable to others of its kind."""
        now = time.monotonic()
        if self._kind is not None:
            self._pauses.setdefault(self._kind, deque(maxlen=KEPT)).append(now - self._since)
        self._kind, self._since, self.doing = kind, now, doing
        self.beats += 1

    def limit(self) -> float:
        """Seconds that the present step may take."""
        pauses = self._pauses.get(self._kind) if self._kind is not None else None
        return max(MIN_LIMIT, SLACK * max(pauses)) if pauses else FIRST_LIMIT


def find_main(thread: int, own: set[int]) -> tuple[bool, str]:
    """Whether the process waits for other ranks, and where its main thread is, as `file.py:12`.

    Args:
        thread: identifier of the main thread.
        own: identifiers of the threads that watch, which do not count.

    A collective may run in a thread of autograd, so all threads are looked at.
    """
    with _no_collection():
        return _find_main(thread, own)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from running.

    Going from frame to frame makes objects for them. Up to Python 3.11 that may start a collection in its
    midst; whatever is collected may let other threads run, and the frame that was about to be looked at is
    gone. Seen as a tensor in place of a frame, and as a crash.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _find_main(thread: int, own: set[int]) -> tuple[bool, str]:
    frames = {key: frame for key, frame in sys._current_frames().items() if key not in own}
    main = frames.get(thread)
    if main is None:
        return False, "an unknown place"
    waiting = any(_in_collective(frame) for frame in frames.values())
    path = Path(main.f_code.co_filename)
    return waiting, f"{Path(*path.parts[-2:])}:{main.f_lineno}"


def _in_collective(innermost: FrameType) -> bool:
    # DeepSpeed waits for handles in methods of these names.
    if _module(innermost).startswith("deepspeed.") and innermost.f_code.co_name in _WAITS:
        return True
    frame: FrameType | None = innermost
    while frame is not None:
        if _module(frame).startswith(_COLLECTIVES):
            return True
        frame = frame.f_back
    return False


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
