"""Shape of the outer-product kernel's tile, and how its work is spread over a device."""

from __future__ import annotations

from dataclasses import dataclass

PARTIAL_BYTES = 32
"""Size of a Partial (kernels/cuda/statistics.cuh)."""
RESERVED_SHARED_BYTES = 1 << 10
"""Shared memory that the system takes from every block."""
BLOCKS_PER_MULTIPROCESSOR = 8
"""Four rounds of two resident blocks: the last, partly filled one then costs little."""


@dataclass(frozen=True)
class Tile:
    """A block's tile of G_s = B_s^T A_s, in the names of kernels/cuda/outer_product.cu."""

    rows: int = 128
    """Columns of B."""
    cols: int = 128
    """Columns of A."""
    depth: int = 32
    """Tokens taken at a time."""
    stages: int = 4
    """Blocks of tokens that are being copied or multiplied."""
    warps_m: int = 2
    """Warps over the tile's rows."""
    warps_n: int = 4
    """Warps over the tile's columns."""
    blocks_per_multiprocessor: int = 2
    """Blocks that the registers have to be enough for; one with a batch gradient."""

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.warps_m * self.warps_n

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block, elements of two bytes."""
        return self.stages * self.depth * (self.rows + self.cols) * 2

    def macros(self) -> dict[str, int]:
        """What the source is compiled with."""
        return {
            "GD_TILE_M": self.rows,
            "GD_TILE_N": self.cols,
            "GD_DEPTH": self.depth,
            "GD_STAGES": self.stages,
            "GD_WARPS_M": self.warps_m,
            "GD_WARPS_N": self.warps_n,
            "GD_BLOCKS_PER_SM": self.blocks_per_multiprocessor,
        }


def tile_for(shared_bytes_per_multiprocessor: int) -> Tile:
    """The deepest pipeline of which two blocks fit on a multiprocessor: 4 stages on sm_90, 3 on sm_89."""
    tile = Tile()
    if 2 * (tile.shared_bytes + RESERVED_SHARED_BYTES) <= shared_bytes_per_multiprocessor:
        return tile
    return Tile(stages=3)


@dataclass(frozen=True)
class Grid:
    """How one launch covers all tiles of `num_samples` samples."""

    tiles_m: int
    tiles_n: int
    num_samples: int
    samples_per_block: int
    warps: int

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks in x (tiles) and y (groups of samples)."""
        return self.tiles_m * self.tiles_n, -(-self.num_samples // self.samples_per_block)

    @property
    def partials_per_sample(self) -> int:
        """One a tile and warp; depends on the matrix alone, never on the other samples."""
        return self.tiles_m * self.tiles_n * self.warps


def grid_for(
    tile: Tile, shape: tuple[int, int], num_samples: int, num_multiprocessors: int, with_total: bool
) -> Grid:
    """Spread a matrix [P, D] of `num_samples` samples over the device.

    With a total every block goes through all samples, which is what makes the sum deterministic; otherwise
    small matrices are given to more blocks by splitting the samples.
    """
    tiles_m, tiles_n = -(-shape[0] // tile.rows), -(-shape[1] // tile.cols)
    wanted = -(-num_multiprocessors * BLOCKS_PER_MULTIPROCESSOR // (tiles_m * tiles_n))
    groups = 1 if with_total else max(1, min(num_samples, wanted, 65535))
    return Grid(tiles_m, tiles_n, num_samples, -(-num_samples // groups), tile.warps)
