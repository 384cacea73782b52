"""Requests to stop: what SIGTERM, SIGUSR1 and SIGINT do to a rank.

The first signal raises Interrupted in the main thread, or inside `deferred()` only sets a flag that the
caller looks at. A second one ends the process at once with exit code 4, even while the main thread is inside
a C call such as a collective: a thread reads the numbers from a file descriptor that Python's C handler
writes to.

What counts as a second one: the same signal again, or any signal SETTLE seconds after the first. A launcher
that forwards Ctrl-C lets its ranks have SIGINT from the terminal and SIGTERM from itself at about the same
time, and two launchers, one inside the other, may send one signal twice within BOUNCE seconds.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType

from grads_dist.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
BOUNCE = 0.2  # seconds
SETTLE = 5.0  # seconds

_requested: str | None = None
_num_deferred = 0
_first: tuple[int, float] | None = None
_handled = False
_undo: list[tuple[signal.Signals, signal.Handlers]] = []
_wakeup: tuple[socket.socket, threading.Thread] | None = None


def install() -> None:
    """Handle the signals in this process from now on; does nothing outside the main thread, or again."""
    global _wakeup
    if _wakeup is not None or threading.current_thread() is not threading.main_thread():
        return
    _forget()
    # A child that is forked and then ended by SIGTERM would ask this process to stop, by what they share.
    os.register_at_fork(after_in_child=_restore)
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True)
    thread.start()
    _wakeup = (writing, thread)
    for number in SIGNALS:
        before = signal.getsignal(number)
        # A shell has the programs that it starts in the background ignore Ctrl-C. (SIGUSR1 is ignored where
        # an agent, which is not to end by it, handed that on to its ranks.)
        if number == signal.SIGINT and before == signal.SIG_IGN:
            continue
        signal.signal(number, _handle)
        _undo.append((number, before))  # type: ignore[arg-type]


def uninstall() -> None:
    """Give the signals back to whoever handled them before `install`, and forget what was requested."""
    global _wakeup
    if _wakeup is None:
        return
    _restore()
    writing, thread = _wakeup
    _wakeup = None
    # The thread sees the end of what was written, and ends.
    writing.close()
    thread.join()
    _forget()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let the first signal only set the flag. Nothing is raised at exit: see `requested`."""
    global _num_deferred
    _num_deferred += 1
    try:
        yield
    finally:
        _num_deferred -= 1


def requested() -> str | None:
    """Name of the signal that asked this process to stop, or None."""
    return _requested


def request(name: str) -> None:
    """Set the flag without a signal: another rank got the signal `name`."""
    global _requested
    if _requested is None:
        _requested = name


def interrupted(name: str) -> Interrupted:
    """The error of a run that the signal `name` stopped."""
    return Interrupted(f"interrupted by {name}; start the same command again to go on")


def _restore() -> None:
    if _undo:
        signal.set_wakeup_fd(-1)
    while _undo:
        signal.signal(*_undo.pop())


def _forget() -> None:
    global _requested, _first, _handled
    _requested = _first = None
    _handled = False


def _handle(number: int, _frame: FrameType | None) -> None:
    """Python's own handler, in the main thread, once that runs Python again."""
    global _handled
    request(signal.Signals(number).name)
    first, _handled = not _handled, True
    if first and _num_deferred == 0:
        raise interrupted(signal.Signals(number).name)


def _watch(reading: socket.socket) -> None:
    """Take each signal as it comes, whatever the main thread is doing."""
    with reading:
        while numbers := reading.recv(64):
            for number in numbers:
                if number in SIGNALS:
                    _note(number)


def _note(number: int) -> None:
    global _first
    now = time.monotonic()
    if _first is None:
        _first = (number, now)
        request(signal.Signals(number).name)
        return
    since = now - _first[1]
    if since > SETTLE or (number == _first[0] and since > BOUNCE):
        os._exit(Interrupted.exit_code)
