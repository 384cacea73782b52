"""The kernels' arguments, field by field as in kernels/cuda/*.cu: each kernel takes one of these by value."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_ubyte, c_void_p

TENSOR_MAP_BYTES = 128
"""Size of a CUtensorMap."""
TensorMap = c_ubyte * TENSOR_MAP_BYTES


class OuterProductParams(ctypes.Structure):
    """OuterProduct of outer_product.cu."""

    _fields_ = [
        ("b", c_void_p),
        ("a", c_void_p),
        ("ldb", c_int64),
        ("lda", c_int64),
        ("offsets", c_void_p),
        ("partials", c_void_p),
        ("total", c_void_p),
        ("ld_total", c_int64),
        ("weights", c_void_p),
        ("num_b_cols", c_int),
        ("num_a_cols", c_int),
        ("num_samples", c_int),
        ("samples_per_block", c_int),
        ("tiles_m", c_int),
        ("tiles_n", c_int),
    ]


class OuterProductSm90Params(ctypes.Structure):
    """OuterProductSm90 of outer_product_sm90.cu."""

    _fields_ = [
        ("map_b", TensorMap),
        ("map_a", TensorMap),
        ("offsets", c_void_p),
        ("partials", c_void_p),
        ("total", c_void_p),
        ("ld_total", c_int64),
        ("weights", c_void_p),
        ("num_b_cols", c_int),
        ("num_a_cols", c_int),
        ("num_samples", c_int),
        ("samples_per_unit", c_int),
        ("tiles_m", c_int),
        ("tiles_n", c_int),
    ]


class SecondStageParams(ctypes.Structure):
    """SecondStage of statistics.cuh."""

    _fields_ = [
        ("partials", c_void_p),
        ("ranges", c_void_p),
        ("offsets", c_void_p),
        ("slots", c_int64),
        ("left", c_void_p),
        ("right", c_void_p),
        ("sum", c_void_p),
        ("sumsq", c_void_p),
        ("low", c_void_p),
        ("high", c_void_p),
        ("nonfinite", c_void_p),
    ]


class RowRunsParams(ctypes.Structure):
    """RowRuns of rows.cu."""

    _fields_ = [
        ("b", c_void_p),
        ("ldb", c_int64),
        ("order", c_void_p),
        ("starts", c_void_p),
        ("run_offsets", c_void_p),
        ("partials", c_void_p),
        ("out", c_void_p),
        ("ld_out", c_int64),
        ("num_samples", c_int),
        ("num_cols", c_int),
        ("aligned", c_int),
        ("out_aligned", c_int),
    ]


class VectorSumsParams(ctypes.Structure):
    """VectorSums of rows.cu."""

    _fields_ = [
        ("b", c_void_p),
        ("x", c_void_p),
        ("ldb", c_int64),
        ("ldx", c_int64),
        ("rstd", c_void_p),
        ("mean", c_void_p),
        ("offsets", c_void_p),
        ("partials", c_void_p),
        ("num_cols", c_int),
        ("blocks_per_sample", c_int),
        ("aligned", c_int),
    ]


class RowSumsParams(ctypes.Structure):
    """RowSums of rows.cu."""

    _fields_ = [
        ("x", c_void_p),
        ("ld", c_int64),
        ("sum", c_void_p),
        ("sumsq", c_void_p),
        ("num_cols", c_int),
        ("aligned", c_int),
    ]


class SoftmaxGradientParams(ctypes.Structure):
    """SoftmaxGradient of head.cu."""

    _fields_ = [
        ("logits", c_void_p),
        ("gradient", c_void_p),
        ("ld_logits", c_int64),
        ("ld_gradient", c_int64),
        ("targets", c_void_p),
        ("logsumexp", c_void_p),
        ("loss", c_void_p),
        ("sum", c_void_p),
        ("sumsq", c_void_p),
        ("num_cols", c_int),
        ("aligned", c_int),
    ]


class ColumnBoundsParams(ctypes.Structure):
    """ColumnBounds of head.cu."""

    _fields_ = [
        ("gradient", c_void_p),
        ("ld", c_int64),
        ("row_weights", c_void_p),
        ("offsets", c_void_p),
        ("norms", c_void_p),
        ("weighted", c_void_p),
        ("num_cols", c_int),
        ("blocks_per_sample", c_int),
        ("aligned", c_int),
    ]
