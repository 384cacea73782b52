"""What all CUDA operations need: something that launches, tensors as kernels take them, the second stage."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from grads_dist.stats import cuda_driver
from grads_dist.stats.cuda_params import SecondStageParams
from grads_dist.stats.cuda_tile import PARTIAL_BYTES, HopperTile, Tile
from grads_dist.stats.statistics import Statistics
from grads_dist.stats.tensors import to_device

SUFFIXES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Ends of the kernels' names."""
SECOND_STAGE_THREADS = 256
"""kSecondStageThreads of statistics.cuh."""


class Launcher(Protocol):
    """What runs kernels: a device, or in the tests the emulator."""

    num_multiprocessors: int
    tile: Tile

    @property
    def hopper(self) -> HopperTile | None:
        """The tile of the outer products for sm_90a; None where they do not run."""

    def tensor_map(self, x_NC: Tensor, box_rows: int) -> bytes:
        """A matrix as the copy engine needs to know it, for boxes of 64 columns."""

    def launch(
        self,
        file: str,
        kernel: str,
        params: ctypes.Structure,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int = 0,
    ) -> None:
        """Queue one kernel of a file of kernels/cuda."""


def launcher_for(device: torch.device) -> Launcher:
    """The launcher of a tensor's device."""
    return cuda_driver.launcher_for(device)


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor begins; a null pointer for none."""
    return None if tensor is None else tensor.data_ptr()


def offsets_tensor(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Row offsets of the samples, int64 [S + 1]. Raises ValueError where rows do not fit the kernels' int."""
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    if offsets[-1] >= 2**31:
        raise ValueError(f"{offsets[-1]} packed rows; the CUDA kernels count up to {2**31 - 1}")
    return to_device(offsets, torch.int64, device)


def on_16_bytes(x_ND: Tensor) -> Tensor:
    """`x` itself where its rows can be read 16 bytes at a time, the last past its end; else such a copy."""
    chunk = 16 // x_ND.itemsize
    width = -(-x_ND.shape[1] // chunk) * chunk
    last = x_ND.storage_offset() + (x_ND.shape[0] - 1) * x_ND.stride(0) + width
    readable = last * x_ND.itemsize <= x_ND.untyped_storage().nbytes()
    aligned = x_ND.stride(0) % chunk == 0 and x_ND.data_ptr() % 16 == 0
    if x_ND.stride(1) == 1 and aligned and readable:
        return x_ND
    padded = torch.empty(x_ND.shape[0], width, dtype=x_ND.dtype, device=x_ND.device)
    return padded[:, : x_ND.shape[1]].copy_(x_ND)


def fours_aligned(x_ND: Tensor) -> bool:
    """Whether four elements from any multiple of four in a row can be loaded at once."""
    size = 4 * x_ND.itemsize
    return x_ND.stride(0) * x_ND.itemsize % size == 0 and x_ND.data_ptr() % size == 0


def empty_partials(count: int, device: torch.device) -> Tensor:
    """Room for the first stage's results."""
    return torch.empty(count * PARTIAL_BYTES, dtype=torch.uint8, device=device)


class Results:
    """Statistics of S samples, filled by the second stage."""

    def __init__(self, num_samples: int, device: torch.device) -> None:
        # Tensors of their own: what an operator returns may share no memory.
        self.sum, self.sumsq, self.low, self.high = (
            torch.empty(num_samples, dtype=torch.float64, device=device) for _ in range(4)
        )
        self.nonfinite = torch.empty(num_samples, dtype=torch.int64, device=device)

    def join(
        self,
        launcher: Launcher,
        partials: Tensor,
        samples: range,
        *,
        slots: int = 0,
        offsets: Tensor | None = None,
        ranges: Tensor | None = None,
        factors: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Join the partials of `samples`: `slots` each, or those that `ranges` [S + 1] gives to each.

        With `offsets` [S + 1] a sample without rows gets zeros, whatever its partials hold. With `factors`,
        float64 [N] each, a sample's sum is that of their products over its rows.
        """
        first = samples.start
        left, right = factors or (None, None)
        params = SecondStageParams(
            partials=address(partials),
            ranges=address(None if ranges is None else ranges[first:]),
            offsets=address(None if offsets is None else offsets[first:]),
            slots=slots,
            left=address(left),
            right=address(right),
            sum=address(self.sum[first:]),
            sumsq=address(self.sumsq[first:]),
            low=address(self.low[first:]),
            high=address(self.high[first:]),
            nonfinite=address(self.nonfinite[first:]),
        )
        if samples:
            launcher.launch("statistics.cu", "join_partials", params, (len(samples), 1), SECOND_STAGE_THREADS)

    def statistics(self) -> Statistics:
        """The five numbers of every sample."""
        return Statistics(self.sum, self.sumsq, self.low, self.high, self.nonfinite)
