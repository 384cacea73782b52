"""What is asked of the LM head's pass, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grads_dist.stats.segments import Segments
from grads_dist.stats.statistics import Statistics

if TYPE_CHECKING:
    from grads_dist.stats.sketch import Projection


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to W h + b before the softmax: cap * tanh(scale * (W h + b) / cap)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        """Final logits from the head's output; works in place on `raw`."""
        if self.scale != 1.0:
            raw = raw.mul_(self.scale)
        if self.softcap is not None:
            raw = raw.div_(self.softcap).tanh_().mul_(self.softcap)
        return raw

    def derivative(self, logits: Tensor) -> Tensor | float:
        """d logits / d raw, elementwise, from the final logits."""
        if self.softcap is None:
            return self.scale
        return (1 - (logits / self.softcap).square()) * self.scale


@dataclass(frozen=True)
class HeadProjections:
    """The projections that the gradients of the head's weight and bias are sketched by, all summed."""

    weight: tuple[Projection, ...]
    bias: tuple[Projection, ...]


@dataclass(frozen=True)
class HeadRequest:
    """What is wanted of the head's pass.

    Args:
        segments: label positions of every sample; each has at least one.
        sample_weights: weight of each sample's loss in the batch's total, float64 [S].
        transform: from the head's output to logits.
        chunk_positions: label positions whose logits may exist at a time.
        with_stats: compute the statistics of the head's gradient.
        kept_ids: for a tied weight, each sample's sorted distinct input ids, whose rows of G are kept and
            left out of `rest`.
        extremes: whether minimum and maximum are wanted.
        projections: sketch the head's gradient by these; None for no sketch.
    """

    segments: Segments
    sample_weights: Tensor
    transform: LogitTransform
    chunk_positions: int
    with_stats: bool
    kept_ids: tuple[Tensor, ...] | None = None
    projections: HeadProjections | None = None
    extremes: bool = True


@dataclass
class HeadResult:
    """What one pass over the label positions yields, all unweighted and per sample."""

    losses: Tensor = field(default_factory=lambda: torch.empty(0))
    """Mean cross-entropy over the sample's label tokens, float32 or float64 [S]."""
    el2n: Tensor = field(default_factory=lambda: torch.empty(0))
    """Mean over the sample's label positions of the norm of softmax minus one-hot [S]."""
    weight_stats: Statistics | None = None
    """Statistics of the gradient of the head's weight."""
    bias_stats: Statistics | None = None
    rest_stats: Statistics | None = None
    """With `kept_ids`: statistics of the weight's gradient over all rows but those."""
    kept_rows: list[Tensor] = field(default_factory=list)
    """With `kept_ids`: the rows of G at those ids, one [len(ids), D] tensor a sample."""
    sketch: Tensor | None = None
    """With `projections`: the sketch of the head's gradient [S, k, k]."""
    rows_formed: int = 0
    """Rows of G that were formed for samples whose extremes a bound vouches for (certificate.py)."""
    num_certified: int = 0
    """How many such samples there were."""
    num_formed_whole: int = 0
    """Samples whose G was formed although no weight gradient was wanted of it."""
    factors: Tensor | None = None
    """Set by the backward pass: what each sample's loss was multiplied by on its way to the gradients [S]."""
