"""Joins runs that probed shares of one corpus to a run of all of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from grads_dist import provenance
from grads_dist.config import Config, load_config, save_config
from grads_dist.errors import ConfigError, DataError
from grads_dist.identity import (
    CLEARING,
    JOB,
    LAUNCH,
    UNKNOWN,
    Identity,
    differences,
    hash_tokens,
    read_identity,
)
from grads_dist.runtime.lock import RunLock
from grads_dist.runtime.rundir import RunDir, atomic_write, write_json
from grads_dist.table.merge import Merged, join_tables
from grads_dist.table.notes import OUT_OF_MEMORY


@dataclass(frozen=True)
class Part:
    """One finished run over a share."""

    rundir: RunDir
    identity: Identity
    manifest: dict[str, Any]

    @property
    def share(self) -> tuple[int, int]:
        """Which share it is, and of how many."""
        number, _, count = str(self.identity["share"]).partition("/")
        return int(number), int(count)


def merge(runs: Sequence[str], output_dir: str, overwrite: bool) -> str:
    """Write the table, the features and the rejected rows of several shares to `output_dir` as one run.

    From there on it is a finished run like any other. Returns what to tell the user.

    Raises ConfigError for runs that are not finished, differ in anything but their share, or are not all of
    one corpus's shares; DataError when a row is missing or there twice.
    """
    parts = sorted((_read(Path(run).expanduser().absolute()) for run in runs), key=lambda part: part.share)
    _check(parts)
    output = RunDir(Path(output_dir).expanduser().absolute())
    # A merge that was cut off starts again.
    overwrite = overwrite or _is_cut_off(output)
    output.check(overwrite)
    config = _configuration(parts[0], output)
    with ExitStack() as held:
        output.mark()
        held.callback(RunLock.acquire(output.root).release)
        write_json(output.started, {**parts[0].identity, CLEARING: True})
        output.clear(keep=output.started)
        output.create(overwrite=False, resumable=True)
        merged = _join(parts, output)
        _say_how(parts, output, config, merged)
    shares = f"{len(parts)} shares"
    return f"merged {len(merged.index)} rows of {shares} ({_rejected(output)} rejected): {output.scores}"


def _is_cut_off(output: RunDir) -> bool:
    return output.started.is_file() and bool(read_identity(output.started).get(CLEARING))


def _read(folder: Path) -> Part:
    rundir = RunDir(folder)
    if not rundir.started.is_file():
        raise ConfigError(f"arguments: {str(folder)!r} is no run; allowed: folders of probe --shard i/n")
    identity = read_identity(rundir.started)
    if identity.get("share") is None:
        raise ConfigError(
            f"arguments: {str(folder)!r} probed a whole corpus; allowed: runs of probe --shard i/n"
        )
    if not rundir.manifest.is_file():
        raise ConfigError(
            f"arguments: {str(folder)!r} is not finished (share {identity['share']}); start it again, and it "
            "goes on"
        )
    return Part(rundir, identity, rundir.read_manifest())


def _check(parts: Sequence[Part]) -> None:
    """Refuse runs that are not all the shares of one corpus, each once, probed alike."""
    first, count = parts[0], parts[0].share[1]
    for part in parts[1:]:
        # What belongs to a share and not to what was asked of it.
        own = {"share": None, "tokens": None, "usable_rows": None}
        changed = differences({**first.identity, **own}, {**part.identity, **own})
        if part.share[1] != count:
            changed = f"--shard was {first.identity['share']} and is {part.identity['share']}"
        if changed is not None:
            raise ConfigError(
                f"arguments: {str(part.rundir.root)!r} is not of the same probe as "
                f"{str(first.rundir.root)!r}: {changed}"
            )
    numbers = [part.share[0] for part in parts]
    doubled = next((n for n, following in zip(numbers, numbers[1:], strict=False) if n == following), None)
    if doubled is not None:
        raise ConfigError(f"arguments: share {doubled}/{count} is given twice; allowed: every share once")
    missing = sorted(set(range(1, count + 1)) - set(numbers))
    if missing:
        named = ", ".join(f"{n}/{count}" for n in missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise ConfigError(f"arguments: no run of share {named}; allowed: all {count} shares")


def _configuration(part: Part, output: RunDir) -> Config:
    return replace(load_config(part.rundir.config), output_dir=str(output.root))


def _join(parts: Sequence[Part], output: RunDir) -> Merged:
    """Join the tables and what goes with them; every row must be in one of them, or rejected."""
    _join_rejected(parts, output.rejected)
    manifest = parts[0].manifest
    num_rows, num_checkpoints = parts[0].identity["rows"], len(manifest.get("checkpoints", [])) or 1
    rejected = [index for part in parts for index in _rejected_rows(part.rundir.rejected)]
    expected = np.setdiff1d(np.arange(num_rows), np.array(rejected, dtype=np.int64))
    if len(rejected) + len(expected) != num_rows:
        raise DataError(
            f"{output.rejected}: a row is rejected twice, or is none of the {num_rows} of the corpus"
        )
    tables = [part.rundir.scores for part in parts]
    merged = join_tables(tables, output.scores, expected, "the shares", num_checkpoints=num_checkpoints)
    output.features("any").parent.mkdir(parents=True, exist_ok=True)
    for name in manifest["features"]:
        _join_features(
            [part.rundir.features(name) for part in parts], output.features(name), len(merged.index)
        )
        if "target" in manifest:
            target = RunDir.of_target(name)
            with atomic_write(output.features(target)) as path:
                shutil.copyfile(parts[0].rundir.features(target), path)
    return merged


def _join_features(paths: Sequence[Path], output: Path, num_rows: int) -> None:
    """Shares hold consecutive rows, so their matrices follow one another."""
    matrices = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
    if sum(len(matrix) for matrix in matrices) != num_rows:
        raise DataError(f"{output.name}: the shares have not as many rows of features as of scores")
    with atomic_write(output) as path:
        shape = (num_rows, matrices[0].shape[1])
        joined = np.lib.format.open_memmap(path, "w+", matrices[0].dtype, shape)
        start = 0
        for matrix in matrices:
            joined[start : start + len(matrix)] = matrix
            start += len(matrix)
        joined.flush()
        del joined


def _join_rejected(parts: Sequence[Part], output: Path) -> None:
    with atomic_write(output) as path, path.open("wb") as file:
        for part in parts:
            file.write(part.rundir.rejected.read_bytes())


def _rejected_rows(path: Path) -> list[int]:
    with path.open(encoding="utf-8") as lines:
        return [int(json.loads(line)["index"]) for line in lines]


def _lacks_memory(output: RunDir) -> bool:
    """Whether a row is rejected although it has tokens."""
    with output.rejected.open(encoding="utf-8") as lines:
        return any(str(json.loads(line)["reason"]).startswith(OUT_OF_MEMORY) for line in lines)


def _rejected(output: RunDir) -> int:
    return len(_rejected_rows(output.rejected))


def _hash_tokens(output: RunDir) -> str:
    """What a run over the whole corpus would say of its tokens."""
    table = pq.read_table(output.scores, columns=["index", "num_tokens", "token_hash", "checkpoint"])
    table = table.filter(pc.equal(table["checkpoint"], 0))
    return hash_tokens(*(table[name].to_numpy() for name in ("index", "num_tokens", "token_hash")))


def _say_how(parts: Sequence[Part], output: RunDir, config: Config, merged: Merged) -> None:
    """Write what says that the run is complete, and how it came about; the manifest last."""
    save_config(config, output.config)
    tokens = {**parts[0].identity["tokens"], "data.path": _hash_tokens(output)}
    whole: Identity = {"share": None, "tokens": tokens, "usable_rows": len(merged.index)}
    whole.update({JOB: None, LAUNCH: None})
    if _lacks_memory(output):
        # Rows with tokens that the table lacks.
        whole.update(tokens={**tokens, "data.path": UNKNOWN}, usable_rows=UNKNOWN)
    write_json(output.environment, provenance.environment(1, "none", "merge"))
    manifests = [part.manifest for part in parts]
    counts = {key: sum(manifest["lm_head"][key] for manifest in manifests) for key in manifests[0]["lm_head"]}
    summed = {
        "plan": {**manifests[0]["plan"], "rows": len(merged.index)},
        "nonfinite_rows": merged.num_nonfinite,
        "lm_head": counts,
        "merged": [str(part.rundir.root) for part in parts],
    }
    write_json(output.manifest, {**manifests[0], **summed})
    write_json(output.started, {**parts[0].identity, **whole})
