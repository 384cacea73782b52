"""Signs of life: each rank says that it lives, watches the next one, and learns why the run ends.

A rank that dies, stops, hangs or fails alone leaves the others waiting, in a collective that nobody can
leave. So the monitor, a thread with a connection of its own to the rendezvous store, ends the process. One
rank reports, by being the first to claim it; the others leave with the same exit code and print nothing.

Time is counted only while this process runs (`RunningTime`): after a suspension, or after a C call that kept
all threads from running, the others would look dead.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import NoReturn

import torch.distributed as dist

from grads_dist.errors import Interrupted
from grads_dist.runtime import logs, stopping
from grads_dist.runtime.activity import Activity, find_main
from grads_dist.runtime.launcher import Placement
from grads_dist.runtime.verdict import Beat, Failure, judge

INTERVAL = 2.0
"""Seconds between signs of life."""
PATIENCE = 15.0
"""Seconds without a sign of life after which a rank is gone."""
JUDGE_LATER = 15.0
"""Seconds that ranks which wait for others leave it to the first two to find out which hangs."""
PATIENCE_ELSEWHERE = 35.0
"""The same for a rank that is in no pass: imports and C code may keep its threads from running."""
ANSWER_WITHIN = 15.0
"""Seconds in which the store must answer."""
PATIENCE_BROKEN = 6.0
"""The same once a collective broke: a rank is gone then, and the question is only which."""
BROKEN_PATIENCE = 25.0
"""Seconds that a rank whose collective broke waits for word of the rank that is gone."""
LOOK_AFTER = 0.25
"""Share of the time that a step may take, after which it is looked at where the main thread is."""
HURRIED_PATIENCE = 12.0
"""The same once the launcher has begun to end the ranks."""
LINGER = 5.0
"""Seconds that the rank with the store waits for the others to learn why the run ends."""
LEAVE_WITHIN = 10.0
"""Seconds in which a rank ends once that is settled, even if the file system or stderr is stuck."""

log = logging.getLogger(__name__)


class RunningTime:
    """A clock that stands still while the process does."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.seconds = 0.0

    def tick(self) -> float:
        """Seconds so far; to be called every INTERVAL, as a longer pause counts as two of them."""
        now = time.monotonic()
        self.seconds += min(now - self._last, 2 * INTERVAL)
        self._last = now
        return self.seconds


class Monitor:
    """The watching threads of one rank.

    Args:
        store: a connection to the store that nobody else uses.
        holds_store: whether the store lives in this process.
        keeper: who else holds it, for the line that says that it is gone.
    """

    def __init__(
        self, placement: Placement, activity: Activity, store: dist.Store, holds_store: bool, keeper: str
    ) -> None:
        self.tell: Callable[[str, str], None] = _log
        self._placement = placement
        self._rank, self._num_ranks = placement.rank, placement.world_size
        self._activity = activity
        self._store = store
        self._holds_store = holds_store
        self._keeper = keeper
        self._host = socket.gethostname()
        self._main = threading.main_thread().ident or 0
        self._own: set[int] = set()
        self._clock = RunningTime()
        self._rounds = 0
        self._progress, self._progress_at = -1, 0.0
        self._neighbour: tuple[int, float] = (-1, 0.0)
        self._stop_told = False
        self._leaving = threading.Event()
        self._ending = threading.Lock()
        self._told = False
        self._threads = [
            threading.Thread(target=self._run, name="monitor", daemon=True),
            threading.Thread(target=self._guard, name="monitor's guard", daemon=True),
        ]

    def start(self) -> None:
        """Start to watch."""
        for thread in self._threads:
            thread.start()
        # A daemon thread inside the store's code must not live to see the interpreter taken down.
        atexit.register(self.stop)

    def stop(self) -> None:
        """Stop watching, before this rank leaves well. The others must have stopped too, or be about to."""
        self._leaving.set()
        for thread in self._threads:
            thread.join(timeout=LEAVE_WITHIN)
        atexit.unregister(self.stop)

    def await_verdict(self) -> None:
        """After a broken collective, wait for a monitor to find out which rank is gone and end this process.

        A launcher that has seen that rank die sends SIGTERM to the others, and SIGKILL somewhat later.
        """
        try:
            self._store.set("broken", "")
        except dist.DistError:
            # The monitor has seen or will see the same.
            log.info("the store is gone")
        until = time.monotonic() + BROKEN_PATIENCE
        hurried = stopping.requested() is not None
        while time.monotonic() < until:
            time.sleep(0.1)
            if stopping.requested() is not None and not hurried:
                hurried, until = True, min(until, time.monotonic() + HURRIED_PATIENCE)

    def fail(self, message: str, before: str, code: int) -> NoReturn:
        """End the run because of an error of this rank alone, which is reported unless another was before.

        Args:
            before: what stands before the line, such as a traceback.
        """
        named = code != Interrupted.exit_code
        failure = Failure(self._rank, self._host, self._activity.doing, message, code, named)
        self._end(failure, before)

    def _run(self) -> None:
        self._own.add(threading.get_ident())
        while True:
            try:
                self._round()
            except dist.DistError:
                if not self._leaving.is_set():
                    self._lose_store()
            self._rounds += 1
            if self._leaving.wait(INTERVAL):
                return

    def _guard(self) -> None:
        """See to it that the monitor is not stuck: a store behind a broken link does not answer."""
        self._own.add(threading.get_ident())
        clock, seen, since = RunningTime(), -1, 0.0
        while not self._leaving.wait(INTERVAL):
            now = clock.tick()
            if self._rounds != seen:
                seen, since = self._rounds, now
            elif now - since > ANSWER_WITHIN:
                self._lose_store()

    def _round(self) -> None:
        now = self._clock.tick()
        own = self._look_inside(now)
        self._store.set(_beat_key(self._rank), own.dump())
        self._spread_stop()
        if self._store.check(["failed"]):
            self._follow()
        self._watch_neighbour(now)
        # If one hangs all are late, and a thousand at once would ask too much of the store.
        waits = own.waiting and self._rank > 1
        if own.state == "working" and own.late and (not waits or own.stalled > own.limit + JUDGE_LATER):
            self._judge(own)

    def _look_inside(self, now: float) -> Beat:
        activity = self._activity
        if activity.beats != self._progress:
            self._progress, self._progress_at = activity.beats, now
        stalled, limit = now - self._progress_at, activity.limit()
        # Before, it matters to nobody: `judge` ends a run only because of ranks that are late.
        look = stalled > LOOK_AFTER * limit
        waiting, where = find_main(self._main, self._own) if look else (False, "")
        return Beat(
            rank=self._rank,
            host=self._host,
            number=self._rounds,
            state=activity.state,
            doing=activity.doing,
            progress=activity.beats,
            stalled=stalled,
            limit=limit,
            waiting=waiting,
            where=where,
        )

    def _spread_stop(self) -> None:
        if self._stop_told:
            return
        name = stopping.requested()
        if name is not None:
            self._store.set("stop", name)
        elif self._store.check(["stop"]):
            stopping.request(self._store.get("stop").decode())
        self._stop_told = stopping.requested() is not None

    def _watch_neighbour(self, now: float) -> None:
        neighbour = (self._rank + 1) % self._num_ranks
        beat = self._read(neighbour)
        number, since = self._neighbour
        found = -1 if beat is None else beat.number
        if found != number:
            self._neighbour = (found, now)
        elif self._is_gone(beat, now - since):
            host, doing = ("unknown", "") if beat is None else (beat.host, beat.doing)
            silent = f"no sign of life for {now - since:.0f} s"
            message = f"gone: {silent}; it was killed or stopped, or its node is lost"
            self._end(Failure(neighbour, host, doing, message, code=1))

    def _is_gone(self, last: Beat | None, silent: float) -> bool:
        in_pass = last is not None and last.state != "elsewhere"
        if silent > (PATIENCE if in_pass else PATIENCE_ELSEWHERE):
            return True
        return silent > PATIENCE_BROKEN and self._store.check(["broken"])

    def _read(self, rank: int) -> Beat | None:
        key = _beat_key(rank)
        return Beat.load(self._store.get(key)) if self._store.check([key]) else None

    def _judge(self, own: Beat) -> None:
        others = [self._read(rank) for rank in range(self._num_ranks) if rank != self._rank]
        found = judge([own, *(beat for beat in others if beat is not None)])
        if found is not None:
            self._end(found)

    def _lose_store(self) -> NoReturn:
        """End without the store, and so without an agreement on who tells: one rank of each node does."""
        rank, host = 0, self._placement.master_addr
        host = self._host if host == "127.0.0.1" else host
        line = f"lost the connection to {self._keeper} ({host}): it, or its node, is gone"
        quiet = self._rank != 1 and self._placement.local_rank != 0
        self._end(Failure(rank, host, "", line, code=1, named=False), with_store=False, quiet=quiet)

    def _follow(self) -> NoReturn:
        """Leave as the rank that failed did."""
        code = self._settled_code()
        if not self._ending.acquire(blocking=False):
            _wait_for_the_end(code)
        _leave_later(code)
        with contextlib.suppress(dist.DistError):
            self._part()
        _leave(code)

    def _settled_code(self) -> int:
        return Failure(**json.loads(self._store.get("failed"))).code

    def _end(
        self, failure: Failure, before: str = "", with_store: bool = True, quiet: bool = False
    ) -> NoReturn:
        """Tell why the run ends, here and to the other ranks, and end this process."""
        if not self._ending.acquire(blocking=False):
            _wait_for_the_end(failure.code)
        self._told = quiet
        _leave_later(failure.code, lambda: self._tell(failure, before))
        code = failure.code
        if with_store:
            with contextlib.suppress(dist.DistError):
                code = self._claim(failure, before)
                self._part()
        self._tell(failure, before)
        _leave(code)

    def _claim(self, failure: Failure, before: str) -> int:
        """Report `failure`, unless another rank has something to report; returns the exit code that holds."""
        if self._store.add("report", 1) == 1:
            self._tell(failure, before)
            self._store.set("failed", json.dumps(asdict(failure)))
            return failure.code
        self._told = True
        for _ in range(int(LINGER / 0.1)):
            if self._store.check(["failed"]):
                return self._settled_code()
            time.sleep(0.1)
        return failure.code

    def _part(self) -> None:
        """Say that this rank knows; the rank with the store stays until all do, or LINGER is over."""
        known = self._store.add("known", 1)
        if self._holds_store:
            for _ in range(int(LINGER / 0.1)):
                if known == self._num_ranks:
                    return
                time.sleep(0.1)
                known = self._store.add("known", 0)

    def _tell(self, failure: Failure, before: str) -> None:
        if self._told:
            return
        self._told = True
        self.tell(failure.line(), before)
        logs.record_cause(failure.rank, failure.code, failure.line())


def connect(placement: Placement, keys: str) -> dist.Store:
    """Another connection to the store of the rendezvous.

    Args:
        keys: what stands before the keys of this program.
    """
    client = dist.TCPStore(
        placement.master_addr,
        placement.master_port,
        placement.world_size,
        is_master=False,
        timeout=datetime.timedelta(seconds=60),
        wait_for_workers=False,
    )
    return dist.PrefixStore(keys, client)


def _log(line: str, before: str) -> None:
    log.error("%s%s", before, line)


def _beat_key(rank: int) -> str:
    return f"beat/{rank}"


def _wait_for_the_end(code: int) -> NoReturn:
    """Another thread of this process is ending it."""
    time.sleep(2 * LEAVE_WITHIN)
    os._exit(code)


def _leave_later(code: int, last: Callable[[], None] = lambda: None) -> None:
    """End the process in LEAVE_WITHIN seconds, whatever is stuck until then; `last` gets a second of it."""

    def leave() -> None:
        threading.Thread(target=last, daemon=True).start()
        time.sleep(1)
        os._exit(code)

    timer = threading.Timer(LEAVE_WITHIN, leave)
    timer.daemon = True
    timer.start()


def _leave(code: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
