"""How far a run is, told from its directory alone, whether it is running, stopped or finished."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from grads_dist.config import Config, load_config
from grads_dist.errors import ConfigError, GradsDistError
from grads_dist.identity import Identity, read_identity
from grads_dist.resume import sweeps, train_shards
from grads_dist.runtime.lock import describe_owner
from grads_dist.runtime.logs import ERROR
from grads_dist.runtime.metrics import last_record
from grads_dist.runtime.rundir import RunDir


@dataclass(frozen=True)
class Pass:
    """One pass over the rows and how much of it is on disk."""

    label: str
    done: int
    total: int


def describe(folder: str) -> str:
    """What `grads-dist status` says. Raises ConfigError for a folder that holds no run."""
    rundir = RunDir(Path(folder).expanduser())
    owner = describe_owner(rundir.root)
    if not rundir.config.is_file() or not rundir.started.is_file():
        if owner is None:
            raise ConfigError(f"arguments: {folder!r} holds no run; allowed: the output_dir of run or probe")
        return f"run    {rundir.root}\nstate  starting: {owner}"
    identity, config = read_identity(rundir.started), load_config(rundir.config)
    try:
        passes = [] if rundir.manifest.is_file() else _passes(config, rundir, identity)
        lines = [("run", f"{rundir.root} ({config.probe.mode} mode, {_rows(identity)})")]
        lines += [("state", _state(rundir, owner))]
        lines += [(p.label, f"{p.done:,} of {p.total:,} rows written ({_share(p)})") for p in passes]
        lines += [*_rates(rundir), *_checkpoint(rundir), *_error(rundir)]
    except FileNotFoundError as error:
        raise GradsDistError(f"{error.filename}: was removed while it was looked at; look again") from None
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def _rows(identity: Identity) -> str:
    usable = identity["usable_rows"]
    return f"{usable:,} usable rows" if isinstance(usable, int) else f"{identity['rows']:,} rows"


def _state(rundir: RunDir, owner: str | None) -> str:
    if owner is not None:
        return f"running: {owner}"
    if rundir.manifest.is_file():
        chosen = sorted(path.parent.name for path in (rundir.root / "selection").glob("*/summary.json"))
        return f"finished; selections: {', '.join(chosen) or 'none'}"
    return "stopped; the same command goes on with it"


def _passes(config: Config, rundir: RunDir, identity: Identity) -> list[Pass]:
    """The passes over the corpus in their order, from the names of the shards and the epoch's tables."""
    total, found = int(identity["usable_rows"]), []
    for name, written in sweeps(config, rundir).items():
        kind, _, number = name.rpartition(" ")
        if kind in ("probe", "features") and written:
            rows = sum(span.stop - span.start for span in written[-1].spans())
            at = f" {int(number) + 1}" if len(config.probe.checkpoints) > 1 else ""
            found.append(Pass(f"{kind}{at}", rows, total))
    if config.probe.mode == "train" and config.probe.warmup is None:
        found.append(Pass("probe", sum(rows for _, _, rows in train_shards(rundir)), total))
    return found


def _share(part: Pass) -> str:
    return f"{100 * part.done / part.total:.0f} %" if part.total else "100 %"


def _rates(rundir: RunDir) -> list[tuple[str, str]]:
    """What the ranks were doing last, from their metrics; the run is as fast as all of them together."""
    found = (last_record(path) for path in sorted(rundir.logs_dir.glob("metrics-*.jsonl")))
    started = _started(rundir)
    # Of an earlier start there may have been more ranks.
    last = [record for record in found if record is not None and str(record["time"]) >= started]
    if not last:
        return []
    newest = max(str(record["time"]) for record in last)
    label = next(record["label"] for record in last if record["time"] == newest)
    current = [record for record in last if record["label"] == label]
    rows, tokens = (sum(float(r.get(key) or 0) for r in current) for key in ("rows_per_s", "tokens_per_s"))
    ranks = f"{len(current)} rank{'s' * (len(current) > 1)}"
    rate = f"{rows:,.1f} rows/s, {tokens:,.0f} tokens/s on {ranks}, in pass {label} ({_ago(newest)})"
    left = max(float(record.get("seconds_left") or 0) for record in current)
    if rundir.manifest.is_file() or left == 0:
        return [("rate", rate)]
    return [("rate", rate), ("left", f"about {_duration(left)} of pass {label}, at that rate")]


def _started(rundir: RunDir) -> str:
    """When the last start was, as in the metrics; nothing if that is not known."""
    try:
        return str(json.loads(rundir.environment.read_text(encoding="utf-8"))["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _checkpoint(rundir: RunDir) -> list[tuple[str, str]]:
    paths = sorted(rundir.checkpoints.glob("step*/position.json"))
    if not paths:
        return []
    when = datetime.fromtimestamp(paths[-1].stat().st_mtime, timezone.utc).isoformat(timespec="seconds")
    return [("checkpoint", f"after step {int(paths[-1].parent.name[4:])} ({_ago(when)})")]


def _error(rundir: RunDir) -> list[tuple[str, str]]:
    path = rundir.logs_dir / ERROR
    if not path.is_file():
        return []
    try:
        error = json.loads(path.read_text(encoding="utf-8"))
        return [("last error", f"{error['message']} (rank {error['rank']}, {_ago(str(error['time']))})")]
    except (OSError, ValueError, KeyError, TypeError):
        return [("last error", f"{path} cannot be read")]


def _ago(when: str) -> str:
    seconds = (datetime.now(timezone.utc) - datetime.fromisoformat(when)).total_seconds()
    return f"{_duration(max(0, seconds))} ago"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
