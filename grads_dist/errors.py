"""The failures a user can cause or meet, each with the exit code that the command line gives it."""

LONGEST_MESSAGE = 1000
"""Characters; what an error quotes may be as long as a file."""


def one_line(text: str) -> str:
    """`text` on one line that a terminal shows and does nothing else with.

    It may quote what a file holds: control characters, half surrogates and the like are spelled out.
    """
    return shown(" ".join(text.split()))


def shown(text: str) -> str:
    """`text` with all that is not printable spelled out, line breaks and tabs aside."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class GradsDistError(Exception):
    """Base of every expected failure; its message is one line that says what is wrong and what to do."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        line = one_line(message)
        if len(line) > LONGEST_MESSAGE:
            # The end says what is allowed.
            line = f"{line[: LONGEST_MESSAGE // 2]} ... {line[-LONGEST_MESSAGE // 3 :]}"
        super().__init__(line)


class ConfigError(GradsDistError):
    """A configuration value, a flag or their combination cannot be used."""

    exit_code = 2


class DataError(GradsDistError):
    """The corpus cannot be read or holds no usable row."""

    exit_code = 3


class Interrupted(GradsDistError):  # noqa: N818  -- a state asked for, not a fault
    """The run was stopped on request and can be resumed."""

    exit_code = 4


class OutOfMemory(GradsDistError):  # noqa: N818  -- named as torch and Python name it
    """A batch did not fit into memory; the same command goes on with smaller ones."""

    exit_code = Interrupted.exit_code
