"""What an earlier start of a run has left that counts; the rest is removed."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from grads_dist.config import Config
from grads_dist.probe.config import gradient_files
from grads_dist.runtime.rundir import RunDir
from grads_dist.table.spans import Span, find_spans, span_name

if TYPE_CHECKING:
    from grads_dist.probe.checkpoints import Position

log = logging.getLogger(__name__)

_TRAIN_SHARD = re.compile(r"shard-step(\d+)-rank\d+\.parquet")


class Shards(NamedTuple):
    """The shards of one kind that a sweep writes."""

    folder: Path
    prefix: str
    suffix: str

    def path(self, span: Span) -> Path:
        """The file of a span."""
        return self.folder / f"shard-{span_name(span, self.prefix)}{self.suffix}"

    def spans(self) -> set[Span]:
        """The spans that are there."""
        return find_spans(self.folder, self.prefix, self.suffix)


@dataclass(frozen=True)
class Done:
    """What need not be done again."""

    spans: dict[str, frozenset[Span]] = field(default_factory=dict)
    """Of each sweep, by its name."""
    position: Position | None = None
    """Of the last checkpoint of the preliminary epoch."""
    trained: bool = False
    """Whether all rows were recorded that are recorded while the model trains."""

    def of(self, sweep: str) -> frozenset[Span]:
        """The spans of a sweep that are complete."""
        return self.spans.get(sweep, frozenset())


def sweep_name(kind: str, checkpoint: int = 0) -> str:
    """Name of a sweep: "probe", "features", "target" or "target features", at one of several checkpoints."""
    return f"{kind} {checkpoint}"


def score_prefix(checkpoint: int) -> str:
    """What the shards of the score table at one of several checkpoints begin with."""
    return f"checkpoint{checkpoint}-" if checkpoint else ""


WARM_PREFIX = "frozen"
"""What shards of the score table begin with that were made at weights frozen after a warm-up."""


def sweeps(config: Config, rundir: RunDir) -> dict[str, list[Shards]]:
    """All sweeps of a run and what each writes for a span, last what says that the span is complete."""
    probe = config.probe
    files = gradient_files(len(probe.checkpoints)) if "gradient" in probe.feature_names else []
    content = "content" in probe.feature_names

    def features(name: str, of_target: bool) -> Shards:
        return Shards(rundir.features_dir(RunDir.of_target(name) if of_target else name), "", ".npy")

    found: dict[str, list[Shards]] = {}
    if probe.mode == "frozen":
        for number in range(max(1, len(probe.checkpoints))):
            names = ["content"] * (content and number == 0) + files[number : number + 1]
            table = Shards(rundir.scores_dir, score_prefix(number), ".parquet")
            found[sweep_name("probe", number)] = [*(features(name, False) for name in names), table]
            found[sweep_name("target", number)] = [features(name, True) for name in names]
        return found
    if content:
        found[sweep_name("features")] = [features("content", False)]
        found[sweep_name("target features")] = [features("content", True)]
    if probe.warmup is not None:
        table = Shards(rundir.scores_dir, WARM_PREFIX, ".parquet")
        found[sweep_name("probe")] = [*(features(name, False) for name in files), table]
        found[sweep_name("target")] = [features(name, True) for name in files]
    return found


def take_stock(config: Config, rundir: RunDir, num_rows: int) -> Done:
    """Find what counts in a run directory, for `num_rows` rows to be probed, and remove what does not."""
    _sweep_up(rundir)
    spans = {name: frozenset(_complete(written)) for name, written in sweeps(config, rundir).items()}
    if config.probe.mode == "frozen":
        return Done(spans)
    from grads_dist.probe.checkpoints import last_position

    position = last_position(rundir.checkpoints)
    return Done(spans, position, _trained(config, rundir, position, num_rows))


def _complete(written: list[Shards]) -> set[Span]:
    """The complete spans of a sweep; other files of it are removed, since they would count twice."""
    if not written:
        return set()
    spans = written[-1].spans()
    for shards in written[:-1]:
        for span in shards.spans() - spans:
            shards.path(span).unlink()
    return spans


def _trained(config: Config, rundir: RunDir, position: Position | None, num_rows: int) -> bool:
    """Whether the epoch has left all its rows; if not, shards newer than the last checkpoint are removed."""
    import pyarrow.parquet as pq

    paths = {p: int(m.group(1)) for p in rundir.scores_dir.glob("*") if (m := _TRAIN_SHARD.fullmatch(p.name))}
    if config.probe.warmup is None and sum(pq.read_metadata(path).num_rows for path in paths) == num_rows:
        return not config.probe.save_model or rundir.model.is_dir()
    reached = position.step if position is not None else 0
    for path in [path for path, steps in paths.items() if steps > reached]:
        path.unlink()
    return False


def _sweep_up(rundir: RunDir) -> None:
    """Remove what writes that were cut off have left."""
    features = rundir.root / "features"
    for folder in (rundir.root, rundir.scores_dir, features, *features.glob("*/"), rundir.checkpoints):
        for path in (*folder.glob(".tmp-*"), *folder.glob(".merge-*")):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
