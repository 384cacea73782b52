"""The failures a user can cause or meet, each with the exit code that the command line gives it."""


class GradsDistError(Exception):
    """Base of every expected failure; its message is one line that says what is wrong and what to do."""

    exit_code = 1


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
