"""Shapes of the outer-product kernels' tiles, and how their work is spread over a device."""

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
class HopperTile:
    """A block's tiles on sm_90a, in the names of kernels/cuda/outer_product_sm90.cu; each has 128 rows.

    With a batch gradient a lane holds two sets of accumulators, so that tile is narrower.
    """

    cols: int = 256
    """Columns of A."""
    stages: int = 4
    """Slices of tokens in the ring: what fits into shared memory."""
    total_cols: int = 192
    """The same with a batch gradient."""
    total_stages: int = 5
    """The same with a batch gradient."""
    depth: int = 64
    """Tokens of a slice."""

    rows = 128
    """Columns of B."""
    warps = 8
    """Warps that multiply, each 16 rows."""
    threads = 384
    """Two warpgroups that multiply and one that copies."""

    def shared_bytes(self, with_total: bool) -> int:
        """Shared memory of a block: the ring on a multiple of 1 KiB, and three barriers a stage."""
        cols, stages = self._tile(with_total)
        return 1024 + stages * (self.depth * (self.rows + cols) * 2 + 3 * 8)

    def macros(self) -> dict[str, int]:
        """What the source is compiled with."""
        return {
            "GD_TILE_N": self.cols,
            "GD_STAGES": self.stages,
            "GD_TOTAL_TILE_N": self.total_cols,
            "GD_TOTAL_STAGES": self.total_stages,
            "GD_DEPTH": self.depth,
        }

    def grid(
        self, shape: tuple[int, int], num_samples: int, num_multiprocessors: int, with_total: bool
    ) -> Grid:
        """One block a multiprocessor, which takes one unit of work after another.

        A unit is a tile of one sample; with a total it is a tile of all samples.
        """
        tiles_m, tiles_n = -(-shape[0] // self.rows), -(-shape[1] // self._tile(with_total)[0])
        units = tiles_m * tiles_n * (1 if with_total else num_samples)
        blocks = (min(units, num_multiprocessors), 1)
        return Grid(tiles_m, tiles_n, num_samples if with_total else 1, self.warps, blocks)

    def _tile(self, with_total: bool) -> tuple[int, int]:
        return (self.total_cols, self.total_stages) if with_total else (self.cols, self.stages)


@dataclass(frozen=True)
class Grid:
    """How one launch covers all tiles of some samples."""

    tiles_m: int
    tiles_n: int
    samples_per_block: int
    """Samples of a block; on sm_90a of a unit of its work."""
    warps: int
    blocks: tuple[int, int]
    """Blocks in x and y."""

    @property
    def partials_per_sample(self) -> int:
        """One a tile and warp; depends on the matrix alone, never on the other samples."""
        return self.tiles_m * self.tiles_n * self.warps


def grid_for(
    tile: Tile, shape: tuple[int, int], num_samples: int, num_multiprocessors: int, with_total: bool
) -> Grid:
    """Spread a matrix [P, D] of `num_samples` samples over the device: tiles in x, groups of samples in y.

    With a total every block goes through all samples, which is what makes the sum deterministic; otherwise
    small matrices are given to more blocks by splitting the samples.
    """
    tiles_m, tiles_n = -(-shape[0] // tile.rows), -(-shape[1] // tile.cols)
    wanted = -(-num_multiprocessors * BLOCKS_PER_MULTIPROCESSOR // (tiles_m * tiles_n))
    groups = 1 if with_total else max(1, min(num_samples, wanted, 65535))
    samples_per_block = -(-num_samples // groups)
    blocks = (tiles_m * tiles_n, -(-num_samples // samples_per_block))
    return Grid(tiles_m, tiles_n, samples_per_block, tile.warps, blocks)
