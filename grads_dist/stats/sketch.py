"""Sketches of per-sample gradients: two-sided random projections that keep inner products in expectation.

The sketch of a weight's gradient G [P, D] is (1/k) Z_out^T G Z_in [k, k], with independent random signs
Z_out [P, k] and Z_in [D, k]. For two gradients E<sketch(G), sketch(H)> = <G, H>, and since every weight has
signs of its own, sketches of several weights add up to one of their concatenation (docs/definitions.md,
Gradient features). It costs T k (P + D) for T tokens, and no G is formed.

Shape legend: S samples, N packed rows, P outputs and D inputs of a weight, k size of a sketch's sides,
G groups.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from grads_dist.stats.gradients import Grouped, OuterProduct, SampleGradient, TouchedRows, VectorSum
from grads_dist.stats.ops import accumulation_dtype
from grads_dist.stats.segments import Segments
from grads_dist.stats.targets import Targets

BLOCK_ROWS = 4096
"""Rows that are converted to the accumulation type at a time."""


class Projection:
    """The random signs of one weight, made when first needed and kept on the device, one byte each.

    They depend on the arguments and the side alone: every rank and every device has the same. An expert of a
    layer has a projection of its own, `group(g)`.

    Args:
        seed: `probe.seed`.
        name: target and parameter, which keep the signs of different weights apart.
        size: k.
    """

    def __init__(self, seed: int, name: tuple[str, ...], size: int) -> None:
        self._seed, self._name, self.size = seed, name, size
        self._signs: dict[str, Tensor] = {}
        self._groups: dict[int, Projection] = {}

    def outputs(self, count: int, device: torch.device) -> Tensor:
        """Z_out, int8 [count, k]."""
        return self._side("out", count, device)

    def inputs(self, count: int, device: torch.device) -> Tensor:
        """Z_in, int8 [count, k]."""
        return self._side("in", count, device)

    def group(self, number: int) -> Projection:
        """The projection of one group."""
        if number not in self._groups:
            self._groups[number] = Projection(self._seed, (*self._name, str(number)), self.size)
        return self._groups[number]

    @property
    def num_bytes(self) -> int:
        """Memory of the signs made so far."""
        groups = sum(group.num_bytes for group in self._groups.values())
        return groups + sum(signs.numel() for signs in self._signs.values())

    def _side(self, side: str, count: int, device: torch.device) -> Tensor:
        if side not in self._signs:
            signs = random_signs((self._seed, *self._name, side), (count, self.size))
            self._signs[side] = torch.from_numpy(signs).to(device)
        assert len(self._signs[side]) == count
        return self._signs[side]


def random_signs(key: tuple[int | str, ...], shape: tuple[int, int]) -> np.ndarray:
    """Entries of +1 and -1 that depend on `key` alone, int8.

    By numpy's bit generator, whose stream is fixed; torch's generator on CPU reads but 32 bits of its seed.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    count = shape[0] * shape[1]
    words = np.random.PCG64(int.from_bytes(digest, "big")).random_raw(-(-count // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=count)
    return (2 * bits.astype(np.int8) - 1).reshape(shape)


def sketch(gradient: SampleGradient, projection: Projection) -> Tensor:
    """The sketch of every sample's gradient [S, k, k], float64 where the gradient is, else float32."""
    if isinstance(gradient, OuterProduct):
        left = project(gradient.b_NP, projection.outputs(gradient.b_NP.shape[1], gradient.b_NP.device))
        right = project(gradient.a_ND, projection.inputs(gradient.a_ND.shape[1], gradient.a_ND.device))
        return sample_products(left, right, gradient.segments)
    if isinstance(gradient, VectorSum):
        return _vector(gradient, projection)
    if isinstance(gradient, TouchedRows):
        rows, device = gradient.touched.rows, gradient.touched.rows.device
        signs = projection.outputs(gradient.num_embeddings, device)
        left = signs[gradient.touched.ids].to(accumulation_dtype(rows.dtype))
        right = project(rows, projection.inputs(rows.shape[1], device))
        return sample_products(left, right, gradient.touched.segments)
    if isinstance(gradient, Grouped):
        return _grouped(gradient, projection)
    return torch.zeros(gradient.num_samples, projection.size, projection.size, device=gradient.device)


def project(x_ND: Tensor, signs_Dk: Tensor) -> Tensor:
    """x Z [N, k] in the accumulation type, some rows at a time."""
    dtype = accumulation_dtype(x_ND.dtype)
    signs = signs_Dk.to(dtype)
    return torch.cat([rows.to(dtype) @ signs for rows in x_ND.split(BLOCK_ROWS)])


def sample_products(left_Nk: Tensor, right_Nk: Tensor, segments: Segments) -> Tensor:
    """(1/k) sum over each sample's rows of left_t right_t^T, [S, k, k]; zero for an empty sample."""
    size = left_Nk.shape[1]
    out = left_Nk.new_zeros(len(segments), size, size)
    for sample, length in enumerate(segments.lengths):
        if length:
            rows = slice(segments.offsets[sample], segments.offsets[sample + 1])
            torch.mm(left_Nk[rows].t(), right_Nk[rows], out=out[sample])
    return out / size


def _vector(gradient: VectorSum, projection: Projection) -> Tensor:
    """A vector is a weight with one input."""
    x, segments = gradient.x_ND, gradient.segments
    left = project(x, projection.outputs(x.shape[1], x.device))
    right = projection.inputs(1, x.device).to(left.dtype)
    return sample_products(left, right.expand(len(left), -1), segments)


def _grouped(gradient: Grouped, projection: Projection) -> Tensor:
    """Every group is a weight by itself."""
    inner = gradient.inner
    num_samples = len(inner.segments) // gradient.num_groups
    rows_of = inner.x_ND if isinstance(inner, VectorSum) else inner.b_NP
    dtype = accumulation_dtype(rows_of.dtype)
    total = torch.zeros(num_samples, projection.size, projection.size, dtype=dtype, device=rows_of.device)
    for group in range(gradient.num_groups):
        first = group * num_samples
        segments = Segments(inner.segments.lengths[first : first + num_samples])
        rows = slice(inner.segments.offsets[first], inner.segments.offsets[first + num_samples])
        if not segments.num_rows:
            continue
        one: SampleGradient
        if isinstance(inner, VectorSum):
            one = VectorSum(inner.x_ND[rows], segments)
        else:
            one = OuterProduct(inner.b_NP[rows], inner.a_ND[rows], segments)
        total += sketch(one, projection.group(group))
    return total


class Sketcher:
    """The projections of all weights of some targets.

    Args:
        targets: what is sketched; a weight in two targets counts twice, with signs of its own in each.
        seed: of the signs.
        dim: dimensions of a sketch, a square number k * k.
    """

    def __init__(self, targets: Targets, seed: int, dim: int) -> None:
        self.targets, self.dim = targets, dim
        size = math.isqrt(dim)
        self._projections: dict[str, list[Projection]] = {}
        for target, parameters in targets.members.items():
            for parameter in parameters:
                projection = Projection(seed, (target, parameter), size)
                self._projections.setdefault(parameter, []).append(projection)

    def of(self, parameter: str) -> tuple[Projection, ...]:
        """The projections of a parameter, one for each target that holds it."""
        return tuple(self._projections.get(parameter, ()))

    @property
    def parameters(self) -> frozenset[str]:
        """Parameters that some target holds."""
        return frozenset(self._projections)

    @property
    def num_bytes(self) -> int:
        """Memory of the signs made so far."""
        return sum(p.num_bytes for projections in self._projections.values() for p in projections)


def unit_length(vectors_SK: Tensor) -> Tensor:
    """Every row divided by its norm, which float16 then holds whatever the gradient's size; zeros stay,
    and a row with a value that is not finite becomes NaN."""
    vectors = vectors_SK.double()
    # First by the largest element: the squares of a tiny gradient would vanish.
    largest = vectors.abs().amax(1, keepdim=True)
    vectors = vectors / torch.where(largest == 0, 1.0, largest)
    norms = vectors.norm(dim=1, keepdim=True)
    return vectors / torch.where(norms == 0, 1.0, norms)
