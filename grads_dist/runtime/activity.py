"""What the main thread of a rank is doing, and how long it may take to get on."""

import contextlib
import gc
import math
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
NEW_SIZE = 2
"""Powers of two by which a step may cost more than any before it and still not count as a first one."""

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
        self._limit, self._own_limit = FIRST_LIMIT, 0.0
        self._kind: str | None = None
        self._cost = self._cost_before = 0.0
        self._since = time.monotonic()
        self._pauses: dict[str, deque[float]] = {}
        # (cost, seconds) of steps that cost between 2^k and 2^(k + 1), of any kind.
        self._sizes: dict[int, deque[tuple[float, float]]] = {}

    @contextlib.contextmanager
    def working(self, label: str) -> Iterator[None]:
        """A pass over the corpus: between beats, time is limited."""
        self._pauses, self._sizes, self._cost = {}, {}, 0.0
        self._limit, self._own_limit = FIRST_LIMIT, 0.0
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
        before, since = self.state, time.monotonic()
        if state == "meeting" or before == "working":
            self.state = state
        try:
            yield
        finally:
            # What was done before it counts for the pauses to come.
            self._since += time.monotonic() - since
            self.beats += 1
            self.state = before

    def beat(self, doing: str, kind: str, cost: float = 0.0) -> None:
        """The main thread has got on and is `doing` something new, comparable to others of its kind.

        On a GPU the one before may still be under way, and is waited for in the course of this one. So a
        pause is put down to the costlier of the two, and has the time that the longer of them may take.

        cost: roughly proportional to the time that it takes; 0 if that is not known.
        """
        now = time.monotonic()
        if self._kind is not None:
            self._remember(now - self._since)
        before, self._own_limit = self._own_limit, self._limit_of(kind, cost)
        self._limit = max(before, self._own_limit)
        self._cost_before, self._cost = self._cost, cost
        self._kind, self._since, self.doing = kind, now, doing
        self.beats += 1

    def limit(self) -> float:
        """Seconds that the present step may take."""
        return self._limit

    def _remember(self, seconds: float) -> None:
        assert self._kind is not None
        self._pauses.setdefault(self._kind, deque(maxlen=KEPT)).append(seconds)
        cost = max(self._cost, self._cost_before)
        if cost > 0:
            self._sizes.setdefault(_size(cost), deque(maxlen=KEPT)).append((cost, seconds))

    def _limit_of(self, kind: str, cost: float) -> float:
        pauses = self._pauses.get(kind)
        if not pauses:
            return FIRST_LIMIT
        limit = max(MIN_LIMIT, SLACK * max(pauses))
        return max(limit, self._limit_by_cost(cost)) if cost > 0 and self._sizes else limit

    def _limit_by_cost(self, cost: float) -> float:
        """The limit by the steps of this cost, or of the next above it that are known, of any kind.

        Where none is, by the costliest in proportion; and one that is much costlier is a first one: it may
        be the first for which kernels are compiled or memory is found.
        """
        size, largest = _size(cost), max(self._sizes)
        if size <= largest:
            like = self._sizes[min(known for known in self._sizes if known >= size)]
            return SLACK * max(seconds for _, seconds in like)
        limit = SLACK * max(seconds * cost / less for less, seconds in self._sizes[largest])
        return max(limit, FIRST_LIMIT) if size > largest + NEW_SIZE else limit


def _size(cost: float) -> int:
    return int(math.log2(cost))


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
