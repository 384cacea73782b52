"""The statistics operations against dense float64 gradients, and the algebra of Statistics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grads_dist.stats import ops
from grads_dist.stats.segments import BatchLayout, Segments
from grads_dist.stats.statistics import Statistics

FIELDS = ("sum", "sumsq", "min", "max", "nonfinite")
EPS = torch.finfo(torch.float32).eps
EDGES = (0, 1, 15, 16, 17, 63, 64, 65)
CPU = torch.device("cpu")

shapes = st.tuples(
    st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 130)
)


def draw(lengths, width: int, dtype=torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), width, generator=generator).to(dtype)


def of_sample(x: Tensor, segments: Segments, i: int) -> Tensor:
    return x[segments.offsets[i] : segments.offsets[i + 1]]


def assert_near(found: Statistics, gradients: list[Tensor], errors: list[Tensor]) -> None:
    """Compare with dense float64 gradients whose elements may each be wrong by `errors`.

    sumsq then moves by 2 |g| |e| + |e|^2, and its rows are summed in float32.
    """
    faults = []
    for i, (g, e) in enumerate(zip(gradients, errors, strict=True)):
        row_rounding = g.shape[-1] * EPS * g.square().sum()
        bounds = {
            "sum": e.sum() + 1e-12 * g.abs().sum(),
            "sumsq": 2 * g.norm() * e.norm() + e.square().sum() + row_rounding,
            "min": e.max(),
            "max": e.max(),
        }
        truth = {"sum": g.sum(), "sumsq": g.square().sum(), "min": g.min(), "max": g.max()}
        for name, value in truth.items():
            error = (getattr(found, name)[i] - value).abs()
            if not error <= bounds[name] + 1e-30:
                faults.append(f"sample {i} {name}: {error:.3g} off, {bounds[name]:.3g} allowed")
        if found.nonfinite[i] != 0:
            faults.append(f"sample {i} nonfinite: {found.nonfinite[i]}")
    assert not faults, "\n".join(faults)


def outer_truth(b: Tensor, a: Tensor, segments: Segments) -> tuple[list[Tensor], list[Tensor]]:
    """Dense gradients, and the error of a float32 sum of T products: (T + 1) eps sum |b| |a|."""
    gradients, errors = [], []
    for i, length in enumerate(segments.lengths):
        b_i, a_i = (of_sample(x, segments, i).double() for x in (b, a))
        gradients.append(b_i.t() @ a_i)
        errors.append((length + 1) * EPS * (b_i.abs().t() @ a_i.abs()))
    return gradients, errors


def summed_truth(x: Tensor, segments: Segments) -> tuple[list[Tensor], list[Tensor]]:
    """Sums of each sample's rows, and their error in float32."""
    parts = [of_sample(x, segments, i).double() for i in range(len(segments))]
    errors = [(len(part) + 1) * EPS * part.abs().sum(0) for part in parts]
    return [part.sum(0) for part in parts], errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 123), (123, 5), (1, 1), (16, 16), (17, 65)])
def test_outer_products(dtype, shape):
    segments = Segments(EDGES)
    b, a = draw(EDGES, shape[0], dtype), draw(EDGES, shape[1], dtype, seed=1)
    assert_near(ops.outer_product_stats(b, a, segments), *outer_truth(b, a, segments))


@settings(max_examples=30, deadline=None)
@given(shapes)
def test_outer_products_of_any_shape(shape):
    lengths, outputs, inputs = shape
    segments = Segments(tuple(lengths))
    b, a = draw(lengths, outputs), draw(lengths, inputs, seed=1)
    assert_near(ops.outer_product_stats(b, a, segments), *outer_truth(b, a, segments))


def test_sums_of_outer_products_come_from_float64():
    """A head's gradient sums to 0 but for rounding: the sum must not add rounding of its own."""
    segments = Segments(EDGES)
    b, a = draw(EDGES, 5), draw(EDGES, 123, seed=1)
    found = ops.outer_product_stats(b, a, segments)
    gradients, errors = outer_truth(b, a, segments)
    for i, (g, e) in enumerate(zip(gradients, errors, strict=True)):
        assert abs(found.sum[i] - g.sum()) <= 1e-14 * (e / EPS).sum()


def test_outer_products_in_float64_are_exact_to_rounding():
    segments = Segments(EDGES)
    b, a = draw(EDGES, 5, torch.float64), draw(EDGES, 123, torch.float64, seed=1)
    found = ops.outer_product_stats(b, a, segments)
    gradients, _ = outer_truth(b, a, segments)
    torch.testing.assert_close(
        found.sumsq, torch.stack([g.square().sum() for g in gradients]), rtol=1e-13, atol=0
    )
    torch.testing.assert_close(found.max, torch.stack([g.max() for g in gradients]), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors(dtype):
    segments = Segments(EDGES)
    x = draw(EDGES, 123, dtype)
    assert_near(ops.vector_stats(x, segments), *summed_truth(x, segments))


@settings(max_examples=30, deadline=None)
@given(shapes)
def test_vectors_of_any_shape(shape):
    lengths, _, width = shape
    segments = Segments(tuple(lengths))
    x = draw(lengths, width)
    assert_near(ops.vector_stats(x, segments), *summed_truth(x, segments))


def embedding_truth(b: Tensor, ids: Tensor, segments: Segments, vocab: int, padding_idx: int | None):
    gradients, errors = [], []
    for i in range(len(segments)):
        b_i, ids_i = of_sample(b, segments, i).double(), of_sample(ids, segments, i)
        kept = torch.ones_like(ids_i, dtype=torch.bool) if padding_idx is None else ids_i != padding_idx
        zeros = torch.zeros(vocab, b.shape[1], dtype=torch.float64)
        gradients.append(zeros.index_add(0, ids_i[kept], b_i[kept]))
        errors.append((len(ids_i) + 1) * EPS * zeros.index_add(0, ids_i[kept], b_i[kept].abs()))
    return gradients, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding_idx", [None, 0, 3])
def test_embeddings(dtype, padding_idx):
    segments, vocab = Segments(EDGES), 11
    b = draw(EDGES, 123, dtype)
    ids = torch.randint(0, vocab - 1, (sum(EDGES),), generator=torch.Generator().manual_seed(2))
    rows = ops.EmbeddingRows(b, ids, segments, padding_idx)
    found = ops.embedding_stats(rows, vocab)
    assert_near(found, *embedding_truth(b, ids, segments, vocab, padding_idx))


def test_embedding_whose_every_row_is_touched_counts_no_zeros():
    ids, b = torch.tensor([1, 0]), torch.tensor([[2.0], [3.0]])
    segments = Segments((2,))
    touched = ops.embedding_stats(ops.EmbeddingRows(b, ids, segments), 2)
    absent = ops.embedding_stats(ops.EmbeddingRows(b, ids, segments), 3)
    assert (touched.min.item(), absent.min.item()) == (2.0, 0.0)


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(1, 6))
def test_embedding_rows_are_sums_over_repeated_ids_in_ascending_order(shape, vocab):
    lengths, _, width = shape
    segments = Segments(tuple(lengths))
    b = draw(lengths, width)
    ids = torch.randint(0, vocab, (sum(lengths),), generator=torch.Generator().manual_seed(3))
    rows = ops.EmbeddingRows(b, ids, segments)
    for i in range(len(lengths)):
        b_i, ids_i = of_sample(b, segments, i), of_sample(ids, segments, i)
        tokens = of_sample(rows.ids, rows.segments, i)
        assert tokens.tolist() == sorted(set(ids_i.tolist()))
        for token, row in zip(tokens, of_sample(rows.rows, rows.segments, i), strict=True):
            torch.testing.assert_close(row, b_i[ids_i == token].sum(0), rtol=1e-5, atol=1e-5)


def test_ragged_rows():
    segments = Segments((2, 1, 4))
    x = draw(segments.lengths, 123)
    dense = [of_sample(x, segments, i).double() for i in range(3)]
    assert_near(ops.ragged_row_stats(x, segments), dense, [torch.zeros_like(g) for g in dense])


def assert_same_bits(found: Statistics, truth: Statistics) -> None:
    faults = [k for k in FIELDS if not torch.equal(getattr(found, k), getattr(truth, k))]
    assert not faults, [(getattr(found, k), getattr(truth, k)) for k in faults]


def test_samples_without_rows():
    empty = Statistics.empty(2, CPU)
    assert_same_bits(ops.ragged_row_stats(torch.empty(0, 4), Segments((0, 0))), empty)
    some = ops.ragged_row_stats(torch.ones(1, 4), Segments((0, 1, 0)))
    assert some.sum.tolist() == [0, 4, 0]
    assert some.min.tolist() == [torch.inf, 1, torch.inf] and some.max.tolist() == [-torch.inf, 1, -torch.inf]


@pytest.mark.parametrize("lengths", [(0,), (0, 3, 0), (2, 0)])
def test_gradients_of_empty_samples_are_zero(lengths):
    segments = Segments(lengths)
    b, a = draw(lengths, 5), draw(lengths, 7, seed=1)
    ids = torch.arange(sum(lengths))
    for found in (
        ops.outer_product_stats(b, a, segments),
        ops.vector_stats(b, segments),
        ops.embedding_stats(ops.EmbeddingRows(b, ids, segments), 9),
    ):
        for i, length in enumerate(lengths):
            if length == 0:
                assert [getattr(found, name)[i].item() for name in FIELDS] == [0, 0, 0, 0, 0]


OPERATIONS = {
    "outer": lambda b, a, ids, segments: ops.outer_product_stats(b, a, segments),
    "vector": lambda b, a, ids, segments: ops.vector_stats(b, segments),
    "embedding": lambda b, a, ids, segments: ops.embedding_stats(ops.EmbeddingRows(b, ids, segments), 50),
    "ragged": lambda b, a, ids, segments: ops.ragged_row_stats(b, segments),
}
each_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=list(OPERATIONS))


def batch(lengths, dtype=torch.float32):
    ids = torch.randint(0, 40, (sum(lengths),), generator=torch.Generator().manual_seed(4))
    return draw(lengths, 17, dtype), draw(lengths, 33, dtype, seed=1), ids


@each_operation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_does_not_depend_on_its_neighbours_or_place(operation, dtype):
    lengths = (3, 17, 1, 64, 5)
    segments = Segments(lengths)
    parts = batch(lengths, dtype)
    together = operation(*parts, segments)
    order = [3, 1, 4, 0, 2]
    moved = [torch.cat([of_sample(x, segments, i) for i in order]) for x in parts]
    permuted = operation(*moved, Segments(tuple(lengths[i] for i in order)))
    for place, i in enumerate(order):
        alone = operation(*(of_sample(x, segments, i).clone() for x in parts), Segments((lengths[i],)))
        assert_same_bits(alone, part_of(together, i))
        assert_same_bits(alone, part_of(permuted, place))


def part_of(stats: Statistics, i: int) -> Statistics:
    return Statistics(**{name: getattr(stats, name)[i : i + 1] for name in FIELDS})


@each_operation
def test_scaling_by_a_power_of_two_is_exact(operation):
    segments = Segments((3, 17, 1))
    b, a, ids = batch(segments.lengths)
    base = operation(b, a, ids, segments)
    assert_same_bits(operation(b * 2.0**20, a, ids, segments), base.scaled(torch.full((3,), 2.0**20)))
    assert_same_bits(operation(b * -(2.0**-9), a, ids, segments), base.scaled(torch.full((3,), -(2.0**-9))))


@each_operation
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_nonfinite_value_stays_in_its_sample_and_is_counted(operation, bad):
    segments = Segments((3, 4, 2))
    b, a, ids = batch(segments.lengths)
    clean = operation(b, a, ids, segments)
    b[4, 6] = bad
    found = operation(b, a, ids, segments)
    for i in (0, 2):
        assert_same_bits(part_of(found, i), part_of(clean, i))
    assert found.nonfinite[0] == found.nonfinite[2] == 0
    # One element of b is one element of a vector and an embedding, and a row of 33 of a weight.
    assert found.nonfinite[1] == (33 if operation is OPERATIONS["outer"] else 1)
    assert not found.sumsq[1].isfinite()


@each_operation
def test_squares_beyond_float32_are_summed(operation):
    """1e25 squared overflows float32; the gradient itself does not."""
    segments = Segments((3, 1))
    b, a, ids = batch(segments.lengths)
    found = operation(b * 1e25, a, ids, segments)
    truth = operation(b.double() * 1e25, a.double(), ids, segments)
    assert found.nonfinite.tolist() == [0, 0]
    torch.testing.assert_close(found.sumsq, truth.sumsq, rtol=1e-5, atol=0)


@each_operation
def test_squares_below_float32_are_summed(operation):
    """1e-25 squared underflows float32."""
    segments = Segments((3, 1))
    b, a, ids = batch(segments.lengths)
    found = operation(b * 1e-25, a, ids, segments)
    truth = operation(b.double() * 1e-25, a.double(), ids, segments)
    torch.testing.assert_close(found.sumsq, truth.sumsq, rtol=1e-5, atol=0)


def some_statistics(seed: int, count: int = 4) -> Statistics:
    """Statistics of whole numbers, so that sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-50, 50, (count, 6), generator=generator).double()
    return Statistics(x.sum(1), x.square().sum(1), x.amin(1), x.amax(1), torch.arange(count))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_merge_is_associative_commutative_and_has_a_neutral_element(seed):
    x, y, z = (some_statistics(3 * seed + i) for i in range(3))
    assert_same_bits(x.merge(y).merge(z), x.merge(y.merge(z)))
    assert_same_bits(x.merge(y), y.merge(x))
    assert_same_bits(x.merge(Statistics.empty(4, CPU)), x)


def test_merge_is_the_statistics_of_the_concatenation():
    x = torch.arange(12.0).reshape(2, 6).double()
    parts = [ops.dense_row_stats(part) for part in (x[:, :1], x[:, 1:4], x[:, 4:])]
    merged, truth = parts[0].merge(parts[1]).merge(parts[2]), ops.dense_row_stats(x)
    for name in FIELDS:
        torch.testing.assert_close(getattr(merged, name), getattr(truth, name), rtol=1e-14, atol=0)


def test_concatenate_keeps_the_order_of_samples():
    x, y = some_statistics(0), some_statistics(1, count=2)
    both = Statistics.concatenate([x, y])
    assert_same_bits(part_of(both, 3), part_of(x, 3))
    assert_same_bits(part_of(both, 5), part_of(y, 1))


def test_a_negative_factor_swaps_smallest_and_largest():
    x = ops.dense_row_stats(torch.tensor([[-3.0, 0.0, 4.0]]))
    y = x.scaled(torch.tensor([-2.0]))
    assert (y.min.item(), y.max.item(), y.sum.item(), y.sumsq.item()) == (-8.0, 6.0, -2.0, 100.0)


def test_mean_std_and_norm():
    x = ops.dense_row_stats(torch.tensor([[3.0, 0.0, 4.0, 0.0], [5.0, 5.0, 5.0, 5.0]]))
    assert x.mean(4).tolist() == [1.75, 5.0]
    assert x.std(4).tolist() == pytest.approx([(25 / 4 - 1.75**2) ** 0.5, 0.0], rel=1e-14)
    assert x.norm().tolist() == [5.0, 10.0]


def test_packing_drops_the_padding():
    layout = BatchLayout((2, 0, 3), 4)
    x = torch.arange(24.0).reshape(3, 4, 2)
    packed, segments = layout.pack(x, 2)
    assert segments.lengths == (2, 0, 3)
    torch.testing.assert_close(packed, torch.cat([x[0, :2], x[2, :3]]))
    by_head, heads = layout.pack(x.reshape(12, 2), 1)
    assert heads.lengths == (4, 0, 6)
    torch.testing.assert_close(by_head, packed.reshape(-1, 1))


def test_packing_refuses_another_batch():
    with pytest.raises(ValueError, match="does not start with the batch"):
        BatchLayout((2, 3), 4).pack(torch.zeros(3, 4, 2), 2)
