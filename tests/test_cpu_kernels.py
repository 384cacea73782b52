"""The compiled CPU kernels against float64 and the reference, in every variant that this machine runs."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grads_dist.errors import ConfigError
from grads_dist.stats import backend, native, operators, ops, reference
from grads_dist.stats.segments import Segments

VARIANTS = native.variants()
needs_kernels = pytest.mark.skipif(not VARIANTS, reason="the package was installed without a C++ compiler")
TYPES = (torch.float32, torch.bfloat16)
LENGTHS = [0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 255, 256, 257, 513]


def draw(lengths, num_b, num_a, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    b, a = (torch.randn(sum(lengths), n, generator=generator).to(dtype) for n in (num_b, num_a))
    return b, a


def numbers(gradients):
    """Sum, sum of squares, minimum and maximum of float64 gradients [4, S]."""
    found = [[g.sum(), g.square().sum(), g.min(), g.max()] for g in gradients]
    return torch.tensor(found, dtype=torch.float64).T


def truth(b, a, lengths):
    parts = zip(b.double().split(lengths), a.double().split(lengths), strict=True)
    return numbers([x.t() @ y for x, y in parts])


def assert_close_to(exact, ours, theirs, numel, terms):
    """No further from float64 than twice the reference, and a few roundings.

    `terms` [S] are the largest sums of absolute terms that an element of each sample is made of.
    """
    norm = exact[1].sqrt()
    slack = 4 * torch.finfo(torch.float32).eps
    slack *= torch.stack([norm * numel**0.5, exact[1] + norm * terms, terms, terms])
    assert ((torch.stack(ours) - exact).abs() <= 2 * (torch.stack(theirs) - exact).abs() + slack).all()


def assert_as_good_as_reference(found, b, a, lengths):
    theirs = reference.outer_product_stats(b, a, lengths, None, None)
    terms = truth(b.abs(), a.abs(), lengths)[3]
    assert_close_to(truth(b, a, lengths), found, theirs, b.shape[1] * a.shape[1], terms)


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("num_b", "num_a"), [(1, 1), (6, 16), (7, 17), (13, 31), (24, 64), (61, 5), (64, 96)]
)
def test_statistics_and_batch_gradient(variant, dtype, num_b, num_a):
    b, a = draw(LENGTHS, num_b, num_a, dtype)
    weights = [0.5, 2.0, -1.0, 0.0, 3.0, 1.0, 0.25, 1.5, -0.5, 1.0, 2.0, 0.75, -2.0, 0.125]
    total = torch.full((num_b, num_a), 0.75)
    found = native.outer_product_stats(b, a, LENGTHS, total, weights, variant)
    assert_as_good_as_reference(found, b, a, LENGTHS)
    assert_as_good_as_reference(native.outer_product_stats(b, a, LENGTHS, None, None, variant), b, a, LENGTHS)
    expected = torch.full((num_b, num_a), 0.75, dtype=torch.float64)
    parts = zip(b.double().split(LENGTHS), a.double().split(LENGTHS), weights, strict=True)
    scale = torch.zeros_like(expected)
    for x, y, w in parts:
        expected += w * (x.t() @ y)
        scale += abs(w) * (x.abs().t() @ y.abs())
    assert ((total - expected).abs() <= 16 * torch.finfo(torch.float32).eps * (scale + 1)).all()


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("lengths", [[0, 3, 0], [0, 0], [0, 4, 0, 5, 0]])
def test_batch_gradient_between_samples_without_tokens(variant, dtype, lengths):
    b, a = draw(lengths, 40, 70, dtype)
    total = torch.zeros(40, 70)
    found = native.outer_product_stats(b, a, lengths, total, None, variant)
    torch.testing.assert_close(total.double(), b.double().t() @ a.double(), rtol=1e-5, atol=1e-5)
    empty = torch.tensor(lengths) == 0
    assert (torch.stack(found)[:, empty] == 0).all()


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40) | st.integers(500, 600), min_size=1, max_size=7),
    num_b=st.integers(1, 40),
    num_a=st.integers(1, 70),
    dtype=st.sampled_from(TYPES),
)
def test_any_shape(variant, lengths, num_b, num_a, dtype):
    b, a = draw(lengths, num_b, num_a, dtype)
    found = native.outer_product_stats(b, a, lengths, None, None, variant)
    assert_as_good_as_reference(found, b, a, lengths)


@pytest.fixture
def eager_threads(monkeypatch):
    """Threads for any amount of work."""
    monkeypatch.setattr(native, "WORK_OF_A_THREAD", 1)


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", TYPES)
def test_bits_depend_on_the_sample_alone(variant, dtype, eager_threads):
    """Not on its neighbours, its place, the number of samples or of threads, nor on a batch gradient."""
    lengths = [5, 600, 0, 64, 129, 300, 1, 31]
    b, a = draw(lengths, 37, 53, dtype)
    together = torch.stack(native.outer_product_stats(b, a, lengths, None, None, variant))
    with_total = native.outer_product_stats(b, a, lengths, torch.zeros(37, 53), None, variant)
    assert torch.equal(together, torch.stack(with_total))
    parts = list(zip(b.split(lengths), a.split(lengths), lengths, strict=True))
    for i, (x, y, n) in enumerate(parts):
        alone = native.outer_product_stats(x, y, [n], None, None, variant)
        assert torch.equal(together[:, i], torch.stack(alone)[:, 0])
    order = [3, 0, 7, 1, 6, 5, 2, 4]
    x, y = (torch.cat([parts[i][k] for i in order]) for k in (0, 1))
    permuted = native.outer_product_stats(x, y, [lengths[i] for i in order], None, None, variant)
    assert torch.equal(together[:, order], torch.stack(permuted))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            again = native.outer_product_stats(b, a, lengths, None, None, variant)
            assert torch.equal(together, torch.stack(again))
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", TYPES)
def test_long_samples(variant, dtype, eager_threads):
    """They go block by block through groups of panels, with a batch gradient from another length on."""
    lengths, weights = [1100, 3, 520, 1025], [0.5, 1.0, -2.0, 1.5]
    b, a = draw(lengths, 40, 300, dtype)
    total, expected = torch.zeros(40, 300), torch.zeros(40, 300, dtype=torch.float64)
    found = native.outer_product_stats(b, a, lengths, total, weights, variant)
    assert_as_good_as_reference(found, b, a, lengths)
    parts = zip(b.double().split(lengths), a.double().split(lengths), weights, strict=True)
    for x, y, w in parts:
        expected += w * (x.t() @ y)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-3)
    for i, (x, y) in enumerate(zip(b.split(lengths), a.split(lengths), strict=True)):
        alone = native.outer_product_stats(x, y, [len(x)], None, None, variant)
        assert torch.equal(torch.stack(found)[:, i], torch.stack(alone)[:, 0])


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", TYPES)
def test_scaling_by_powers_of_two_is_exact(variant, dtype):
    lengths = [17, 3]
    b, a = draw(lengths, 20, 33, dtype)
    total, sumsq, low, high = native.outer_product_stats(b, a, lengths, None, None, variant)
    scaled = native.outer_product_stats(b * -4, a, lengths, None, None, variant)
    assert torch.equal(scaled[0], total * -4) and torch.equal(scaled[1], sumsq * 16)
    assert torch.equal(scaled[2], high * -4) and torch.equal(scaled[3], low * -4)


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
def test_transposed_factors_have_the_same_extremes(variant):
    lengths = [40, 9]
    b, a = draw(lengths, 29, 35)
    one = native.outer_product_stats(b, a, lengths, None, None, variant)
    other = native.outer_product_stats(a, b, lengths, None, None, variant)
    assert torch.equal(one[2], other[2]) and torch.equal(one[3], other[3])
    torch.testing.assert_close(one[:2], other[:2], rtol=1e-7, atol=1e-12)


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [11, 20, 31])
def test_what_is_not_finite_stays_in_its_sample(variant, dtype, bad, place):
    """In its first token, behind a sample of odd length; in the middle; in the last of an odd length."""
    lengths = [11, 21, 30]
    b, a = draw(lengths, 19, 40, dtype)
    weights, clean_total, total = [1.0, 0.5, 2.0], torch.zeros(19, 40), torch.zeros(19, 40)
    clean = torch.stack(native.outer_product_stats(b, a, lengths, clean_total, weights, variant))
    a[place, 39] = bad
    found = torch.stack(native.outer_product_stats(b, a, lengths, total, weights, variant))
    assert not found[1, 1].isfinite()
    assert torch.equal(found[:, [0, 2]], clean[:, [0, 2]])
    assert not total[:, 39].isfinite().any() and torch.equal(total[:, :39], clean_total[:, :39])


@needs_kernels
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 7, 39])
def test_both_backends_report_the_same_of_what_is_not_finite(monkeypatch, bad, place):
    lengths = [10, 20, 30]
    b, a = draw(lengths, 19, 40)
    a[15, place] = bad
    found = {}
    for name in ("cpu", "reference"):
        monkeypatch.setenv(backend.VARIABLE, name)
        found[name] = ops.outer_product_stats(b, a, Segments(tuple(lengths)))
    assert found["cpu"].nonfinite.tolist() == found["reference"].nonfinite.tolist() == [0, 19, 0]
    for name in ("min", "max"):
        ours, theirs = (getattr(stats, name) for stats in found.values())
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=0)


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scales", [(1e-25, 1), (1e25, 1), (1e-20, 1e-19), (1e-39, 1e3)])
def test_numbers_beyond_float32_are_repaired(monkeypatch, variant, dtype, scales):
    """Squares too large or too small, and denormal products and factors, which VDPBF16PS takes for zeros."""
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    monkeypatch.setattr(native, "variants", lambda: (variant,))
    lengths = [4, 7]
    b, a = (x * scale for x, scale in zip(draw(lengths, 8, 9, dtype), scales, strict=True))
    found = ops.outer_product_stats(b, a, Segments(tuple(lengths)))
    expected = truth(b, a, lengths)
    torch.testing.assert_close(found.sumsq, expected[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.min, expected[2], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.max, expected[3], rtol=1e-5, atol=0)
    assert not found.nonfinite.any()


@needs_kernels
def test_rows_with_any_stride(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    b, a = draw([12], 10, 14)
    expected = ops.outer_product_stats(b, a, Segments((12,)))
    wide = torch.zeros(12, 30)
    wide[:, 3:13] = b
    for other in (wide[:, 3:13], b.t().contiguous().t()):
        found = ops.outer_product_stats(other, a, Segments((12,)))
        assert torch.equal(found.sumsq, expected.sumsq) and torch.equal(found.max, expected.max)
    one = torch.ones(1, 1).expand(12, 10)
    found = ops.outer_product_stats(one, a, Segments((12,)))
    torch.testing.assert_close(found.max, a.double().sum(0).max()[None], rtol=1e-5, atol=1e-6)


RUNS = [3, 1, 40, 0, 2, 5, 1]
SAMPLES = [2, 0, 4, 1]
"""Runs of each sample: the second has none, and one run of the third has no rows."""


def sums_of(b, x, order, norm, of=lambda rows: rows):
    """Every run's sum, and those of a sample stacked, in float64."""
    rows = b.double()
    if x is not None:
        rows = rows * reference.normalised(x, norm, 1e-5).double()
    rows = of(rows)
    rows = rows if order is None else rows[order]
    runs = torch.stack([part.sum(0) for part in rows.split(RUNS)])
    return runs, [part if len(part) else torch.zeros(1, 1).double() for part in runs.split(SAMPLES)]


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("norm", [reference.NO_NORM, reference.RMS_NORM, reference.LAYER_NORM])
@pytest.mark.parametrize("num_cols", [1, 8, 33, 64])
@pytest.mark.parametrize("ordered", [False, True])
def test_sums_of_rows(variant, dtype, norm, num_cols, ordered):
    b, x = draw([sum(RUNS)], num_cols, num_cols, dtype)
    x = None if norm == reference.NO_NORM else x + 0.5
    order = torch.randperm(len(b), generator=torch.Generator().manual_seed(0)) if ordered else None
    offsets = torch.tensor([0, *RUNS]).cumsum(0)
    ours, theirs = torch.full((len(RUNS), num_cols), torch.nan), torch.empty(len(RUNS), num_cols)
    arguments = (b, x, order, offsets, SAMPLES, norm, 1e-5)
    found = native.row_sum_stats(*arguments, ours, variant)
    expected = reference.row_sum_stats(*arguments, theirs)
    runs, samples = sums_of(b, x, order, norm)
    terms = numbers(sums_of(b, x, order, norm, of=torch.abs)[1])[3]
    # In bfloat16 xhat is rounded, and may fall on the neighbouring number.
    coarse = 2**14 if dtype == torch.bfloat16 and norm else 1
    assert_close_to(numbers(samples), found, expected, max(SAMPLES) * num_cols * coarse**2, terms * coarse)
    assert ((ours - runs).abs() <= 2 * (theirs - runs).abs() + 1e-6 * coarse * terms.max()).all()
    without_rows = native.row_sum_stats(*arguments, None, variant)
    assert torch.equal(torch.stack(found), torch.stack(without_rows))


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
def test_sums_of_rows_depend_on_the_sample_alone(variant, eager_threads):
    b, x = draw([60], 21, 21)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            offsets = torch.tensor([0, 20, 25, 60])
            found.append(native.row_sum_stats(b, x, None, offsets, [1, 1, 1], 1, 1e-5, None, variant))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.stack(found[0]), torch.stack(found[1]))
    alone = native.row_sum_stats(b[20:25], x[20:25], None, torch.tensor([0, 5]), [1], 1, 1e-5, None, variant)
    assert torch.equal(torch.stack(found[0])[:, 1], torch.stack(alone)[:, 0])


@pytest.mark.parametrize("name", ["reference", *(["cpu"] if VARIANTS else [])])
def test_both_backends_count_what_is_not_finite_in_sums_of_rows(monkeypatch, name):
    monkeypatch.setenv(backend.VARIABLE, name)
    b, x = draw([9], 6, 6)
    b[4, 2], b[5, 3], b[4, 0] = torch.nan, torch.inf, 1e30
    found = ops.vector_stats(b, Segments((3, 3, 3)), ops.Normalised(x, "rms", 1e-6))
    assert found.nonfinite.tolist() == [0, 2, 0] and found.sumsq[[0, 2]].isfinite().all()
    ids = torch.tensor([1, 1, 2, 0, 2, 0, 3, 3, 3])
    touched = ops.EmbeddingRows(b, ids, Segments((3, 3, 3)))
    assert ops.embedding_stats(touched, 5).nonfinite.tolist() == [0, 2, 0]


@pytest.mark.parametrize("name", ["reference", *(["cpu"] if VARIANTS else [])])
def test_operator_keeps_torchs_contract(name):
    b, a = draw([3, 5], 4, 6)
    arguments = (b, a, [3, 5], torch.zeros(4, 6), [1.0, 2.0], name)
    torch.library.opcheck(operators.outer_product_stats, arguments)
    torch.library.opcheck(operators.outer_product_stats, (b, a, [3, 5], None, None, name))
    rows = (b, b + 1, torch.arange(8), torch.tensor([0, 3, 8]), [1, 1], 1, 1e-5, name)
    torch.library.opcheck(operators.row_sum_stats, rows)
    torch.library.opcheck(
        operators.row_sum_stats, (b, None, None, torch.tensor([0, 3, 8]), [2, 0], 0, 0.0, name)
    )


@needs_kernels
def test_a_library_of_other_sources_is_not_used(monkeypatch, caplog):
    """Its structures may differ, which would crash."""
    monkeypatch.setattr(native, "ABI", -1)
    with caplog.at_level(logging.WARNING, logger=native.__name__):
        assert native.library.__wrapped__() is None
    assert "install grads_dist again" in caplog.text


@pytest.fixture
def fresh_choice():
    backend._choose.cache_clear()
    yield
    backend._choose.cache_clear()


def test_choice_is_logged_once_with_its_reason(monkeypatch, caplog, fresh_choice):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    cpu = torch.device("cpu")
    with caplog.at_level(logging.INFO, logger=backend.__name__):
        assert backend.backend_for(cpu, torch.float64) == "reference"
        assert backend.backend_for(cpu, torch.float64) == "reference"
        assert backend.backend_for(torch.device("meta"), torch.float32) == "reference"
    assert len(caplog.messages) == 2
    reason = "the cpu kernels do not take torch.float64" if VARIANTS else "the package was installed without"
    assert f"reference, because {reason}" in caplog.messages[0]


def test_without_a_library_the_reference_runs_unless_forced_otherwise(monkeypatch, caplog, fresh_choice):
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    with caplog.at_level(logging.INFO, logger=backend.__name__):
        assert backend.backend_for(torch.device("cpu"), torch.float32) == "reference"
    assert "without compiled kernels (no C++ compiler)" in caplog.text
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    with pytest.raises(ConfigError, match="'cpu' cannot run: the package was installed without"):
        backend.backend_for(torch.device("cpu"), torch.float32)


def test_what_a_forced_backend_does_not_take_is_left_to_the_reference(monkeypatch, fresh_choice):
    """A run has tensors of several types."""
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    if VARIANTS:
        assert backend.backend_for(torch.device("cpu"), torch.float64) == "reference"
        assert backend.backend_for(torch.device("cpu"), torch.bfloat16) == "cpu"
    monkeypatch.setenv(backend.VARIABLE, "cuda")
    with pytest.raises(ConfigError, match="'cuda' cannot run: cpu is no CUDA device"):
        backend.backend_for(torch.device("cpu"), torch.bfloat16)


def test_a_gpu_takes_the_kernels_only_when_asked_to(monkeypatch, fresh_choice):
    """They have not been run on one."""
    monkeypatch.setattr(backend, "unavailable_reason", lambda device: None)
    gpu = torch.device("cuda", 0)
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    assert backend.backend_for(gpu, torch.bfloat16) == "reference"
    monkeypatch.setenv(backend.VARIABLE, "cuda")
    assert backend.backend_for(gpu, torch.bfloat16) == "cuda"
    assert backend.backend_for(gpu, torch.float32) == "reference"
    assert backend.backend_for(gpu, torch.float32, backend.ROWS) == "cuda"


def test_an_unknown_backend_is_named(monkeypatch, fresh_choice):
    monkeypatch.setenv(backend.VARIABLE, "gpu")
    with pytest.raises(
        ConfigError, match="GRADS_DIST_BACKEND: 'gpu' is not known; allowed: auto, reference, cpu"
    ):
        backend.backend_for(torch.device("cpu"), torch.float32)


@needs_kernels
@pytest.mark.parametrize("total", [torch.zeros(5, 3).t(), torch.zeros(3, 5).bfloat16(), torch.zeros(3, 4)])
def test_a_total_that_the_kernel_would_write_past_is_not_taken(total):
    with pytest.raises(AssertionError):
        native.outer_product_stats(torch.ones(2, 3), torch.ones(2, 5), [2], total, None)
