"""The command line: runs a command on every rank and turns every failure into one line and an exit code.

The only module that prints, and the only one that catches everything.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING

from grads_dist import commands
from grads_dist.commands import Action
from grads_dist.errors import ConfigError, GradsDistError, Interrupted, one_line, shown
from grads_dist.runtime import launcher, logs, stopping
from grads_dist.runtime.faults import explain_os_error
from grads_dist.runtime.launcher import detect

if TYPE_CHECKING:
    from grads_dist.runtime.ranks import Ranks

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `grads-dist` with `argv`; returns the exit code.

    0 done, 1 failed, 2 bad configuration or usage, 3 bad data, 4 interrupted.
    """
    args = _without_local_rank(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        _say(_overview())
        return 0 if args else ConfigError.exit_code
    if args[0] == "--version":
        _say(f"grads-dist {_version()}")
        return 0
    ranks: Ranks | None = None
    try:
        if _only_asks(args):
            # Ends in SystemExit. Launcher variables may be left over in a shell, where no other rank comes.
            _answer(args)
        if args[0] in commands.COMMANDS and commands.COMMANDS[args[0]].collective:
            stopping.install()
        ranks = _start_ranks()
        action = _prepare(args, ranks)
        if ranks is None or commands.COMMANDS[args[0]].collective:
            text = action()
        else:
            text = ranks.on_main(action)
        if text and (ranks is None or ranks.is_main):
            _say(text)
        if ranks is not None:
            ranks.close()
        return 0
    except BaseException as error:
        with stopping.deferred():
            return _fail(error, ranks)
    finally:
        stopping.uninstall()


def _answer(args: Sequence[str]) -> None:
    try:
        commands.prepare(args)
    except BrokenPipeError:
        _drop_output()
        raise SystemExit(0) from None


def _start_ranks() -> Ranks | None:
    """The ranks, where there are several; one rank alone needs no torch to read its arguments."""
    placement = detect()
    logs.start_console(placement.rank)
    if placement.world_size == 1:
        return None
    logger.info("waiting for %d ranks at %s", placement.world_size, placement.master_addr)
    launcher.quieten_torch()
    from grads_dist.runtime.ranks import Ranks

    ranks = Ranks.start(placement)
    ranks.report_failures(_print_error)
    return ranks


def _prepare(args: Sequence[str], ranks: Ranks | None) -> Action:
    """Parse on every rank: what is wrong on one, such as a file that its node lacks, is raised on all."""
    if ranks is None:
        return commands.prepare(args)
    ranks.check_devices()
    return ranks.on_all(lambda: commands.prepare(args))


def _fail(error: BaseException, ranks: Ranks | None) -> int:
    """Report `error` in one line, once over all ranks, and end this rank."""
    if isinstance(error, SystemExit) and ranks is None:
        # --help and --print_config end so.
        _say()
        return error.code if isinstance(error.code, int) else 1
    code, message, before = _diagnose(error)
    if ranks is None:
        _print_error(message, before)
        logs.record_cause(0, code, message)
        return code
    if ranks.shared_error is not error:
        # Ends the process at once: the others may wait for this rank in a collective.
        ranks.fail_alone(error, message, before, code)
    ranks.report_once(lambda: _report_shared(ranks.rank, code, message))
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    ranks.close()
    # At once: a launcher that sees one rank fail ends the others, which would hide the code of a rank that is
    # still tearing down.
    os._exit(code)


def _report_shared(rank: int, code: int, message: str) -> None:
    _print_error(message)
    logs.record_cause(rank, code, message)


def _diagnose(error: BaseException) -> tuple[int, str, str]:
    """The exit code of `error`, the line that tells the user, and what to print before it.

    An unexpected error's traceback goes to the log, or before the line where there is no log yet.
    """
    if isinstance(error, GradsDistError):
        return error.exit_code, str(error), ""
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.exit_code, "interrupted", ""
    known = explain_os_error(error)
    if known is not None:
        logs.record_failure(error)
        return 1, known, ""
    path = logs.log_path()
    if path is None:
        trace = "".join(traceback.format_exception(error))
        return 1, f"{type(error).__name__}: {error} (traceback above)", trace
    logs.record_failure(error)
    return 1, f"{type(error).__name__}: {error} (traceback in {path})", ""


def _say(text: str = "") -> None:
    """Print `text`, and what was printed before; a reader that has gone, as `| head` goes, is no failure."""
    try:
        print(text, end="\n" if text else "", flush=True)
    except BrokenPipeError:
        _drop_output()


def _drop_output() -> None:
    """Nobody reads it; Python writes what is left when it ends, and would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_error(message: str, before: str = "") -> None:
    print(f"{shown(before)}grads-dist: error: {one_line(message)}", file=sys.stderr, flush=True)


def _only_asks(args: Sequence[str]) -> bool:
    return any(arg.partition("=")[0] in ("-h", "--help", "--print_config") for arg in args)


def _without_local_rank(args: Sequence[str]) -> list[str]:
    """Drop the `--local_rank=N` that the deepspeed launcher adds; the environment says the same."""
    return [arg for arg in args if arg.partition("=")[0] not in ("--local_rank", "--local-rank")]


def _overview() -> str:
    lines = [f"  {name:<10}{command.help}" for name, command in commands.COMMANDS.items()]
    return "\n".join(
        [
            "usage: grads-dist COMMAND [--config FILE] [--section.field VALUE ...]",
            "",
            "Picks the best share of a fine-tuning corpus from per-sample gradients.",
            "",
            *lines,
            "",
            "grads-dist COMMAND --help lists its fields, --print_config prints the whole configuration.",
            "Runs alone or under torchrun, deepspeed, srun and mpiexec (as python -m grads_dist).",
            "Exit codes: 0 done, 1 failed, 2 bad configuration, 3 bad data, 4 interrupted.",
        ]
    )


def _version() -> str:
    try:
        return metadata.version("grads-dist")
    except metadata.PackageNotFoundError:
        return "(not installed)"
