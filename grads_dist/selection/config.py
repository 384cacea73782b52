"""Options of the selection: what is scored, how it is picked and how much of it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from grads_dist.errors import ConfigError

Criterion = Literal["grads", "random", "length_matched_random", "loss", "grand", "el2n", "rds", "less"]
SignalPreset = Literal["paper", "norm"]
Gradient = Literal["density", "magnitude", "density_magnitude", "flatten", "rare", "band", "zscore"]
Bandwidth = Literal["silverman", "isj"]
Pick = Literal["topk", "mmr", "facility_location", "cluster", "gumbel"]
DensityOver = Literal["signal", "targets"]

DEFAULT_FRACTION = 0.1
_SCORED_BY_TERMS = ("grads", "length_matched_random")
LONGEST_NAME = 100
"""Characters of `name`; file systems allow 255 bytes."""


@dataclass(frozen=True)
class Weights:
    """Weights of the terms of the score w_g G + w_d D - w_r R; a weight of 0 is the ablation of its term."""

    g: float = 1.0
    """Weight of the gradient criterion G."""

    d: float = 0.5
    """Weight of the content diversity D."""

    r: float = 1.0
    """Weight of the similarity reduction R, which is subtracted."""

    def __post_init__(self) -> None:
        """Refuse what cannot be used; raises `ConfigError` naming the field."""
        for name in ("g", "d", "r"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(
                    f"selection.weights.{name}: {value} is not allowed; allowed: a number of at least 0"
                )


@dataclass(frozen=True)
class Output:
    """How the subset is written."""

    scores: bool = False
    """Add the columns grads_score and grads_rank to the rows, which then are no longer the original bytes."""

    rows_per_file: int | None = None
    """Rows of each file of the subset; all in one file by default."""

    def __post_init__(self) -> None:
        """Refuse what cannot be used; raises `ConfigError` naming the field."""
        if self.rows_per_file is not None and self.rows_per_file < 1:
            raise ConfigError(
                f"selection.output.rows_per_file: {self.rows_per_file} is not allowed; "
                "allowed: a whole number of at least 1, or null"
            )


@dataclass(frozen=True)
class SelectionConfig:
    """Which rows are selected; give at most one of fraction, rows and tokens."""

    name: str = "default"
    """Name of the folder under selection/, so that several selections of one run live side by side."""

    fraction: float | None = None
    """Budget as a share of the scored rows, above 0 and at most 1 (0.1 when no budget is given)."""

    rows: int | None = None
    """Budget as a number of rows."""

    tokens: int | None = None
    """Budget as a number of tokens: the longest prefix of the ranking that fits."""

    criterion: Criterion = "grads"
    """What ranks the rows: grads, or a control: random, length_matched_random, loss, grand, el2n, and by
    closeness to data.target rds (of content features) and less (of gradient features)."""

    signal: SignalPreset | list[str] = "paper"
    """Signal of a row: paper, norm, or a list of columns of the score table (mean of their z-scores)."""

    gradient: Gradient = "density_magnitude"
    """Gradient criterion G: density, magnitude, density_magnitude, flatten, rare, band or zscore."""

    weights: Weights = field(default_factory=Weights)
    """Weights of the terms of the score."""

    density_over: DensityOver = "signal"
    """What the density is over: the signal, or the signals of the two targets together (targets)."""

    bandwidth: Bandwidth = "silverman"
    """Bandwidth rule of the density estimate: silverman or isj."""

    length_adjust: bool = True
    """Remove from the signal what the number of label tokens explains."""

    detrend: bool = False
    """Remove from the signal its trend over the steps of the preliminary epoch (mode train)."""

    band: tuple[float, float] = (0.25, 0.75)
    """Quantile range of the signal that the criterion band keeps."""

    zscore: float = 2.0
    """Largest absolute z-score of the signal that the criterion zscore keeps."""

    pick: Pick = "topk"
    """How rows are picked: topk (the best scores), mmr (the best score, with the similarity reduction against
    what is already picked), facility_location (G and how well the picked cover the corpus), cluster (the best
    scores of each k-means cluster, in shares), gumbel (drawn by score)."""

    temperature: float = 0.1
    """Of pick gumbel: scores are divided by it; towards 0 it becomes topk."""

    clusters: int | None = None
    """Of pick cluster: number of clusters; the square root of the number of candidates if unset."""

    stratify_by: str | None = None
    """Column of the corpus or the score table; each of its values keeps its share of the budget."""

    dedup_threshold: float | None = None
    """Keep no two rows whose cosine is at least this: the best row of a group of near-duplicates stays."""

    keep_duplicates: bool = False
    """Treat rows with equal token ids as rows of their own instead of collapsing them to the first."""

    seed: int = 0
    """Seed of everything random in the selection."""

    output: Output = field(default_factory=Output)
    """How the subset is written."""

    def __post_init__(self) -> None:
        """Refuse what cannot be used; raises `ConfigError` naming the field."""
        if not re.fullmatch(r"[\w][\w.+-]*", self.name):
            raise ConfigError(
                f"selection.name: {self.name!r} is not a folder name (letters, digits and _ . + -)"
            )
        if len(self.name) > LONGEST_NAME:
            raise ConfigError(
                f"selection.name: {self.name!r} is too long; allowed: at most {LONGEST_NAME} characters"
            )
        # A list from a file and a tuple from Python are the same configuration.
        object.__setattr__(self, "band", tuple(self.band))
        self._check_choices()
        self._check_budget()
        self._check_ranges()

    @property
    def has_budget(self) -> bool:
        """Whether a budget was given."""
        return any(value is not None for value in (self.fraction, self.rows, self.tokens))

    def _check_choices(self) -> None:
        choices = {"criterion": Criterion, "gradient": Gradient, "bandwidth": Bandwidth, "pick": Pick}
        choices["density_over"] = DensityOver
        if isinstance(self.signal, str):
            choices["signal"] = SignalPreset
        elif not self.signal:
            raise ConfigError(
                "selection.signal: [] is not allowed; allowed: paper, norm or a list of columns"
            )
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise ConfigError(f"selection.{name}: {value!r} is not one of {', '.join(get_args(allowed))}")
        if self.pick in ("mmr", "facility_location") and self.criterion not in _SCORED_BY_TERMS:
            raise ConfigError(
                f"selection.pick: {self.pick} weighs the terms of the score, which {self.criterion} has not; "
                "allowed with this criterion: topk, cluster, gumbel"
            )

    def _check_budget(self) -> None:
        given = [name for name in ("fraction", "rows", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(
                f"selection.{given[1]}: {getattr(self, given[1])} is not allowed "
                f"beside selection.{given[0]}; allowed: one budget, with the others null"
            )
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ConfigError(
                f"selection.fraction: {self.fraction} is not allowed; allowed: a number above 0 and at most 1"
            )
        for name in ("rows", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(
                    f"selection.{name}: {value} is not allowed; allowed: a whole number of at least 1"
                )

    def _check_ranges(self) -> None:
        if len(self.band) != 2 or not 0 <= self.band[0] < self.band[1] <= 1:
            raise ConfigError(
                f"selection.band: {list(self.band)} is not allowed; "
                "allowed: two quantiles [low, high], 0 <= low < high <= 1"
            )
        if not (math.isfinite(self.zscore) and self.zscore > 0):
            raise ConfigError(f"selection.zscore: {self.zscore} is not allowed; allowed: a number above 0")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(
                f"selection.temperature: {self.temperature} is not allowed; allowed: a number above 0"
            )
        if self.clusters is not None and self.clusters < 1:
            raise ConfigError(
                f"selection.clusters: {self.clusters} is not allowed; "
                "allowed: a whole number of at least 1, or null"
            )
        if self.stratify_by is not None and not self.stratify_by:
            raise ConfigError(
                "selection.stratify_by: '' is not allowed; allowed: the name of a column, or null"
            )
        threshold = self.dedup_threshold
        if threshold is not None and not 0 < threshold <= 1:
            raise ConfigError(
                f"selection.dedup_threshold: {threshold} is not allowed; "
                "allowed: a cosine above 0 and at most 1, or null"
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(
                f"selection.seed: {self.seed} is not allowed; allowed: a whole number in 0 .. {2**63 - 1}"
            )
