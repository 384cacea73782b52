"""Arguments of the CUDA kernels are those of the source; tiles and grids fit devices and cover the work."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
from kernel_emulator import KERNELS

from grads_dist.stats import cuda_launch, cuda_params
from grads_dist.stats.cuda_tile import HopperTile, Tile, grid_for, tile_for


@pytest.mark.parametrize(("struct", "file", "name"), [
    (cuda_params.OuterProductParams, "outer_product.cu", "OuterProduct"),
    (cuda_params.OuterProductSm90Params, "outer_product_sm90.cu", "OuterProductSm90"),
    (cuda_params.SecondStageParams, "statistics.cu", "SecondStage"),
    (cuda_params.RowRunsParams, "rows.cu", "RowRuns"),
    (cuda_params.VectorSumsParams, "rows.cu", "VectorSums"),
    (cuda_params.RowSumsParams, "rows.cu", "RowSums"),
    (cuda_params.SoftmaxGradientParams, "head.cu", "SoftmaxGradient"),
    (cuda_params.ColumnBoundsParams, "head.cu", "ColumnBounds"),
])  # fmt: skip
def test_arguments_are_those_of_the_source(struct, file, name):
    text = (KERNELS / "cuda" / file).read_text()
    body = re.search(rf"struct {name} \{{\n(.*?)\n\}};", text, re.DOTALL).group(1)
    fields = []
    for line in body.splitlines():
        declaration = line.partition("//")[0].strip().rstrip(";").removeprefix("const ")
        kind, _, names = declaration.replace("*", " *").partition(" ")
        for part in names.split(","):
            size = 8 if "*" in part else {"i64": 8, "TensorMap": 128}.get(kind, 4)
            fields.append((part.replace("*", "").strip(), size))
    assert fields == [(field, getattr(struct, field).size) for field, _ in struct._fields_]


def test_the_deepest_pipeline_of_which_two_blocks_fit():
    assert tile_for(228 << 10).stages == tile_for(164 << 10).stages == 4
    assert tile_for(100 << 10).stages == 3
    assert Tile().shared_bytes == 64 << 10


def test_the_rings_on_hopper_take_all_shared_memory():
    limit, stage = 227 << 10, {False: 48 << 10, True: 40 << 10}
    for with_total, size in stage.items():
        assert limit - size < HopperTile().shared_bytes(with_total) <= limit
    # The driver reads what the kernel declares: a multiple of the maps' alignment.
    assert ctypes.sizeof(cuda_params.OuterProductSm90Params) == 320


def test_blocks_cover_every_tile_and_sample():
    wide = grid_for(Tile(), (14336, 4096), 64, 132, with_total=False)
    assert wide.blocks == (112 * 32, 1) and wide.partials_per_sample == 112 * 32 * 8
    small = grid_for(Tile(), (129, 1), 100, 132, with_total=False)
    assert small.tiles_m == 2 and small.samples_per_block == 1 and small.blocks == (2, 100)
    middle = grid_for(Tile(), (1024, 1024), 100, 132, with_total=False)
    assert middle.blocks[0] * middle.blocks[1] >= 8 * 132
    assert (
        middle.blocks[1] * middle.samples_per_block >= 100 > (middle.blocks[1] - 1) * middle.samples_per_block
    )
    assert grid_for(Tile(), (129, 1), 100, 132, with_total=True).samples_per_block == 100


def test_units_of_hopper_cover_every_tile_and_sample():
    alone = HopperTile().grid((14336, 4096), 64, 132, with_total=False)
    assert alone.blocks == (132, 1) and alone.samples_per_block == 1
    assert alone.partials_per_sample == 112 * 16 * 8
    total = HopperTile().grid((14336, 4000), 64, 132, with_total=True)
    assert (total.tiles_m, total.tiles_n, total.samples_per_block) == (112, 21, 64)
    assert HopperTile().grid((129, 1), 3, 132, with_total=False).blocks == (6, 1)


def test_row_counts_beyond_the_kernels_int_are_refused():
    with pytest.raises(ValueError, match="count up to 2147483647"):
        cuda_launch.offsets_tensor([2**30, 2**30], torch.device("cpu"))
