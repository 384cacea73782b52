"""The subcommands: what each takes, and the stage it calls.

Nothing heavy is imported before a command runs, so that help and errors come at once.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from grads_dist.config import Config, TableConfig
from grads_dist.errors import ConfigError
from grads_dist.estimate.hardware import KNOWN
from grads_dist.estimate.options import Options
from grads_dist.identity import Share
from grads_dist.parsing import build, make_parser, parse, take_flags, values_of
from grads_dist.runtime.launcher import detect

Action = Callable[[], str | None]
C = TypeVar("C")
BUDGETS = ("fraction", "rows", "tokens")


@dataclass(frozen=True)
class Command:
    """One subcommand: a line for the help, and how its arguments become the action to run."""

    help: str
    prepare: Callable[[Sequence[str]], Action]
    collective: bool
    """Whether every rank takes part; else rank 0 alone runs the action."""


def prepare(args: Sequence[str]) -> Action:
    """Parse `args` (the command first) into an action, which returns text to print, if any.

    Raises ConfigError for every bad argument, with one line.
    """
    name = args[0] if args else ""
    if name not in COMMANDS:
        raise ConfigError(f"command: {name!r} is not known; allowed: {', '.join(COMMANDS)}")
    return COMMANDS[name].prepare(args[1:])


def _prepare_run(args: Sequence[str]) -> Action:
    flags, args = take_flags(_flags("--overwrite"), args)
    config = _configure("run", args, Config)
    _require_model(config)

    def action() -> str | None:
        from grads_dist import pipeline

        return pipeline.run(config, flags.overwrite)

    return action


def _prepare_probe(args: Sequence[str]) -> Action:
    flags, args = take_flags(_flags("--overwrite", "--shard"), args)
    config = _configure("probe", args, Config)
    _require_model(config)
    share = None if flags.shard is None else _share(flags.shard)
    if share is not None and config.probe.mode != "frozen":
        raise ConfigError("shard: only probe.mode frozen can probe a share; set it, or leave --shard out")

    def action() -> str | None:
        from grads_dist import pipeline

        return pipeline.probe(config, flags.overwrite, share)

    return action


def _share(text: str) -> Share:
    number, _, count = text.partition("/")
    if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return Share(int(number), int(count))
    raise ConfigError(f"shard: {text!r} is not allowed; allowed: i/n with i from 1 to n, such as 3/8")


def _prepare_merge(args: Sequence[str]) -> Action:
    flags, runs = take_flags(_flags("--output_dir", "--overwrite"), args)
    unknown = next((arg for arg in runs if arg.startswith("-")), None)
    if unknown is not None:
        raise ConfigError(f"arguments: {unknown!r} is not allowed; allowed: --output_dir, --overwrite")
    if len(runs) < 2:
        raise ConfigError(
            "arguments: name the run directories to merge, one for each share, and --output_dir"
        )
    folder = flags.output_dir if values_of("--output_dir", args) else "run"

    def action() -> str | None:
        from grads_dist import merging

        return merging.merge(runs, folder, flags.overwrite)

    return action


def _prepare_status(args: Sequence[str]) -> Action:
    if len(args) != 1 or args[0].startswith("-"):
        raise ConfigError("arguments: name one run directory, such as: grads-dist status run")

    def action() -> str | None:
        from grads_dist import status

        return status.describe(args[0])

    return action


def _prepare_select(args: Sequence[str]) -> Action:
    flags, args = take_flags(_flags("--table", "--features", "--compare"), args)
    if flags.compare is not None:
        return _prepare_compare(flags.compare, args)
    if flags.table is not None:
        return _prepare_table(flags.table, flags.features, args)
    if flags.features is not None:
        raise ConfigError(
            f"features: {flags.features!r} is given without a table; allowed: beside --table, or "
            "--similarity.features NAME for those of a run"
        )
    if not values_of("--config", args) and "--help" not in args and "-h" not in args:
        folder = values_of("--output_dir", args)[-1:] or ["run"]
        base = Path(folder[0]).expanduser() / "config.yaml"
        if not base.is_file():
            raise ConfigError(
                f"output_dir: {folder[0]!r} holds no config.yaml; allowed: the folder of a finished probe, "
                "or --table FILE.parquet"
            )
        # The folder may have been moved since its configuration was written.
        args = ["--config", str(base), "--output_dir", folder[0], *args]
    config = _configure("select", args, Config)

    def action() -> str | None:
        from grads_dist import selecting

        return selecting.select(config)

    return action


def _prepare_table(table: str, features: str | None, args: Sequence[str]) -> Action:
    given = [arg for arg in args if arg.startswith("--data.")]
    if given and not values_of("--data.path", args) and not values_of("--config", args):
        raise ConfigError(
            f"data.path: not given, but {given[0]} is; allowed: the corpus that the table is about"
        )
    config = _configure("select", args, TableConfig)

    def action() -> str | None:
        from grads_dist import selecting

        return selecting.select_table(config, table, features)

    return action


def _prepare_compare(names: list[str], args: Sequence[str]) -> Action:
    flags, rest = take_flags(_flags("--output_dir"), args)
    if rest:
        raise ConfigError(f"arguments: {rest[0]!r} is not allowed beside --compare; allowed: --output_dir")
    folder = flags.output_dir if values_of("--output_dir", args) else "run"

    def action() -> str | None:
        from grads_dist import selecting

        return selecting.compare(folder, names)

    return action


def _prepare_inspect(args: Sequence[str]) -> Action:
    flags, args = take_flags(_flags("--count"), args)
    config = _configure("inspect", args, Config)
    _require_model(config)
    _require_positive("count", flags.count)

    def action() -> str | None:
        from grads_dist.data.inspect import inspect

        return inspect(config, flags.count)

    return action


def _prepare_estimate(args: Sequence[str]) -> Action:
    flags, args = take_flags(_flags(*_FLAGS_OF["estimate"]), args)
    options = Options(flags.sample, flags.ranks, flags.hardware, flags.calibrate, flags.json)
    config = _configure("estimate", args, Config)
    _require_model(config)

    def action() -> str | None:
        from grads_dist.estimate.estimate import estimate

        return estimate(config, options)

    return action


def _prepare_demo(args: Sequence[str]) -> Action:
    names = ("--output_dir", "--processes", "--overwrite")
    flags, rest = take_flags(_flags(*names, command="demo"), args)
    if rest:
        raise ConfigError(f"arguments: {rest[0]!r} is not allowed; allowed: {', '.join(names)}")
    _require_positive("processes", flags.processes)
    if detect().world_size > 1:
        raise ConfigError(
            f"demo: {detect().world_size} ranks are running it; allowed: one, it starts its own (--processes)"
        )

    def action() -> str | None:
        from grads_dist.demo.main import demo

        return demo(flags.output_dir, flags.processes, flags.overwrite)

    return action


COMMANDS = {
    "run": Command("probe the corpus, merge the score table, select the subset", _prepare_run, True),
    "probe": Command(
        "read per-sample gradient statistics of every row into the score table", _prepare_probe, True
    ),
    "select": Command("select a subset of a probed corpus; needs no GPU and no model", _prepare_select, True),
    "merge": Command("join runs that probed shares of one corpus", _prepare_merge, False),
    "status": Command("tell how far a run is, whether it runs or not", _prepare_status, False),
    "inspect": Command("show how rows are formatted and which tokens carry loss", _prepare_inspect, False),
    "estimate": Command("say what a probe will cost: tokens, time, memory, disk", _prepare_estimate, False),
    "demo": Command("the whole job on a corpus and a model that need no download", _prepare_demo, False),
}

# What is no field of the configuration: how to go about it, not what comes out.
_FLAGS: dict[str, dict[str, Any]] = {
    "--overwrite": {"action": "store_true", "help": "start anew, and remove an earlier run in output_dir"},
    "--shard": {"help": "probe one of several equal shares of the corpus alone, i/n, to be merged later"},
    "--count": {"type": int, "default": 3, "help": "rows to show"},
    "--output_dir": {"default": "runs/demo", "help": "the run directory"},
    "--table": {"help": "select from this Parquet table, which no probe wrote, into the output directory"},
    "--features": {"help": "features of the rows of --table, a .npy file"},
    "--compare": {
        "nargs": "*",
        "help": "only show these selections of the output directory side by side, all without names",
    },
    "--sample": {"type": int, "default": 2000, "help": "rows of the corpus to tokenize"},
    "--ranks": {"type": int, "help": "ranks of the planned run"},
    "--hardware": {"help": "the device of a rank: " + ", ".join(KNOWN)},
    "--calibrate": {"action": "store_true", "help": "time real batches on this machine"},
    "--json": {"action": "store_true", "help": "print JSON"},
    "--processes": {"type": int, "default": 2, "help": "ranks to start"},
}
_FLAGS_OF = {
    "run": ("--overwrite",),
    "probe": ("--overwrite", "--shard"),
    "select": ("--table", "--features", "--compare"),
    "inspect": ("--count",),
    "estimate": ("--sample", "--ranks", "--hardware", "--calibrate", "--json"),
}


def _flags(*names: str, command: str | None = None) -> argparse.ArgumentParser:
    """A parser of these flags only; it answers --help where they are all that `command` takes."""
    parser = argparse.ArgumentParser(
        prog=f"grads-dist {command}",
        description=COMMANDS[command].help if command else None,
        add_help=command is not None,
        exit_on_error=False,
        allow_abbrev=False,
    )
    for name in names:
        parser.add_argument(name, **_FLAGS[name])
    return parser


def _configure(name: str, args: Sequence[str], schema: type[C]) -> C:
    also = [f" {flag}: {_FLAGS[flag]['help']}." for flag in _FLAGS_OF.get(name, ())]
    parser = make_parser(f"grads-dist {name}", schema, f"{COMMANDS[name].help}.{''.join(also)}")
    return build(parser, parse(parser, _replace_budget(args), schema), schema)


def _replace_budget(args: Sequence[str]) -> list[str]:
    """Let a budget on the command line replace the file's, instead of standing beside it as a second one."""
    flags = [f"--selection.{budget}" for budget in BUDGETS]
    given = [i for i, arg in enumerate(args) if arg.partition("=")[0] in flags]
    if not given:
        return list(args)
    cleared = [f"{flag}=null" for flag in flags]
    return [*args[: given[0]], *cleared, *args[given[0] :]]


def _require_model(config: Config) -> None:
    if config.model.name_or_path is None:
        raise ConfigError(
            "model.name_or_path: not given, but needed; allowed: folder or hub id of a causal language model"
        )


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name}: {value} is not allowed; allowed: a whole number of at least 1")
