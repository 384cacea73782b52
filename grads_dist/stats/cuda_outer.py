"""The first stage of outer products' statistics: which of two kernels forms the partials, and its launch.

Shape legend: S samples, N packed rows, P outputs and D inputs of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from grads_dist.stats.cuda_images import OUTER, OUTER_SM90
from grads_dist.stats.cuda_launch import SUFFIXES, Launcher, address, on_16_bytes
from grads_dist.stats.cuda_params import OuterProductParams, OuterProductSm90Params, TensorMap
from grads_dist.stats.cuda_tile import Grid, HopperTile, grid_for

MMA_SYNC_BELOW: dict[bool, int] = {}
"""Elements of the matrix, by whether there is a batch gradient, below which mma.sync was measured faster.

Empty until that has been measured. A choice may look at the matrix and at nothing of the batch: a sample's
bits would depend on its neighbours.
"""


@dataclass(frozen=True)
class Operands:
    """All samples' rows; rows of `b` and `a` can be read in chunks of 16 bytes."""

    b_NP: Tensor
    a_ND: Tensor
    offsets: Tensor
    total_PD: Tensor | None
    weights: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """P and D."""
        return self.b_NP.shape[1], self.a_ND.shape[1]

    def kernel(self, prefix: str = "") -> str:
        """The kernel's name."""
        total = "" if self.total_PD is None else "_total"
        return f"{prefix}outer_product_stats{total}_{SUFFIXES[self.b_NP.dtype]}"

    def common(self, partials: Tensor, first: int, count: int, grid: Grid) -> dict[str, int | None]:
        """What both kernels are told of `count` samples from `first` on."""
        return {
            "offsets": address(self.offsets[first:]),
            "partials": address(partials),
            "total": address(self.total_PD),
            "ld_total": 0 if self.total_PD is None else self.total_PD.stride(0),
            "weights": address(self.weights[first:]),
            "num_b_cols": self.shape[0],
            "num_a_cols": self.shape[1],
            "num_samples": count,
            "tiles_m": grid.tiles_m,
            "tiles_n": grid.tiles_n,
        }


class MmaSync:
    """outer_product.cu, for sm_80 and later."""

    def __init__(self, launcher: Launcher, operands: Operands) -> None:
        self._launcher, self._operands = launcher, operands

    def grid(self, num_samples: int) -> Grid:
        """How a launch for so many samples is spread over the device."""
        sides, with_total = self._operands.shape, self._operands.total_PD is not None
        return grid_for(
            self._launcher.tile, sides, num_samples, self._launcher.num_multiprocessors, with_total
        )

    def launch(self, partials: Tensor, first: int, count: int) -> None:
        """Queue the partials of `count` samples from `first` on."""
        operands, grid, tile = self._operands, self.grid(count), self._launcher.tile
        params = OuterProductParams(
            b=address(operands.b_NP),
            a=address(operands.a_ND),
            ldb=operands.b_NP.stride(0),
            lda=operands.a_ND.stride(0),
            samples_per_block=grid.samples_per_block,
            **operands.common(partials, first, count, grid),
        )
        self._launcher.launch(OUTER, operands.kernel(), params, grid.blocks, tile.threads, tile.shared_bytes)


class Sm90:
    """outer_product_sm90.cu, for sm_90a."""

    def __init__(self, launcher: Launcher, tile: HopperTile, operands: Operands) -> None:
        self._launcher, self._tile, self._operands = launcher, tile, operands
        # Kept as long as their maps.
        self._matrices = _rows_apart(operands.b_NP), _rows_apart(operands.a_ND)
        # A matrix without rows has no map, and no sample needs it.
        self._maps = (
            [TensorMap.from_buffer_copy(launcher.tensor_map(x, tile.depth)) for x in self._matrices]
            if len(operands.b_NP)
            else None
        )

    def grid(self, num_samples: int) -> Grid:
        """How a launch for so many samples is spread over the device."""
        sides, with_total = self._operands.shape, self._operands.total_PD is not None
        return self._tile.grid(sides, num_samples, self._launcher.num_multiprocessors, with_total)

    def launch(self, partials: Tensor, first: int, count: int) -> None:
        """Queue the partials of `count` samples from `first` on."""
        if self._maps is None:
            return
        operands, grid = self._operands, self.grid(count)
        params = OuterProductSm90Params(
            map_b=self._maps[0],
            map_a=self._maps[1],
            samples_per_unit=grid.samples_per_block,
            **operands.common(partials, first, count, grid),
        )
        shared = self._tile.shared_bytes(operands.total_PD is not None)
        kernel = operands.kernel("sm90_")
        self._launcher.launch(OUTER_SM90, kernel, params, grid.blocks, self._tile.threads, shared)


def first_stage(launcher: Launcher, operands: Operands) -> MmaSync | Sm90:
    """On Hopper the kernel made for it, except where the other one was measured to be faster."""
    sides, with_total = operands.shape, operands.total_PD is not None
    if launcher.hopper is None or sides[0] * sides[1] < MMA_SYNC_BELOW.get(with_total, 0):
        return MmaSync(launcher, operands)
    return Sm90(launcher, launcher.hopper, operands)


def _rows_apart(x_NC: Tensor) -> Tensor:
    """The copy engine takes no rows that overlap, such as one row expanded to many."""
    return x_NC if x_NC.stride(0) >= x_NC.shape[1] else on_16_bytes(x_NC.contiguous())
