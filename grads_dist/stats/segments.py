"""Which tokens of a batch belong to which sample.

Shape legend: S samples, T padded length, N real tokens of the batch packed along one axis, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from grads_dist.stats.tensors import to_device


def counts_of_sorted(values_N: Tensor, size: int) -> list[int]:
    """How often each of 0, 1, ..., size - 1 is among sorted integers; the host waits for it, once."""
    ends = torch.searchsorted(values_N, torch.arange(size, device=values_N.device), right=True)
    return list(ends.diff(prepend=ends.new_zeros(1)).tolist())


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
        return self.offsets_tensor(device).diff()

    def offsets_tensor(self, device: torch.device) -> Tensor:
        """Offsets as int64 [S + 1] on `device`; made once, not to be changed."""
        found = self._offsets_on.get(device)
        if found is None:
            found = self._offsets_on[device] = to_device(self.offsets, torch.int64, device)
        return found

    @cached_property
    def _offsets_on(self) -> dict[torch.device, Tensor]:
        return {}

    def sample_of_row(self, device: torch.device) -> Tensor:
        """The sample that each packed row belongs to, int64 [N]."""
        samples = torch.arange(len(self), device=device)
        return samples.repeat_interleave(self.lengths_tensor(device), output_size=self.num_rows)

    def reduce(self, x_N: Tensor, how: str) -> Tensor:
        """`torch.segment_reduce` over each sample's rows: "sum", "mean", "min" or "max"."""
        # `unsafe` leaves out a check of the lengths, for which the host would wait for the device.
        return torch.segment_reduce(x_N, how, lengths=self.lengths_tensor(x_N.device), unsafe=True)


class BatchLayout:
    """A batch of S samples and the way from its tensors to packed rows [N].

    Args:
        lengths: real tokens of every sample.
        padded_length: T, the batch's token axis.
        real_ST: bool [S, T], true at real tokens; None where each sample's first `lengths` are.
    """

    def __init__(self, lengths: tuple[int, ...], padded_length: int, real_ST: Tensor | None = None) -> None:
        self.segments = Segments(lengths)
        self.padded_length = padded_length
        self._real = real_ST
        self._keep: Tensor | None = None

    @classmethod
    def from_mask(cls, real_ST: Tensor) -> BatchLayout:
        """The layout of a batch [S, T] whose real tokens, wherever they are, are true."""
        return cls(tuple(real_ST.sum(1).tolist()), real_ST.shape[1], real_ST.bool())

    @property
    def num_samples(self) -> int:
        """S."""
        return len(self.segments)

    @property
    def num_slots(self) -> int:
        """S * T, padding included."""
        return self.num_samples * self.padded_length

    def pack(self, x: Tensor, num_features: int) -> tuple[Tensor, Segments]:
        """A tensor whose leading axes are [S, T], [S, heads, T], [S * T] or only [S], as rows.

        Returns rows [N * r, num_features], r being the vectors of `num_features` that each token has, and
        their segments. Padding is dropped where there is a token axis; without one all of a sample is kept.
        Raises ValueError when the leading axes are not the batch's.
        """
        samples, length = self.num_samples, self.padded_length
        if x.dim() == 4 and x.shape[0] == samples and x.shape[2] == length:
            if x.shape[1] == length:
                # Heads and tokens are told apart by size alone; padding, if kept, has a zero gradient.
                return self._whole_samples(x, num_features)
            x = x.transpose(1, 2)
        if tuple(x.shape[:2]) == (samples, length) or x.shape[0] == self.num_slots:
            per_token = x.numel() // (self.num_slots * num_features)
            rows = x.reshape(self.num_slots, per_token * num_features)
            if self.segments.num_rows != self.num_slots:
                rows = rows.index_select(0, self._kept_slots(x.device))
            return rows.reshape(-1, num_features), self.segments.repeated(per_token)
        if x.shape[0] == samples:
            return self._whole_samples(x, num_features)
        raise ValueError(
            f"shape {tuple(x.shape)} does not start with the batch's {samples} samples or "
            f"{samples} x {length} tokens"
        )

    def pack_groups(self, slots_R: Tensor, groups_R: Tensor, num_groups: int) -> tuple[Tensor, Segments]:
        """Order routed rows by (group, sample).

        Args:
            slots_R: the slot in [0, S * T) that each routed row was copied from.
            groups_R: the group (expert) that it was routed to.
            num_groups: G.

        Returns which rows to take, padding left out, and their G * S segments, the first group's first.
        """
        samples = self.num_samples
        key_R = groups_R * samples + slots_R // self.padded_length
        if self.segments.num_rows != self.num_slots:
            real = torch.zeros(self.num_slots, dtype=torch.bool, device=slots_R.device)
            real[self._kept_slots(slots_R.device)] = True
            key_R = torch.where(real[slots_R], key_R, num_groups * samples)
        sorted_R, order_R = torch.sort(key_R, stable=True)
        segments = Segments(tuple(counts_of_sorted(sorted_R, num_groups * samples)))
        return order_R[: segments.num_rows], segments

    def _whole_samples(self, x: Tensor, num_features: int) -> tuple[Tensor, Segments]:
        rows = x.reshape(-1, num_features)
        return rows, Segments((rows.shape[0] // self.num_samples,) * self.num_samples)

    def _kept_slots(self, device: torch.device) -> Tensor:
        if self._keep is None or self._keep.device != device:
            if self._real is None:
                # Nothing has to be waited for, as for the positions of what is true it would be.
                before = torch.arange(self.num_samples, device=device) * self.padded_length
                before -= self.segments.offsets_tensor(device)[:-1]
                rows = torch.arange(self.segments.num_rows, device=device)
                self._keep = rows + before[self.segments.sample_of_row(device)]
            else:
                self._keep = self._real.to(device).flatten().nonzero().squeeze(1)
        return self._keep


class PackedLayout(BatchLayout):
    """The layout of rows that are packed already."""

    def __init__(self, segments: Segments) -> None:
        super().__init__(segments.lengths, max(segments.lengths, default=0))

    def pack(self, x: Tensor, num_features: int) -> tuple[Tensor, Segments]:
        """The rows as they are."""
        return x.reshape(-1, num_features), self.segments
