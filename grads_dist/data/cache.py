"""Folders in the cache: written beside their final name, synced, renamed: a final name means complete."""

import contextlib
import errno
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from grads_dist.errors import ConfigError
from grads_dist.runtime.rundir import sync


@contextlib.contextmanager
def publish(final: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `final` at exit, or vanishes on an error.

    Where another process has published the same folder meanwhile, that one stays: equal keys mean equal
    content. Raises ConfigError when the cache cannot be written.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        # With the usual permissions, not private: other ranks may run as another user of the same group.
        temporary = final.parent / f"tmp-{final.name}-{secrets.token_hex(8)}"
        temporary.mkdir()
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir: {str(final.parent)!r} cannot be written ({error.strerror}); "
            "allowed: a writable folder"
        ) from error
    try:
        yield temporary
        for path in temporary.iterdir():
            sync(path)
        _rename(temporary, final)
        sync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(final: Path) -> None:
    """Remove what attempts at `final`, which is there now, have left behind when they were killed.

    One that is still under way finds its folder gone, and `final` instead.
    """
    for temporary in final.parent.glob(f"tmp-{final.name}-*"):
        shutil.rmtree(temporary, ignore_errors=True)


def _rename(temporary: Path, final: Path) -> None:
    try:
        temporary.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
