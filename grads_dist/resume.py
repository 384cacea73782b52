"""What an earlier start of a run has left that counts; the rest is removed."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from grads_dist.config import Config
from grads_dist.probe.config import gradient_files
from grads_dist.runtime.rundir import RunDir
from grads_dist.table.spans import Span, find_spans, overlapping, span_name

if TYPE_CHECKING:
    from grads_dist.probe.checkpoints import Position

log = logging.getLogger(__name__)

_TRAIN_SHARD = re.compile(r"shard-step(\d+)-rank\d+-rows(\d+)\.parquet")


class Shards(NamedTuple):
    """The shards of one kind that a sweep writes."""

    folder: Path
    prefix: str
    suffix: str

    def path(self, span: Span) -> Path:
        """The file of a span."""
        return self.folder / f"shard-{span_name(span, self.prefix)}{self.suffix}"

    def remove(self, spans: Iterable[Span]) -> None:
        """Remove the files of these spans."""
        for span in spans:
            self.path(span).unlink()

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
    rundir.sweep_up()
    written = sweeps(config, rundir)
    if config.probe.mode == "frozen":
        return Done({name: _complete(shards) for name, shards in written.items()})
    from grads_dist.probe.checkpoints import last_position

    position = last_position(rundir.checkpoints)
    if position is None:
        for name in (sweep_name("probe"), sweep_name("target")):
            # They are of the weights of a checkpoint that is gone.
            for shards in written.get(name, []):
                shards.remove(shards.spans())
    spans = {name: _complete(shards) for name, shards in written.items()}
    return Done(spans, position, _trained(config, rundir, position, num_rows))


def train_shards(rundir: RunDir) -> list[tuple[Path, int, int]]:
    """The shards of the epoch: path, steps made when it was written, and rows."""
    matches = ((path, _TRAIN_SHARD.fullmatch(path.name)) for path in rundir.scores_dir.glob("shard-step*"))
    return [(path, int(match.group(1)), int(match.group(2))) for path, match in matches if match is not None]


def _complete(written: list[Shards]) -> frozenset[Span]:
    """The complete spans of a sweep; other files of it are removed, since they would count twice."""
    if not written:
        return frozenset()
    found = written[-1].spans()
    # Ranks of a start that had lost its first rank may have gone on for some seconds beside the next one.
    spans = found - overlapping(found)
    for shards in written:
        shards.remove(shards.spans() - spans)
    return frozenset(spans)


def _trained(config: Config, rundir: RunDir, position: Position | None, num_rows: int) -> bool:
    """Whether the epoch has left all its rows; if not, shards newer than the last checkpoint are removed."""
    found = train_shards(rundir)
    if config.probe.warmup is None and sum(rows for _, _, rows in found) == num_rows:
        return not config.probe.save_model or rundir.model.is_dir()
    reached = position.step if position is not None else 0
    for path, steps, _ in found:
        if steps > reached:
            path.unlink()
    return False
