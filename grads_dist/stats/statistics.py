"""Sufficient statistics of per-sample gradients: five numbers a sample that merge in any order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Statistics over all elements of S gradients (docs/definitions.md, Statistics).

    `sum`, `sumsq`, `min`, `max` are float64 [S], `nonfinite` is int64 [S]. They merge over tiles, weights
    and shards; the number of elements is a constant of the target and not kept here.
    """

    sum: Tensor
    sumsq: Tensor
    min: Tensor
    max: Tensor
    nonfinite: Tensor

    @classmethod
    def empty(cls, num_samples: int, device: torch.device) -> Statistics:
        """The neutral element of `merge`: no gradient elements seen yet."""
        zeros = torch.zeros(num_samples, dtype=torch.float64, device=device)
        return cls(
            sum=zeros,
            sumsq=zeros,
            min=torch.full_like(zeros, torch.inf),
            max=torch.full_like(zeros, -torch.inf),
            nonfinite=zeros.to(torch.int64),
        )

    @classmethod
    def concatenate(cls, parts: list[Statistics]) -> Statistics:
        """Statistics of the samples of all parts, in order."""
        names = ("sum", "sumsq", "min", "max", "nonfinite")
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of the concatenation of both gradients, sample by sample; NaN propagates."""
        return Statistics(
            sum=self.sum + other.sum,
            sumsq=self.sumsq + other.sumsq,
            min=torch.minimum(self.min, other.min),
            max=torch.maximum(self.max, other.max),
            nonfinite=self.nonfinite + other.nonfinite,
        )

    def scaled(self, factor: Tensor) -> Statistics:
        """Statistics of the gradients times `factor` [S]; a negative factor swaps min and max."""
        factor = factor.to(torch.float64)
        low, high = self.min * factor, self.max * factor
        return Statistics(
            sum=self.sum * factor,
            sumsq=self.sumsq * factor.square(),
            min=torch.minimum(low, high),
            max=torch.maximum(low, high),
            nonfinite=self.nonfinite,
        )

    def with_zeros(self, present: Tensor) -> Statistics:
        """Statistics when, where `present` [S] is true, elements equal to zero belong to the gradient too."""
        zero = torch.zeros_like(self.min)
        return Statistics(
            sum=self.sum,
            sumsq=self.sumsq,
            min=torch.where(present, torch.minimum(self.min, zero), self.min),
            max=torch.where(present, torch.maximum(self.max, zero), self.max),
            nonfinite=self.nonfinite,
        )

    def without_extremes(self) -> Statistics:
        """The same with minimum and maximum unknown: NaN."""
        unknown = torch.full_like(self.min, torch.nan)
        return Statistics(self.sum, self.sumsq, unknown, unknown.clone(), self.nonfinite)

    def mean(self, numel: int) -> Tensor:
        """sum / numel, float64 [S]."""
        return self.sum / numel

    def std(self, numel: int) -> Tensor:
        """sqrt(sumsq / numel - mean^2), float64 [S]; the population form, floored at 0."""
        return (self.sumsq / numel - self.mean(numel).square()).clamp_min(0).sqrt()

    def norm(self) -> Tensor:
        """sqrt(sumsq), float64 [S]."""
        return self.sumsq.sqrt()
