"""Faults of a file system that can end any run, each in one line."""

import errno
import os
import re

_REMEDIES = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space or have the quota raised",
    errno.EROFS: "make the file system writable",
    errno.EACCES: "give back the permission",
    errno.EIO: "look after the disk or the file server",
}
_KEPT = "nothing that was complete is lost"
# safetensors and tokenizers, which are written in Rust, tell the number in their text.
_RUST = re.compile(r"\(os error (\d+)\)")
# torch.save loses it.
_TORCH = re.compile(r"PytorchStreamWriter failed|unexpected pos \d+ vs \d+")


def explain_os_error(error: BaseException) -> str | None:
    """What is wrong with the file system and what to do, in a line; None if `error` is not about that."""
    number, place = _number(error)
    if number in _REMEDIES:
        what = f"{place}{os.strerror(number)}"
        return f"{what}; {_KEPT}; {_REMEDIES[number]} and start the same command again"
    if isinstance(error, RuntimeError) and _TORCH.search(str(error)):
        return (
            f"a checkpoint cannot be written ({_first_line(error)}); {_KEPT}; "
            "free space and start the same command again"
        )
    return None


def _number(error: BaseException) -> tuple[int | None, str]:
    """The error number of the system, and the path where the error says it, as a prefix."""
    if isinstance(error, OSError):
        if error.filename is not None:
            return error.errno, f"{os.fspath(error.filename)}: "
        text = _first_line(error)
        plain = error.errno is None or text == f"[Errno {error.errno}] {os.strerror(error.errno)}"
        return error.errno, "" if plain else f"{text}: "
    found = _RUST.search(str(error))
    return (int(found.group(1)), f"{_first_line(error)}: ") if found else (None, "")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
