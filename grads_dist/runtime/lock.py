"""Only one run may write a run directory: a file in it says which."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from grads_dist.errors import ConfigError, GradsDistError
from grads_dist.runtime import launcher
from grads_dist.runtime.rundir import LOCK

BEAT = 10.0
"""Seconds between the owner's signs of life."""
PATIENCE = 35.0
"""Seconds without one after which an owner on another host is dead."""
LOOK = 1.0
"""Seconds between looks at another owner's file."""

GONE = -1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. A process is told from a later one of its number by when it started."""

    token: str
    host: str
    pid: int
    started: int
    """Clock ticks between the boot of the host and the start of the process."""

    boot: str
    namespace: str
    """The processes among which the number `pid` counts."""

    launcher: str
    job: str | None
    since: str
    beat: int = 0

    @staticmethod
    def this_process() -> Owner:
        """This process as an owner from now on."""
        return Owner(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=_started(os.getpid()) or 0,
            boot=boot_id(),
            namespace=_namespace(),
            launcher=launcher.detect().launcher,
            job=launcher.job(),
            since=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )

    def dump(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"

    def lives(self) -> bool | None:
        """Whether the process is there; None if that cannot be seen from here."""
        if (self.boot, self.namespace) != (boot_id(), _namespace()):
            return None
        started = _started(self.pid)
        if started is None:
            # A system may hide the processes of other users.
            with contextlib.suppress(ProcessLookupError, OverflowError):
                with contextlib.suppress(PermissionError):
                    os.kill(self.pid, 0)
                return None
        return started == self.started

    def refusal(self, root: Path) -> ConfigError:
        """The error of a second run that wants to write `root`."""
        job = f" ({self.job})" if self.job else ""
        return ConfigError(
            f"output_dir: {str(root)!r} is being written by pid {self.pid} on host {self.host}{job} "
            f"since {self.since}; allowed: wait for it, or another folder"
        )


class RunLock:
    """A lock that is held; `lost` turns true if it is not any more. For rank 0 alone."""

    def __init__(self, root: Path, owner: Owner, handle: int) -> None:
        self.lost = False
        self._root = root
        self._owner = owner
        self._handle = handle
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._thread.start()

    @staticmethod
    def acquire(root: Path) -> RunLock:
        """Lock the run directory `root`, which must be there.

        Takes over from an owner that is dead, at once where that can be seen, else after PATIENCE seconds.
        Raises ConfigError if another run holds it, or if `root` cannot be written.
        """
        owner = Owner.this_process()
        temporary = root / f"{LOCK}.{owner.token}"
        try:
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                os.write(handle, owner.dump())
                os.fsync(handle)
                while not _link(temporary, root / LOCK):
                    _await_end(root, temporary)
            except BaseException:
                os.close(handle)
                raise
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"output_dir: {str(root)!r} cannot be locked ({error.strerror}); allowed: a writable folder "
                "with free space, on a file system with hard links"
            ) from error
        return RunLock(root, owner, handle)

    def check(self) -> None:
        """Raise GradsDistError if another run has taken over the directory, which this one must not touch."""
        if self.lost:
            raise GradsDistError(
                f"output_dir: {str(self._root)!r} was taken over by another run, since this one had shown no "
                "life; look at that one"
            )

    def release(self) -> None:
        """Give the directory free for another run."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        os.close(self._handle)
        # What stays when the file system is gone is the lock of a dead process.
        with contextlib.suppress(OSError):
            if self._is_own():
                (self._root / LOCK).unlink()

    def _renew(self) -> None:
        owner = self._owner
        while not self._released.wait(BEAT):
            owner = replace(owner, beat=owner.beat + 1)
            try:
                if not self._is_own():
                    self.lost = True
                    return
                # In place, so that network file systems show it to whoever opens the file; and if another run
                # takes over at this moment, the file written is no longer the one in the directory.
                os.pwrite(self._handle, owner.dump(), 0)
                os.fsync(self._handle)
            except OSError as error:
                log.warning("%s: the lock cannot be renewed (%s)", self._root / LOCK, error.strerror)

    def _is_own(self) -> bool:
        found = _read(self._root / LOCK)
        return found is not None and found.token == self._owner.token


def _await_end(root: Path, temporary: Path) -> None:
    """Return when the owner's file is gone; raises ConfigError if the owner lives."""
    owner = _read(root / LOCK)
    if owner is None:
        return
    lives = owner.lives()
    if lives is None:
        lives = _shows_life(root / LOCK, owner)
    if lives:
        raise owner.refusal(root)
    _remove_stale(root, temporary, owner)


def _shows_life(path: Path, owner: Owner) -> bool:
    """Watch the lock of an owner on another host, by this host's clock alone."""
    log.info("waiting to see whether %s still writes %s", owner.host, path.parent)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        time.sleep(LOOK)
        found = _read(path)
        if found is None or found.token != owner.token:
            return False
        if found.beat != owner.beat:
            return True
    return False


def _remove_stale(root: Path, temporary: Path, stale: Owner) -> None:
    """Remove the lock of a dead owner, unless another starter is at it or has done so.

    Removing by name could hit the lock of a starter that was faster. So the right to remove this very lock is
    a file of its own, which only one can link.
    """
    claim = root / f"{LOCK}.after-{stale.token}"
    until = time.monotonic() + PATIENCE
    while not _link(temporary, claim):
        time.sleep(LOOK)
        found = _read(root / LOCK)
        if found is None or found.token != stale.token:
            return
        if time.monotonic() > until:
            # Whoever claimed it died in between.
            claim.unlink(missing_ok=True)
    try:
        found = _read(root / LOCK)
        if found is not None and found.token == stale.token:
            log.warning("the run of pid %d on host %s is dead; taking over", stale.pid, stale.host)
            (root / LOCK).unlink()
    finally:
        claim.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> bool:
    """Give the file a second name, unless that is taken."""
    try:
        os.link(source, target)
    except FileExistsError:
        # NFS may say so of what it has just done, if the first answer got lost.
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.stat(source), os.stat(target))
        return False
    return True


def _read(path: Path) -> Owner | None:
    """The owner that a lock names, None if there is none; one that nobody can see if the file is damaged."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):
        token = uuid.uuid5(uuid.NAMESPACE_OID, text.hex()).hex
        return Owner(token, "unknown", 0, 0, "", "", "unknown", None, "an unknown time")


def _started(pid: int) -> int | None:
    """When a process of this host started; None if it cannot be seen, GONE if it only waits to be reaped."""
    try:
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return None
    return GONE if fields[0] in "ZX" else int(fields[19])


def boot_id() -> str:
    """What tells this host, since it was started, from all others; the same in its containers."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def owner_token(root: Path) -> str | None:
    """What names the run that is writing the run directory `root`, and no other; None where nobody is."""
    try:
        owner = _read(root / LOCK)
    except OSError:
        return None
    return None if owner is None else owner.token


def describe_owner(root: Path) -> str | None:
    """Who is writing the run directory `root`, in words; None where nobody is, as far as can be seen."""
    owner = _read(root / LOCK)
    if owner is None:
        return None
    lives = owner.lives()
    if lives is None:
        # The owner is elsewhere, and so is its clock.
        with contextlib.suppress(OSError):
            lives = time.time() - (root / LOCK).stat().st_mtime < 2 * PATIENCE
    if not lives:
        return None
    job = f" ({owner.job})" if owner.job else ""
    return f"pid {owner.pid} on host {owner.host}{job}, since {owner.since}"
