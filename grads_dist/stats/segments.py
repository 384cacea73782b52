"""Which tokens of a batch belong to which sample.

Shape legend: S samples, T padded length, N real tokens of the batch packed along one axis, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Consecutive runs of packed rows, one a sample.

    `lengths` holds S row counts (0 is allowed); row offsets follow from them.
    """

    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """S + 1 row offsets, from 0 to N."""
        offsets = [0]
        for length in self.lengths:
            offsets.append(offsets[-1] + length)
        return tuple(offsets)

    @property
    def num_rows(self) -> int:
        """N, the packed rows of all samples together."""
        return self.offsets[-1]

    def repeated(self, times: int) -> Segments:
        """The same samples with every row replaced by `times` rows (attention heads, say)."""
        return self if times == 1 else Segments(tuple(length * times for length in self.lengths))

    def lengths_tensor(self, device: torch.device) -> Tensor:
        """Lengths as int64 [S] on `device`."""
        return torch.tensor(self.lengths, dtype=torch.int64, device=device)

    def sample_of_row(self, device: torch.device) -> Tensor:
        """The sample that each packed row belongs to, int64 [N]."""
        samples = torch.arange(len(self), device=device)
        return samples.repeat_interleave(self.lengths_tensor(device), output_size=self.num_rows)


class BatchLayout:
    """A right-padded batch [S, T] and the way from it to packed rows [N].

    Args:
        lengths: real tokens of every sample, each at most `padded_length`.
        padded_length: T.
    """

    def __init__(self, lengths: tuple[int, ...], padded_length: int) -> None:
        self.segments = Segments(lengths)
        self.padded_length = padded_length
        self._keep: Tensor | None = None

    @property
    def num_samples(self) -> int:
        """S."""
        return len(self.segments)

    def pack(self, x_STD: Tensor, num_features: int) -> tuple[Tensor, Segments]:
        """Drop the padding of a tensor whose leading axes are [S, T], [S, heads, T] or [S * T].

        Returns rows [N * r, num_features], r being the vectors of `num_features` that each token has, and
        their segments. Raises ValueError when the leading axes are not the batch's. (`collate` pads so that
        T is no number of heads.)
        """
        if x_STD.dim() == 4 and x_STD.shape[1] != self.padded_length == x_STD.shape[2]:
            x_STD = x_STD.transpose(1, 2)
        num_slots = self.num_samples * self.padded_length
        leading = tuple(x_STD.shape[:2]) == (self.num_samples, self.padded_length)
        if not leading and x_STD.shape[0] != num_slots:
            raise ValueError(
                f"shape {tuple(x_STD.shape)} does not start with the batch's "
                f"{self.num_samples} x {self.padded_length} tokens"
            )
        per_token = x_STD.numel() // (num_slots * num_features)
        rows = x_STD.reshape(num_slots, per_token * num_features)
        if self.segments.num_rows != num_slots:
            rows = rows.index_select(0, self._kept_slots(x_STD.device))
        return rows.reshape(-1, num_features), self.segments.repeated(per_token)

    def _kept_slots(self, device: torch.device) -> Tensor:
        if self._keep is None or self._keep.device != device:
            lengths = self.segments.lengths_tensor(device)
            slots = torch.arange(self.padded_length, device=device)
            self._keep = (slots[None, :] < lengths[:, None]).flatten().nonzero().squeeze(1)
        return self._keep
